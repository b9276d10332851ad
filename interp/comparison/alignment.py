"""Whether checkpoints can be compared: the same names, shapes and ties."""

from __future__ import annotations

from collections.abc import Iterator

from hooks.errors import FrankenlensError
from interp.comparison.checkpoint import SHOWN, Checkpoint


def align(*checkpoints: Checkpoint) -> list[str]:
    """The parameters that the checkpoints share, in the model's order.

    Raises:
        FrankenlensError: their names, shapes or ties differ; names the first differences.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differences = list(_differences(first, other))
        if differences:
            more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise FrankenlensError(
                f"{first.folder} and {other.folder} do not align: {'; '.join(differences[:SHOWN])}{more}. "
                "Compare checkpoints of one architecture, with equal vocabularies and the same weights tied "
                "(save both with save_pretrained from one class and config)."
            )
    return list(first.tensors)


def _differences(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    for one, two in ((first, other), (other, first)):
        for name in one.tensors:
            if name in two.ties:
                yield f"{name} is tied to {two.ties[name]} in {two.folder} but has its own weights in {one.folder}"
            elif name not in two.tensors:
                yield f"{name} is only in {one.folder}"
    for name, stored in first.tensors.items():
        if name in other.tensors and other.tensors[name].shape != stored.shape:
            shapes = [list(shape) for shape in (stored.shape, other.tensors[name].shape)]
            yield f"{name} is {shapes[0]} in {first.folder} but {shapes[1]} in {other.folder}"
