"""The second body of an address: which slices of which parameters belong to a component."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from hooks.address import Address
from hooks.anatomy import Anatomy, Block
from hooks.errors import FrankenlensError


@dataclass(frozen=True)
class WeightSlice:
    """Rows or columns of one parameter: `parameter.narrow(dim, start, length)`; dim None is all of it."""

    parameter: str
    dim: int | None = None
    start: int = 0
    length: int = 0

    def of(self, parameter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The slice as a view of the parameter."""
        return parameter if self.dim is None else parameter.narrow(self.dim, self.start, self.length)


def weight_slices(model: nn.Module, anatomy: Anatomy, address: Address | str) -> list[WeightSlice]:
    """The weights that an address (a range too) names.

    A head owns its rows of W_Q (and b_Q) and its columns of W_O; the output bias belongs to no head. Keys and values
    that grouped query heads share are `kv_head`. A neuron owns its row of every matrix into the MLP (two rows where
    gate and up are one matrix) and its column of the matrix out of it.
    `embed` is the unembedding too where the two are tied; `vision` leaves out the projector inside the tower.

    Raises:
        FrankenlensError: the model has no such layer, head or part.
    """
    address = Address.parse(address)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if address.kind == "blocks":
        found = [s for single in address.expand() for s in _in_block(model, anatomy, single, parameters)]
    else:
        found = [WeightSlice(name) for name in _whole(model, anatomy, address, parameters)]
    if not found:
        raise FrankenlensError(f"{address} names no weights of {type(model).__name__}.")
    return found


@torch.no_grad()
def graft(recipient: nn.Module, donor: nn.Module, slices: list[WeightSlice]) -> None:
    """Copy the donor's slices into the recipient's parameters, in place."""
    target, source = (dict(m.named_parameters(remove_duplicate=False)) for m in (recipient, donor))
    for piece in slices:
        piece.of(target[piece.parameter]).copy_(piece.of(source[piece.parameter]))


def _whole(model: nn.Module, anatomy: Anatomy, address: Address, parameters: list[str]) -> Iterator[str]:
    path = {
        "projector": anatomy.projector_weights,
        "embed": anatomy.embed,
        "ln_final": anatomy.final_norm,
        "unembed": anatomy.unembed,
        "vision": anatomy.vision.path,
    }[address.kind]
    tied = model.get_parameter(f"{anatomy.unembed}.weight") is model.get_parameter(f"{anatomy.embed}.weight")
    if address.kind == "unembed" and tied:
        raise FrankenlensError(
            "the unembedding is tied to the embedding, one tensor: name `embed`, which is both."
        )
    projectors = (anatomy.projector_weights, *anatomy.deepstack)
    for name in parameters:
        of_projector = any(_under(name, module) for module in projectors)
        if address.kind == "projector":
            yield from [name] if of_projector else []
        elif _under(name, path) and not of_projector:
            yield name


def _in_block(
    model: nn.Module, anatomy: Anatomy, address: Address, parameters: list[str]
) -> Iterator[WeightSlice]:
    blocks = (anatomy.vision if address.tower == "vision" else anatomy.text).blocks
    layer = address.layer
    if layer is None or layer >= len(blocks):
        raise FrankenlensError(f"{address}: the {address.tower} tower has blocks 0-{len(blocks) - 1}.")
    block = blocks[layer]
    if address.unit is None:
        path = {None: block.path, "attn": block.attention, "mlp": block.mlp}[address.sub]
        yield from (WeightSlice(name) for name in parameters if _under(name, path))
        return
    unit = address.index
    limit = {"head": block.n_heads, "kv_head": block.n_kv_heads, "neuron": _d_mlp(model, block)}[address.unit]
    if unit is None or unit >= limit:
        raise FrankenlensError(f"{address}: block {layer} has {address.unit}s 0-{limit - 1}.")
    for path, dim, start, length in _slices_of_unit(model, block, address.unit, unit):
        if f"{path}.weight" not in parameters:
            raise FrankenlensError(
                f"{path} is wrapped (an adapter?), so {address} has no rows of its own; merge it first."
            )
        for name in (f"{path}.weight", f"{path}.bias") if dim == 0 else (f"{path}.weight",):
            if name in parameters:
                yield WeightSlice(name, dim, start, length)


def _slices_of_unit(model: nn.Module, block: Block, unit: str, i: int) -> Iterator[tuple[str, int, int, int]]:
    d = block.d_head
    fused = len(block.qkv) == 1
    if unit == "neuron":
        width = _d_mlp(model, block)
        for child, module in model.get_submodule(block.mlp).named_children():
            name = f"{block.mlp}.{child}"
            if not hasattr(module, "in_features"):
                continue
            rows: Any = module.out_features
            if name == block.mlp_out:
                yield name, 1, i, 1
            else:  # gate and up may be one matrix, one above the other
                yield from ((name, 0, first + i, 1) for first in range(0, rows, width))
    elif unit == "head":
        yield block.qkv[0], 0, i * d, d
        yield block.out, 1, i * d, d
    for part in (1, 2) if unit == "kv_head" else ():
        yield (
            (block.qkv[0], 0, (part * block.n_heads + i) * d, d) if fused else (block.qkv[part], 0, i * d, d)
        )


def _d_mlp(model: nn.Module, block: Block) -> int:
    return model.get_parameter(f"{block.mlp_out}.weight").shape[1]


def _under(name: str, path: str) -> bool:
    return name.startswith(path + ".")
