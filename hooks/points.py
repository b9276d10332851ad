"""The hook-point table: every named tensor of a forward pass, where it lives, and how it is shaped.

Patches of a vision block stand in the order in which the tower itself has them: Qwen2.5-VL keeps them sorted by window
inside its blocks; `projector.hook_out` is in the order of the image tokens again.

This one table drives our own engine (`hooks.engine`) and whatever else must find the same tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hooks.anatomy import Anatomy, Block, Tower

Place = Literal["input", "output", "attention", "result"]


@dataclass(frozen=True)
class HookPoint:
    """One tensor of a forward pass.

    Attributes:
        name: TransformerLens's name, prefixed by `vision.` in the vision tower.
        module: path of the module that holds it.
        place: the module's "input" or "output", inside its "attention", or the per-head "result" of an output
            projection.
        key: keyword of the input, field of the output, or None for the first positional / the tensor itself.
        heads: number of heads that the last axis is split into (None: not split).
        part: which third of a fused q/k/v output this is (None: the whole tensor).
        axes: names of the axes that a hook function sees.
        inplace: a new value is copied into the tensor itself, because the residual branch holds the same tensor.
    """

    name: str
    module: str
    place: Place
    axes: tuple[str, ...]
    key: str | None = None
    heads: int | None = None
    part: int | None = None
    inplace: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name, e.g. "hook_pattern"."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The block's index, None outside the blocks."""
        parts = self.name.split(".")
        return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None


def hook_point_table(anatomy: Anatomy) -> dict[str, HookPoint]:
    """Every hook point of a model in the order of the forward pass, by name."""
    points = [*_vision(anatomy), *_text(anatomy)]
    return {point.name: point for point in points}


def _vision(anatomy: Anatomy) -> Iterator[HookPoint]:
    lead = ("patch",) if anatomy.vision.packed else ("image", "patch")
    for layer, block in enumerate(anatomy.vision.blocks):
        yield from _block(f"vision.blocks.{layer}", block, lead, anatomy.vision)
    axes = ("image_token", "d_model") if anatomy.projector_key else ("image", "image_token", "d_model")
    yield HookPoint("projector.hook_out", anatomy.projector, "output", axes, key=anatomy.projector_key)
    for layer, path in enumerate(anatomy.deepstack):
        # Qwen3-VL adds these to resid_post[layer] at image tokens: resid_pre[layer + 1] is the sum.
        yield HookPoint(f"blocks.{layer}.hook_deepstack", path, "output", ("image_token", "d_model"))


def _text(anatomy: Anatomy) -> Iterator[HookPoint]:
    resid = ("batch", "pos", "d_model")
    yield HookPoint("hook_embed", anatomy.text.path, "input", resid, key="inputs_embeds")
    for layer, block in enumerate(anatomy.text.blocks):
        yield from _block(f"blocks.{layer}", block, ("batch", "pos"), anatomy.text)
    yield HookPoint("ln_final.hook_normalized", anatomy.final_norm, "output", resid)


def _block(name: str, block: Block, lead: tuple[str, ...], tower: Tower) -> Iterator[HookPoint]:
    d_model = "d_model" if lead == ("batch", "pos") else "d_vision"
    resid, batch = (*lead, d_model), lead[:-1]
    yield HookPoint(f"{name}.hook_resid_pre", block.path, "input", resid, key="hidden_states")
    for part, letter in enumerate("qkv"):
        heads, axis = (block.n_heads, "head") if letter == "q" else (block.n_kv_heads, "kv_head")
        module, third = (block.qkv[part], None) if len(block.qkv) == 3 else (block.qkv[0], part)
        axes = (*lead, axis, "d_head")
        yield HookPoint(f"{name}.attn.hook_{letter}", module, "output", axes, heads=heads, part=third)
    if block.rotary:
        yield HookPoint(f"{name}.attn.hook_rot_q", block.attention, "attention", (*lead, "head", "d_head"))
        key_axes = (*batch, "key", "kv_head", "d_head")
        yield HookPoint(f"{name}.attn.hook_rot_k", block.attention, "attention", key_axes)
    square = (*batch, "head", "query", "key")
    yield HookPoint(f"{name}.attn.hook_attn_scores", block.attention, "attention", square)
    yield HookPoint(f"{name}.attn.hook_pattern", block.attention, "attention", square)
    z = (*lead, "head", "d_head")
    yield HookPoint(f"{name}.attn.hook_z", block.out, "input", z, heads=block.n_heads)
    yield HookPoint(
        f"{name}.attn.hook_result", block.out, "result", (*lead, "head", d_model), heads=block.n_heads
    )
    yield HookPoint(f"{name}.hook_attn_out", block.attention, "output", resid)
    yield HookPoint(f"{name}.hook_resid_mid", block.mid_norm, "input", resid, inplace=True)
    yield HookPoint(f"{name}.mlp.hook_post", block.mlp_out, "input", (*lead, "d_mlp"))
    yield HookPoint(f"{name}.hook_mlp_out", block.mlp, "output", resid)
    yield HookPoint(f"{name}.hook_resid_post", block.path, "output", resid)
