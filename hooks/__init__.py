"""A vision-language model opened up: addresses, hook points, caches, running with hooks."""

import warnings

with warnings.catch_warnings():  # the first import of it warns in a notebook without ipywidgets
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401

from hooks.address import Address
from hooks.cache import ActivationCache
from hooks.engine import HookContext
from hooks.errors import FrankenlensError
from hooks.points import HookPoint
from hooks.vlm import HookedVLM
from hooks.weights import WeightSlice, graft, weight_slices

__all__ = [
    "ActivationCache",
    "Address",
    "FrankenlensError",
    "HookContext",
    "HookPoint",
    "HookedVLM",
    "WeightSlice",
    "graft",
    "weight_slices",
]
