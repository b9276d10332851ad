"""What is asked: examples with images, questions and answers; synthetic tasks, readers of files, graders."""

from interp.questions.examples import Example, cluster_of, clusters_of, fingerprint, once_each, with_looked_at

__all__ = ["Example", "cluster_of", "clusters_of", "fingerprint", "once_each", "with_looked_at"]
