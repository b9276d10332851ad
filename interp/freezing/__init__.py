"""Components that no optimizer step can change, in whatever trainer."""

from interp.freezing.exports import FrozenNames, frozen_names
from interp.freezing.frozen import Frozen, freeze, frozen_rows, n_frozen
from interp.freezing.only import train_only
from interp.freezing.targets import target_modules

__all__ = [
    "Frozen",
    "FrozenNames",
    "freeze",
    "frozen_names",
    "frozen_rows",
    "n_frozen",
    "target_modules",
    "train_only",
]
