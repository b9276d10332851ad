"""Addresses as PEFT's `target_modules`: adapters on these components and on no others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hooks import Address, FrankenlensError, HookedVLM, weight_slices
from hooks.unopened import unopened_anatomy
from interp.freezing.patterns import pattern_of
from interp.freezing.refusals import adapter_of

_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHOWN = 3


def target_modules(
    model: nn.Module | HookedVLM, addresses: str | Address | Iterable[str | Address], processor: Any = None
) -> str:
    """The regular expression for `LoraConfig(target_modules=...)` that names the linear maps of components alone.

    PEFT adapts linear maps, embeddings and convolutions; norms that belong to a component get no adapter.

    Args:
        model, processor: as in `freeze`; weights are not looked at.
        addresses: whole parts, such as `blocks.9-18.mlp`, `vision` or `projector`.

    Raises:
        FrankenlensError: an address is a part of a tensor (a head, a neuron, an expert of a packed tensor), which an
            adapter of the module cannot be kept to; has weights that are no module's own; or has nothing to adapt.

    Example:
        LoraConfig(target_modules=fl.target_modules(model, ["blocks.9-18.mlp", "blocks.17.attn"]))
    """
    bare = model.model if isinstance(model, HookedVLM) else model
    return pattern_of(target_names(model, addresses, processor), (name for name, _ in bare.named_modules()))


def target_names(
    model: nn.Module | HookedVLM, addresses: str | Address | Iterable[str | Address], processor: Any = None
) -> list[str]:
    """The same as a list of modules, for trainers that take one (EasyR1 and verl split theirs at commas).

    Raises:
        FrankenlensError: as `target_modules`.
    """
    bare = model.model if isinstance(model, HookedVLM) else model
    if adapter := adapter_of(bare):
        raise FrankenlensError(f"{adapter} is under an adapter already; give the model without one")
    given = [addresses] if isinstance(addresses, str | Address) else list(addresses)
    anatomy = model.anatomy if isinstance(model, HookedVLM) else unopened_anatomy(bare, processor)  # type: ignore[arg-type]
    found: dict[str, None] = {}
    for address in given:
        found |= dict.fromkeys(_modules(bare, anatomy, address))
    if not given:
        raise FrankenlensError("adapters need at least one address, such as 'blocks.9-18.mlp'")
    return list(found)


def _modules(model: nn.Module, anatomy: Any, address: str | Address) -> list[str]:
    pieces = weight_slices(model, anatomy, address)
    part = next((piece for piece in pieces if piece.dim is not None), None)
    if part is not None:
        what = "rows" if part.dim == 0 else "columns"
        raise FrankenlensError(
            f"{address} is {what} {part.start}-{part.start + part.length - 1} of {part.parameter}, and an adapter acts "
            "on all of a module: name the whole part (.attn, .mlp), or train the part itself with fl.train_only"
        )
    found = []
    for piece in pieces:
        path, _, leaf = piece.parameter.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, _ADAPTED) or hasattr(module, "nf"):  # GPT-2's Conv1D
            found += [path] if leaf == "weight" else []
        elif model.get_parameter(piece.parameter).ndim > 1:
            raise FrankenlensError(
                f"{address}: {piece.parameter} is no module's weight (all experts in one tensor?), so target_modules "
                f"do not reach it; PEFT adapts it by target_parameters=[{piece.parameter!r}], all experts alike"
            )
    if not found:
        raise FrankenlensError(f"{address} has no linear map that an adapter could act on")
    return found
