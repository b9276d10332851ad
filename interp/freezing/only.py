"""The other way round: everything frozen but some components."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hooks import Address, FrankenlensError, HookedVLM
from interp.freezing.frozen import Frozen, frozen_rows
from interp.freezing.rows import Rows


def train_only(
    model: nn.Module | HookedVLM, addresses: str | Address | Iterable[str | Address], processor: Any = None
) -> Frozen:
    """Freeze everything but the named components, as `freeze` freezes, until the returned object is released.

    Args:
        model, processor: as in `freeze`.
        addresses: what may be trained, e.g. `["blocks.3.mlp", "blocks.5.attn.head.1"]`; they may overlap.

    Raises:
        FrankenlensError: as `freeze`; the addresses name all weights, so that nothing is frozen.
    """
    given = [addresses] if isinstance(addresses, str | Address) else list(addresses)
    trained = frozen_rows(model, given, processor)
    bare = model.model if isinstance(model, HookedVLM) else model
    rows: dict[str, Rows | None] = {}
    for name, parameter in bare.named_parameters():
        if name not in trained:
            rows[name] = None
        elif (own := trained[name]) is not None:
            rows[name] = Rows(own.dim, own.others, own.index, own.rest(parameter))
    if not rows:
        raise FrankenlensError(f"{', '.join(map(str, given))} name every weight; there is nothing to freeze")
    return Frozen(bare, tuple(f"all but {address}" for address in given), rows)
