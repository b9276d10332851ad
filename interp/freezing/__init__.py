"""Components that no optimizer step can change, in whatever trainer."""

from interp.freezing.frozen import Frozen, freeze, frozen_rows

__all__ = ["Frozen", "freeze", "frozen_rows"]
