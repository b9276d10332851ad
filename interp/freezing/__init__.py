"""Components that no optimizer step can change, in whatever trainer."""

from interp.freezing.frozen import Frozen, freeze, frozen_rows, n_frozen
from interp.freezing.only import train_only

__all__ = ["Frozen", "freeze", "frozen_rows", "n_frozen", "train_only"]
