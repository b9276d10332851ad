"""Path patching: which later components a component's effect goes through."""

from interp.paths.effects import path_effects, path_map
from interp.paths.in_order import paths_in_order
from interp.paths.job import paths_between
from interp.paths.path import Path, Receiver, receivers_of, senders_of
from interp.paths.senders import strongest_senders

__all__ = [
    "Path",
    "Receiver",
    "path_effects",
    "path_map",
    "paths_between",
    "paths_in_order",
    "receivers_of",
    "senders_of",
    "strongest_senders",
]
