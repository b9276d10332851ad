"""One work by many processes, on one machine or many: Ray's, with the numbers of one process."""

from interp.cluster.cluster import Cluster

__all__ = ["Cluster"]
