"""Names: from those on disk to those of the model, and from those to addresses and places in the network."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __call__(self, key: str) -> str:
        """The model's name of a key.

        Raises:
            FrankenlensError: transformers would change the tensor itself.
        """
        where = (self._prefix, self._state)
        name, converted = rename_source_key(key, self._renamings, self._converters, *where)  # type: ignore[arg-type]
        if name not in self._state and key in self._state:
            name, converted = rename_source_key(key, [], [], *where)
        if converted is not None:
            raise FrankenlensError(
                f"{key} is stored in a layout that transformers converts at loading; load the model and save it with "
                "save_pretrained(folder, save_original_format=False) first."
            )
        return name


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
    for sub, path in (("attn", block.attention), ("mlp", block.mlp)):
        if _under(name, path):
            address += f".{sub}"
    unified = layer - len(anatomy.vision.blocks) if tower else layer + 1
    return Place(address, "vision" if tower else "decoder", layer, unified, _component(name, block))


def _component(name: str, block: Block) -> str:
    module, _, leaf = name.rpartition(".")
    kinds = ("q", "k", "v") if len(block.qkv) == 3 else ("qkv",)
    known = dict(zip(block.qkv, kinds, strict=True)) | {block.out: "o", block.mlp_out: "down"}
    if module in known:
        kind = known[module]
    elif not _under(name, block.attention) and not _under(name, block.mlp):
        kind = "ln2" if module == block.mid_norm else "ln1"
    else:
        last = module.rpartition(".")[2]
        kind = _COMPONENTS.get(last, last)
    return kind + ("_bias" if leaf == "bias" else "")


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
