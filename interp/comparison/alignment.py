"""Whether checkpoints can be compared: the same names, shapes and ties."""

from __future__ import annotations

from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import SHOWN, Checkpoint


def align(*checkpoints: Checkpoint) -> list[str]:
    """The tensors that the checkpoints share, in the model's order.

    Raises:
        FrankenlensError: their names, shapes or ties differ; names the first differences.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differences = [
            f"{one.name}: {one.ours} and {one.theirs}" for one in first.inventory.unlike(other.inventory)
        ]
        if differences:
            more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise FrankenlensError(
                f"{first.folder} and {other.folder} do not align: {'; '.join(differences[:SHOWN])}{more}. "
                "Compare checkpoints of one architecture, with equal vocabularies and the same weights tied "
                "(save both with save_pretrained from one class and config)."
            )
    return list(first.tensors)
