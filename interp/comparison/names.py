"""Names: from those on disk to those of the model, and from those to addresses and places in the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightRenaming,
    rename_source_key,
)

from hooks.anatomy import Anatomy, Block
from hooks.errors import FrankenlensError
from hooks.weights import part_paths

SECTIONS = ("vision", "projector", "embeddings", "decoder", "norm", "head", "rest")
_PARTS = ("attn", "cross_attn", "mixer", "mlp")
_COMPONENTS = {"gate_proj": "gate", "up_proj": "up", "fc1": "up", "linear_fc1": "up"}


class Names:
    """Renames the keys of a checkpoint as transformers does at loading."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        wanted = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in wanted if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in wanted if not isinstance(entry, WeightRenaming)]

    def __call__(self, key: str, shape: tuple[int, ...] | None = None) -> tuple[str, tuple[int, ...] | None]:
        """The model's name of a key, of a tensor of that shape on disk.

        Where that is a part of the model's tensor (one expert's matrix), also its place among the parts, which follow
        one another in this order; None where it is the whole tensor.

        Raises:
            FrankenlensError: transformers would change the tensor itself.
        """
        where = (self._prefix, self._state)
        name, converted = rename_source_key(key, self._renamings, self._converters, *where)  # type: ignore[arg-type]
        if name not in self._state and key in self._state:
            name, converted = rename_source_key(key, [], [], *where)
        if converted is None or self._as_it_is(name, converted, shape):
            return name, None
        if (order := self._order(key, converted)) is None:
            raise FrankenlensError(
                f"{key} is stored in a layout that transformers converts at loading; load the model and save it with "
                "save_pretrained(folder, save_original_format=False) first."
            )
        return name, order

    def _order(self, key: str, pattern: str) -> tuple[int, ...] | None:
        """By expert, and then as their matrices are joined; None where more is done to them than that."""
        converter: Any = next(one for one in self._converters if pattern in one.source_patterns)
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        single = steps == [(MergeModulelist, 0)] and len(converter.source_patterns) == 1
        if not single and steps != [(MergeModulelist, 0), (Concatenate, 1)]:
            return None
        numbers = [int(part) for part in key.split(".") if part.isdigit()]
        return (*numbers, converter.source_patterns.index(pattern))

    def _as_it_is(self, name: str, pattern: str, shape: tuple[int, ...] | None) -> bool:
        """Whether the conversion leaves a tensor of this shape alone: it transposes only what has another shape."""
        converter: Any = next(one for one in self._converters if pattern in one.source_patterns)
        only_if_other = all(getattr(operation, "check_dims", False) for operation in converter.operations)
        return only_if_other and name in self._state and tuple(self._state[name].shape) == shape


@dataclass(frozen=True)
class Place:
    """Where a parameter is in the network.

    Attributes:
        address: the smallest component that holds it, as `hooks.address` names it.
        section: one of `SECTIONS`; "norm" is the final norm, the norms of blocks belong to their blocks; "rest" is what
            no other part holds, and further towers (an encoder, a second vision tower).
        layer: decoder layer or vision block, from 0; None elsewhere.
        unified: vision blocks -n..-1, projector 0, decoder layers from 1 (2602.12395); None elsewhere.
        component: q, k, v, qkv, o, gate, up, down, the norms of a block in the order of its parts (ln1, ln2; behind a
            part: ln1_post), or the module's or the tensor's own name; biases end in `_bias`.
    """

    address: str
    section: str
    layer: int | None
    unified: int | None
    component: str


def places(anatomy: Anatomy, parameters: list[str]) -> dict[str, Place]:
    """The place of every parameter."""
    blocks = [
        (prefix, layer, block)
        for prefix, tower in anatomy.towers.items()
        for layer, block in enumerate(tower.blocks)
    ]
    found = {}
    for name in parameters:
        inside = next((one for one in blocks if _under(name, one[2].path)), None)
        found[name] = _in_block(anatomy, name, *inside) if inside else _outside(anatomy, name)
    return found


def _in_block(anatomy: Anatomy, name: str, tower: str, layer: int, block: Block) -> Place:
    address = f"{tower}blocks.{layer}"
    subs = [sub for sub in _PARTS if any(_under(name, path) for path in part_paths(block, sub))]
    address += f".{subs[0]}" if subs else ""
    section = {"": "decoder", "vision.": "vision"}.get(tower, "rest")
    unified = {"decoder": layer + 1, "vision": layer - len(anatomy.vision.blocks)}.get(section)
    return Place(address, section, layer, unified, _component(name, block))


def _component(name: str, block: Block) -> str:
    module, _, leaf = name.rpartition(".")
    kind = _known(block).get(module)
    if kind is None:
        kind = module.removeprefix(block.path).rpartition(".")[2] or leaf
        kind = _COMPONENTS.get(kind, kind)
    if leaf not in ("weight", "bias") and module not in _known(block):
        kind = _COMPONENTS.get(leaf, leaf)
    return kind + ("_bias" if leaf == "bias" else "")


def _known(block: Block) -> dict[str, str]:
    """Module to what it is: projections by what they make, norms by the part that they stand before or behind."""
    found: dict[str, str] = {}
    for site in block.sites:
        for letter in "qkv":
            own = getattr(site, letter)
            if own is not None:
                found[own.module] = found.get(own.module, "") + letter
        if site.out is not None:
            found[site.out] = "o"
    for place, writer in enumerate(block.writers, 1):
        if writer.last is not None and not writer.rest:
            found[writer.last] = "down"
        if writer.reader is not None:
            found.setdefault(writer.reader, f"ln{place}")
        if writer.module != writer.body and not writer.rest:
            found[writer.module] = f"ln{place}_post"
    return found


def _outside(anatomy: Anatomy, name: str) -> Place:
    for path in (anatomy.projector_weights, *anatomy.deepstack.values()):
        if path and _under(name, path):
            return Place("projector", "projector", None, 0, _inside(name, path, "projector"))
    for path, address, section in (
        (anatomy.embed, "embed", "embeddings"),
        (anatomy.final_norm, "ln_final", "norm"),
        (anatomy.unembed, "unembed", "head"),
        (anatomy.vision.path, "vision", "vision"),
    ):
        if path and _under(name, path):
            return Place(address, section, None, None, _inside(name, path, address))
    return Place("rest", "rest", None, None, _inside(name, name.rpartition(".")[0], "rest"))


def _inside(name: str, path: str, whole: str) -> str:
    module, _, leaf = name.removeprefix(path + ".").rpartition(".")
    return (module or whole) + ("_bias" if leaf == "bias" else "")


def _under(name: str, path: str) -> bool:
    return name.startswith(path + ".")
