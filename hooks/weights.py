"""The second body of an address: which slices of which parameters belong to a component."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from hooks.address import Address
from hooks.anatomy import Anatomy, Block, Role, Site
from hooks.anatomy.towers import is_linear
from hooks.errors import FrankenlensError
from hooks.resident.away import Away


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
    gate and up are one matrix) and its column of the matrix out of it. An expert owns its matrices, or its part of
    every tensor that holds those of all experts; the router belongs to none.
    What a post-norm makes of a part is what the part adds, so the norm is the part's (not a neuron's or a head's).
    `embed` is the unembedding too where the two are tied; `vision` leaves out projector and embedding inside the tower;
    `rest` is what no other address names, nothing where it names buffers alone.

    Raises:
        FrankenlensError: the model has no such layer, head or part, or its weights are packed, so that a head, a neuron
            or an expert has no rows of its own.
    """
    address = Address.parse(address)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = _named(model, anatomy, address, parameters)
    if not found and not buffer_slices(model, anatomy, address):
        raise FrankenlensError(f"{address} names no weights of {type(model).__name__}.")
    if address.unit:
        require_unpacked(model, found, str(address))
    return found


def require_unpacked(model: nn.Module, slices: Sequence[WeightSlice], what: str) -> None:
    """Refuse weights whose numbers are not those that the model computes with: quantized ones, whose scales lie apart.

    Raises:
        FrankenlensError: one of them is packed.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for piece in slices:
        value = own.get(piece.parameter)
        if value is None or isinstance(value, Away):  # of a model that was packed, none is away
            continue
        plain = type(value) in (Tensor, nn.Parameter) and type(value.data) in (Tensor, nn.Parameter)
        if not plain or not value.is_floating_point() or value.element_size() == 1:
            kind = type(value.data if type(value) is nn.Parameter else value).__name__
            raise FrankenlensError(
                f"{what} names {piece.parameter}, which is packed ({kind}, {value.dtype}): its numbers mean nothing "
                "without their scales. Load the model without quantization."
            )


def buffer_slices(model: nn.Module, anatomy: Anatomy, address: Address | str) -> list[WeightSlice]:
    """The numbers that an address has in a checkpoint beside its weights, such as the biases that balance experts.

    They are no parameters, and no head's, neuron's or expert's own.
    """
    address = Address.parse(address)
    return [] if address.unit else _named(model, anatomy, address, list(saved_buffers(model)))


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers that a checkpoint holds, by name."""
    found = {}
    for path, module in model.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and value.is_floating_point():
                found[f"{path}.{name}" if path else name] = value
    return found


def _named(model: nn.Module, anatomy: Anatomy, address: Address, names: list[str]) -> list[WeightSlice]:
    if address.kind == "blocks":
        return [s for single in address.expand() for s in _in_block(model, anatomy, single, names)]
    return [WeightSlice(name) for name in _whole(model, anatomy, address, names)]


@torch.no_grad()
def graft(recipient: nn.Module, donor: nn.Module, slices: list[WeightSlice]) -> None:
    """Copy the donor's slices into the recipient's parameters, in place.

    Raises:
        FrankenlensError: the recipient's type does not hold the donor's numbers; nothing is written.
    """
    target, source = (dict(m.named_parameters(remove_duplicate=False)) for m in (recipient, donor))
    for piece in slices:
        own, theirs = target[piece.parameter], piece.of(source[piece.parameter])
        if own.dtype != theirs.dtype and not torch.equal(theirs.to(own.dtype).to(theirs.dtype), theirs):
            raise FrankenlensError(
                f"{piece.parameter} is {theirs.dtype} in the donor and {own.dtype} in the recipient, which does not "
                "hold its numbers: open both in one type."
            )
    for piece in slices:
        piece.of(target[piece.parameter]).copy_(piece.of(source[piece.parameter]))


