"""Names: from those of the model to addresses and places in the network."""

from __future__ import annotations

from dataclasses import dataclass

from hooks.anatomy import Anatomy, Block
from hooks.weights import part_paths

SECTIONS = ("vision", "projector", "embeddings", "decoder", "norm", "head", "rest")
_PARTS = ("attn", "cross_attn", "mixer", "mlp")
_COMPONENTS = {"gate_proj": "gate", "up_proj": "up", "fc1": "up", "linear_fc1": "up"}


@dataclass(frozen=True)
class Place:
    """Where a parameter is in the network.

    Attributes:
        address: the smallest component that holds it, as `hooks.address` names it.
        section: one of `SECTIONS`; "norm" is the final norm, the norms of blocks belong to their blocks; "rest" is what
            no other part holds, and further towers (an encoder, a second vision tower).
        layer: decoder layer or vision block, from 0; None elsewhere.
        unified: one index along the network: decoder layers from 0, like everywhere here, the projector -1, the n
            vision blocks -n-1..-2; None elsewhere. That of 2602.12395 is larger by 1.
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
    unified = {"decoder": layer, "vision": layer - len(anatomy.vision.blocks) - 1}.get(section)
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
            return Place("projector", "projector", None, -1, _inside(name, path, "projector"))
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
