"""What is asked: examples with images, questions and answers; synthetic tasks, readers of files, graders."""

from interp.questions.examples import Example, fingerprint, with_looked_at

__all__ = ["Example", "fingerprint", "with_looked_at"]