def wholes(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Addresses that together name every weight once.

    An unembedding that is tied goes with the embedding, and a tower all of whose weights are another's with that one
    (Diffusion Gemma's encoder with its decoder).
    """
    blocks = [
        f"{prefix}blocks.0-{len(tower.blocks) - 1}"
        for prefix, tower in anatomy.towers.items()
        if prefix != "vision."
    ]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def there(**parts: str) -> list[str]:
        return [
            address
            for address, path in parts.items()
            if path and any(_under(name, path) for name in parameters)
        ]

    unembed = "" if _tied(model, anatomy) else anatomy.unembed
    rest = any(True for _ in _rest(model, anatomy, parameters))
    found = (
        *there(vision=anatomy.vision.path, projector=anatomy.projector_weights),
        *blocks,
        *there(embed=anatomy.embed, ln_final=anatomy.final_norm, unembed=unembed),
        *(["rest"] if rest else []),
    )
    own, seen, chosen = dict(model.named_parameters(remove_duplicate=False)), set[int](), []
    for address in found:
        tensors = {id(own[piece.parameter]) for piece in weight_slices(model, anatomy, address)}
        if tensors - seen:
            chosen.append(address)
            seen |= tensors
    return tuple(chosen)


def _rest(model: nn.Module, anatomy: Anatomy, parameters: list[str]) -> Iterator[str]:
    """Weights outside of all that has an address of its own; of a weight under several names, the first.

    Buffers of a tower all of whose weights are another's too: that tower is no whole of its own (see `wholes`).
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    named = [anatomy.vision.path, anatomy.projector_weights, *anatomy.deepstack.values()]
    named += [anatomy.embed, anatomy.final_norm, "" if _tied(model, anatomy) else anatomy.unembed]
    elsewhere: set[int] = set()
    for tower in anatomy.towers.values():
        blocks = [block.path for block in tower.blocks]
        tensors = {id(value) for name, value in own.items() if any(_under(name, path) for path in blocks)}
        if tensors - elsewhere or set(parameters) <= set(own):
            named += blocks
        elsewhere |= tensors
    paths = [path for path in named if path]
    inside = [name for name in own if any(_under(name, path) for path in paths)]
    seen = {id(own[name]) for name in inside}
    for name in parameters:
        if any(_under(name, path) for path in paths) or id(own.get(name, name)) in seen:
            continue
        seen |= {id(own[name])} if name in own else set()
        yield name


def _whole(model: nn.Module, anatomy: Anatomy, address: Address, parameters: list[str]) -> Iterator[str]:
    if address.kind == "rest":
        yield from _rest(model, anatomy, parameters)
        return
    path = {
        "projector": anatomy.projector_weights,
        "embed": anatomy.embed,
        "ln_final": anatomy.final_norm,
        "unembed": anatomy.unembed,
        "vision": anatomy.vision.path,
    }[address.kind]
    if not path:
        why = anatomy.absent.get(address.kind)
        raise FrankenlensError(
            f"{address}: {type(model).__name__} has no such part that could be told apart"
            + (f" ({why})." if why else ".")
        )
    if address.kind == "unembed" and _tied(model, anatomy):
        raise FrankenlensError(
            "the unembedding is tied to the embedding, one tensor: name `embed`, which is both."
        )
    projectors = tuple(filter(None, (anatomy.projector_weights, *anatomy.deepstack.values())))
    inside = (*projectors, anatomy.embed) if address.kind == "vision" else projectors
    for name in parameters:
        if address.kind == "projector":
            yield from [name] if any(_under(name, module) for module in projectors) else []
        elif _under(name, path) and not any(module and _under(name, module) for module in inside):
            yield name


def _tied(model: nn.Module, anatomy: Anatomy) -> bool:
    if not (anatomy.unembed and anatomy.embed):
        return False
    unembed, embed = (
        getattr(model.get_submodule(path), "weight", None) for path in (anatomy.unembed, anatomy.embed)
    )
    return unembed is not None and unembed is embed


def _in_block(
    model: nn.Module, anatomy: Anatomy, address: Address, parameters: list[str]
) -> Iterator[WeightSlice]:
    tower = anatomy.towers.get("" if address.tower == "text" else f"{address.tower}.")
    layer = address.layer
    if tower is None:
        have = ", ".join(name.rstrip(".") or "text" for name in anatomy.towers)
        raise FrankenlensError(f"{address}: this model has no tower {address.tower!r}, only {have}.")
    if layer is None or layer >= len(tower.blocks):
        raise FrankenlensError(f"{address}: the {address.tower} tower has blocks 0-{len(tower.blocks) - 1}.")
    block = tower.blocks[layer]
    if address.unit is None:
        for path in _paths(block, address):
            yield from (WeightSlice(name) for name in parameters if _under(name, path))
        return
    unit, limit = address.index, n_units(model, block, address)
    if unit is None or unit >= limit:
        raise FrankenlensError(f"{address}: block {layer} has {address.unit}s 0-{limit - 1}.")
    if address.unit == "expert":
        yield from expert_slices(model, _experts(block), unit, parameters)
        return
    for path, dim, start, length in _slices_of_unit(model, block, address, unit):
        if f"{path}.weight" not in parameters:
            raise FrankenlensError(
                f"{path} is wrapped (an adapter?), so {address} has no rows of its own; merge it first."
            )
        if hasattr(model.get_submodule(path), "nf"):  # GPT-2's Conv1D keeps its weight as [in, out]
            yield WeightSlice(f"{path}.weight", 1 - dim, start, length)
            if dim == 0 and f"{path}.bias" in parameters:
                yield WeightSlice(f"{path}.bias", 0, start, length)
            continue
        for name in (f"{path}.weight", f"{path}.bias") if dim == 0 else (f"{path}.weight",):
            if name in parameters:
                yield WeightSlice(name, dim, start, length)


def _paths(block: Block, address: Address) -> list[str]:
    """The modules of a block, or of what a part of it adds."""
    if address.sub is None:
        return [block.path]
    found = part_paths(block, address.sub)
    if not found:
        raise FrankenlensError(f"{address}: {block.path} has no {address.sub}. {block.why}".strip())
    return found


def part_paths(block: Block, sub: str) -> list[str]:
    """The modules of what a part of a block adds: the part and the norm behind it; none where there is no such part.

    Args:
        block: the block.
        sub: attn, cross_attn, mixer or mlp.
    """
    roles: tuple[Role, ...] = ("mlp", "moe") if sub == "mlp" else (sub,)  # type: ignore[assignment]
    writer = block.writer(*roles)
    if writer is None:
        return []
    made = writer.parts or (writer.body,)
    return [*made, *(() if writer.rest or writer.module in made else (writer.module,))]


def site_at(block: Block, sub: str | None) -> Site:
    """The attention that a head's address is of.

    Raises:
        FrankenlensError: the block has none.
    """
    cross = sub == "cross_attn"
    site = next((one for one in block.sites if one.cross == cross), None)
    if site is None:
        raise FrankenlensError(f"{block.path} has no {sub}: it does not attend there.")
    return site


def n_units(model: nn.Module, block: Block, address: Address) -> int:
    """How many heads, key/value heads, neurons or experts a block has."""
    if address.unit == "neuron":
        return d_mlp(model, block)
    if address.unit == "expert":
        return n_experts(model.get_submodule(_experts(block)))
    site = site_at(block, address.sub)
    return site.n_heads if address.unit == "head" else site.n_kv_heads


def _experts(block: Block) -> str:
    """The module that holds a block's experts: their own, or the MLP around them."""
    writer = block.writer("moe")
    return block.mlp if writer is None or writer.experts is None else writer.experts.module


def n_experts(mlp: nn.Module) -> int:
    """Experts of an MLP: the size of its lists of alike modules, or of the first axis of its three-axis tensors.

    Raises:
        FrankenlensError: it has none.
    """
    sizes = {len(part) for _, part in _expert_lists(mlp)} | {
        v.shape[0] for v in mlp.parameters() if v.ndim == 3
    }
    if not sizes:
        raise FrankenlensError(f"a {type(mlp).__name__} has no experts.")
    return max(sizes)


def _expert_lists(mlp: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, part)
        for name, part in mlp.named_modules()
        if isinstance(part, nn.ModuleList)
        and len(part) > 1
        and len({type(member) for member in part}) == 1
        and any(True for _ in part[0].parameters())
    ]


def expert_slices(model: nn.Module, path: str, expert: int, parameters: list[str]) -> Iterator[WeightSlice]:
    """What one expert of the MLP at `path` owns."""
    mlp = model.get_submodule(path)
    total = n_experts(mlp)
    prefixes = [f"{path}.{name}.{expert}." for name, part in _expert_lists(mlp) if len(part) == total]
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters:
        if any(name.startswith(prefix) for prefix in prefixes):
            yield WeightSlice(name)
        elif not prefixes and _under(name, path) and own[name].ndim >= 2 and own[name].shape[0] == total:
            holder = model.get_submodule(name.rpartition(".")[0])
            if any(
                value.ndim == 3 for value in holder.parameters(recurse=False)
            ):  # their biases have two axes
                yield WeightSlice(name, 0, expert, 1)


def _slices_of_unit(
    model: nn.Module, block: Block, address: Address, i: int
) -> Iterator[tuple[str, int, int, int]]:
    if address.unit == "neuron":
        width = d_mlp(model, block)
        for name in _mlp_layers(model, block):
            if name == block.mlp_out:
                yield name, 1, i, 1
            else:  # gate and up may be one matrix, one above the other
                yield from ((name, 0, first + i, 1) for first in range(0, _outputs(model, name), width))
        return
    site = site_at(block, address.sub)
    for letter in "q" if address.unit == "head" else "kv":
        own = getattr(site, letter)
        if own is None:
            raise FrankenlensError(f"{address}: no projection was seen to make exactly its {letter}.")
        yield own.module, 0, *own.rows(i, _outputs(model, own.module))
    if address.unit == "head":
        if site.out is None:
            raise FrankenlensError(
                f"{address}: something lies between its attention and the output projection."
            )
        yield site.out, 1, i * site.d_value, site.d_value


def _mlp_layers(model: nn.Module, block: Block) -> list[str]:
    """The linear layers of a dense MLP."""
    writer = block.writer("mlp")
    found: list[str] = []
    for part in (writer.parts or (writer.body,)) if writer else ():
        children = model.get_submodule(part).named_children()
        inside = [f"{part}.{name}" for name, child in children if is_linear(child)]
        found += [part] if is_linear(model.get_submodule(part)) else inside
    return found


def _outputs(model: nn.Module, path: str) -> int:
    module: Any = model.get_submodule(path)
    return getattr(module, "out_features", None) or getattr(module, "nf", 0) or module.weight.shape[0]


def d_mlp(model: nn.Module, block: Block) -> int:
    """Neurons of a block's dense MLP.

    Raises:
        FrankenlensError: it has none, or its last layer was not found.
    """
    last: Any = model.get_submodule(block.mlp_out)
    return getattr(last, "in_features", None) or getattr(last, "nx", None) or last.weight.shape[1]


def _under(name: str, path: str) -> bool:
    return name.startswith(path + ".")
