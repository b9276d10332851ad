"""IN, RL and perhaps Base: the same computation on other weights, checked when they are opened."""

from interp.pair.generation import greedy
from interp.pair.pair import Pair

__all__ = ["Pair", "greedy"]
