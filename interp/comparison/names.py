"""Names: from those on disk to those of the model, and from those to addresses and places in the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hooks.anatomy import Anatomy, Block
from hooks.errors import FrankenlensError

SECTIONS = ("vision", "projector", "embeddings", "decoder", "norm", "head")
_COMPONENTS = {"gate_proj": "gate", "up_proj": "up", "fc1": "up", "linear_fc1": "up"}


class Names:
    """Renames the keys of a checkpoint as transformers does at loading."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        wanted = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in wanted if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in wanted if not isinstance(entry, WeightRenaming)]

    def __call__(self, key: str, shape: tuple[int, ...] | None = None) -> str:
        """The model's name of a key, of a tensor of that shape on disk.

        Raises:
            FrankenlensError: transformers would change the tensor itself.
        """
        where = (self._prefix, self._state)
        name, converted = rename_source_key(key, self._renamings, self._converters, *where)  # type: ignore[arg-type]
        if name not in self._state and key in self._state:
            name, converted = rename_source_key(key, [], [], *where)
        if converted is not None and not self._as_it_is(name, converted, shape):
            raise FrankenlensError(
                f"{key} is stored in a layout that transformers converts at loading; load the model and save it with "
                "save_pretrained(folder, save_original_format=False) first."
            )
        return name

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
        section: one of `SECTIONS`; "norm" is the final norm, the norms of blocks belong to their blocks.
        layer: decoder layer or vision block, from 0; None elsewhere.
        unified: vision blocks -n..-1, projector 0, decoder layers from 1 (2602.12395); None elsewhere.
        component: q, k, v, qkv, o, gate, up, down, ln1, ln2 or the module's own name; biases end in `_bias`.
    """

    address: str
    section: str
    layer: int | None
    unified: int | None
    component: str


def places(anatomy: Anatomy, parameters: list[str]) -> dict[str, Place]:
    """The place of every parameter."""
    blocks = [("", i, block) for i, block in enumerate(anatomy.text.blocks)]
    blocks += [("vision.", i, block) for i, block in enumerate(anatomy.vision.blocks)]
    found = {}
    for name in parameters:
        inside = next((one for one in blocks if _under(name, one[2].path)), None)
        found[name] = _in_block(anatomy, name, *inside) if inside else _outside(anatomy, name)
    return found


def _in_block(anatomy: Anatomy, name: str, tower: str, layer: int, block: Block) -> Place:
    address = f"{tower}blocks.{layer}"
    for writer in block.writers:
        if _under(name, writer.body):
            address += f".{'mlp' if writer.role == 'moe' else writer.role}"
            break
    unified = layer - len(anatomy.vision.blocks) if tower else layer + 1
    return Place(address, "vision" if tower else "decoder", layer, unified, _component(name, block))


def _component(name: str, block: Block) -> str:
    module, _, leaf = name.rpartition(".")
    known = _known(block)
    if module in known:
        kind = known[module]
    elif not any(_under(name, writer.body) for writer in block.writers):
        mlp = block.writer("mlp", "moe")
        first = block.writers[0].reader if block.writers else None
        norms = {first: "ln1"} | ({} if mlp is None else {mlp.reader: "ln2"})
        kind = norms.get(module, module.rpartition(".")[2])
    elif leaf not in ("weight", "bias"):  # experts hold their matrices as parameters of their own
        return leaf
    else:
        last = module.rpartition(".")[2]
        kind = _COMPONENTS.get(last, last)
    return kind + ("_bias" if leaf == "bias" else "")


def _known(block: Block) -> dict[str, str]:
    """Linear layers of a block whose part is known."""
    found: dict[str, str] = {}
    for site in block.sites:
        makers = [own.module for own in (site.q, site.k, site.v) if own is not None]
        kinds = ("q", "k", "v") if len(set(makers)) == 3 else ("qkv",) * len(makers)
        found |= dict(zip(makers, kinds, strict=True))
        if site.out is not None:
            found[site.out] = "o"
    return found | {writer.last: "down" for writer in block.writers if writer.last is not None}


def _outside(anatomy: Anatomy, name: str) -> Place:
    for path in (anatomy.projector_weights, *anatomy.deepstack.values()):
        if _under(name, path):
            return Place("projector", "projector", None, 0, _inside(name, path, "projector"))
    for path, address, section in (
        (anatomy.embed, "embed", "embeddings"),
        (anatomy.final_norm, "ln_final", "norm"),
        (anatomy.unembed, "unembed", "head"),
        (anatomy.vision.path, "vision", "vision"),
    ):
        if _under(name, path):
            return Place(address, section, None, None, _inside(name, path, address))
    raise FrankenlensError(
        f"{name} is in no part of the model that hooks.anatomy knows; only its towers, projector, embedding, final "
        "norm and unembedding are compared."
    )


def _inside(name: str, path: str, whole: str) -> str:
    module, _, leaf = name.removeprefix(path + ".").rpartition(".")
    return (module or whole) + ("_bias" if leaf == "bias" else "")


def _under(name: str, path: str) -> bool:
    return name.startswith(path + ".")
