"""Every hook point of the six families, computed with plain PyTorch from the bare Hugging Face model.

Written from the models' own source, without the package under test: projections, norms and blocks are tapped by
forward hooks placed here; rotations, masks, scores, patterns, per-head results and residual sums are worked out
explicitly, so that a tap in the wrong place shows up as a difference.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """One transformer block: its modules and the geometry of its attention."""

    block: nn.Module
    attn: Any
    qkv: tuple[nn.Module, ...]
    """Three projections, or one whose output is q, k, v in a row."""
    out: Any
    norm_mlp: nn.Module
    mlp: nn.Module
    down: Any
    n_heads: int
    n_kv_heads: int
    d_head: int


@dataclass(frozen=True)
class Parts:
    """Where one family keeps what the hook points name."""

    language: nn.Module
    text: tuple[Block, ...]
    final_norm: nn.Module
    tower: nn.Module
    vision: tuple[Block, ...]
    projector: nn.Module
    deepstack: tuple[nn.Module, ...] = ()


def _text_block(layer: Any, config: Any) -> Block:
    attn = layer.self_attn
    return Block(
        layer,
        attn,
        (attn.q_proj, attn.k_proj, attn.v_proj),
        attn.o_proj,
        layer.post_attention_layernorm,
        layer.mlp,
        layer.mlp.down_proj,
        config.num_attention_heads,
        config.num_key_value_heads,
        attn.head_dim,
    )


def _qwen_vision_block(layer: Any, config: Any) -> Block:
    down = next(getattr(layer.mlp, n) for n in ("down_proj", "fc2", "linear_fc2") if hasattr(layer.mlp, n))
    attn, n = layer.attn, config.num_heads
    return Block(layer, attn, (attn.qkv,), attn.proj, layer.norm2, layer.mlp, down, n, n, attn.head_dim)


def _vit_block(layer: Any, config: Any) -> Block:
    attn, n = layer.self_attn, config.num_attention_heads
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    return Block(
        layer,
        attn,
        projections,
        attn.out_proj,
        layer.layer_norm2,
        layer.mlp,
        layer.mlp.fc2,
        n,
        n,
        attn.head_dim,
    )


def parts(model: Any, family: str) -> Parts:
    """The modules of a tiny model of `family`."""
    core, text, vision = model.model, model.config.text_config, model.config.vision_config
    if family.startswith("qwen"):
        language, tower = core.language_model, core.visual
        blocks = tuple(_qwen_vision_block(layer, vision) for layer in tower.blocks)
        projector, deepstack = tower, tuple(getattr(tower, "deepstack_merger_list", ()))
    elif family == "llava":
        language, tower, deepstack = core.language_model, core.vision_tower, ()
        encoder = getattr(tower, "vision_model", tower).encoder
        blocks = tuple(_vit_block(layer, vision) for layer in encoder.layers)
        projector = core.multi_modal_projector
    else:
        language, tower, deepstack = core.text_model, core.vision_model, ()
        blocks = tuple(_vit_block(layer, vision) for layer in tower.encoder.layers)
        projector = core.connector
    layers = tuple(_text_block(layer, text) for layer in language.layers)
    return Parts(language, layers, language.norm, tower, blocks, projector, deepstack)


class Taps:
    """Plain forward hooks that keep what went into and came out of modules, by module, during one forward pass."""

    def __init__(self, *modules: nn.Module):
        self.args: dict[nn.Module, tuple[Any, ...]] = {}
        self.kwargs: dict[nn.Module, dict[str, Any]] = {}
        self.out: dict[nn.Module, Any] = {}
        self._handles = [m.register_forward_hook(self._keep, with_kwargs=True) for m in modules]

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert module not in self.out, f"{type(module).__name__} ran twice in one forward pass"
        first = output[0] if isinstance(output, tuple) else output
        self.args[module], self.kwargs[module] = (
            tuple(a.clone() if torch.is_tensor(a) else a for a in args),
            kwargs,
        )
        self.out[module] = first.clone() if torch.is_tensor(first) else first.pooler_output.clone()

    def hidden(self, module: nn.Module) -> Tensor:
        """The hidden states a module was given, by position or by name."""
        return self.args[module][0] if self.args[module] else self.kwargs[module]["hidden_states"]

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def heads(x: Tensor, n: int) -> Tensor:
    """[..., n * d_head] -> [..., n, d_head]."""
    return x.reshape(*x.shape[:-1], n, -1)


def rms(x: Tensor, norm: Any) -> Tensor:
    """Root-mean-square norm over the last axis, written out."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def scores_of(q: Tensor, k: Tensor, allowed: Tensor) -> Float[Tensor, "... head query key"]:
    """Scaled and masked dot products of q [... query head d] and k [... key kv_head d]; -inf where not allowed."""
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf"))


def mix(pattern: Tensor, v: Tensor) -> Tensor:
    """Values [... key kv_head d] weighted by a pattern [... head query key]: z [... query head d]."""
    v = v.repeat_interleave(pattern.shape[-3] // v.shape[-2], dim=-2)
    return torch.einsum("...hqk,...khd->...qhd", pattern, v)


def result_of(z: Tensor, out: Any) -> Tensor:
    """Each head's own part of the attention output, [... head d_model], without the bias."""
    weight = out.weight.reshape(out.weight.shape[0], z.shape[-2], z.shape[-1])
    return torch.einsum("...hd,mhd->...hm", z, weight)


def text_allowed(attention_mask: Tensor) -> Bool[Tensor, "batch 1 query key"]:
    """Causal, and no attention to padding."""
    n = attention_mask.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]


def window_ids(grid: Tensor, merge: int, side: int) -> list[int]:
    """Window of every patch in the tower's order: windows of `side` x `side` merged tokens, row by row per image."""
    ids: list[int] = []
    window = 0
    for frames, height, width in grid.tolist():
        assert frames == 1, "images only"
        rows, columns = height // merge, width // merge
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                size = min(side, rows - top) * min(side, columns - left) * merge**2
                ids += [window] * size
                window += 1
    return ids


def vision_allowed(model: Any, family: str, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    """Which keys a patch may attend to: packed [patch patch] for Qwen, [image 1 patch patch] otherwise."""
    config = model.config.vision_config
    if family.startswith("qwen"):
        grid = inputs["image_grid_thw"]
        if family == "qwen2_5_vl" and layer not in config.fullatt_block_indexes:
            side = config.window_size // config.patch_size // config.spatial_merge_size
            ids = torch.tensor(window_ids(grid, config.spatial_merge_size, side))
        else:
            ids = torch.repeat_interleave(torch.arange(len(grid)), grid.prod(-1))
        return ids[:, None] == ids[None, :]
    pixels = inputs["pixel_values"]
    side = config.image_size // config.patch_size
    if family == "llava":
        return torch.ones(len(pixels), 1, 1, side**2 + 1, dtype=torch.bool)
    real = pixels.flatten(0, 1).flatten(1).any(-1)
    seen = inputs["pixel_attention_mask"].flatten(0, 1)[real].bool()
    patches = seen.reshape(-1, side, config.patch_size, side, config.patch_size).any(4).any(2)
    return patches.flatten(1)[:, None, None, :]


def _rotate(block: Block, taps: Taps, q: Tensor, k: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Norm q and k where the block does, and rotate them with the model's own function and angles."""
    source = sys.modules[type(block.attn).__module__]
    if hasattr(block.attn, "q_norm"):
        q, k = rms(q, block.attn.q_norm), rms(k, block.attn.k_norm)
    cos, sin = taps.kwargs[block.attn]["position_embeddings"]
    if packed:
        return source.apply_rotary_pos_emb_vision(q, k, cos, sin)
    q, k = source.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _block_points(block: Block, taps: Taps, allowed: Tensor, rotary: bool, packed: bool) -> dict[str, Tensor]:
    projected = [taps.out[p] for p in block.qkv]
    q, k, v = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
    q, k, v = heads(q, block.n_heads), heads(k, block.n_kv_heads), heads(v, block.n_kv_heads)
    points = {"attn.hook_q": q, "attn.hook_k": k, "attn.hook_v": v}
    if rotary:
        q, k = _rotate(block, taps, q, k, packed)
        points |= {"attn.hook_rot_q": q, "attn.hook_rot_k": k}
    scores = scores_of(q, k, allowed)
    pattern = scores.softmax(-1, dtype=torch.float32)
    z = mix(pattern, v)
    pre, attn_out, mlp_out = taps.hidden(block.block), taps.out[block.attn], taps.out[block.mlp]
    return points | {
        "attn.hook_attn_scores": scores,
        "attn.hook_pattern": pattern,
        "attn.hook_z": z,
        "attn.hook_result": result_of(z, block.out),
        "hook_attn_out": attn_out,
        "hook_mlp_out": mlp_out,
        "mlp.hook_post": taps.args[block.down][0],
        "hook_resid_pre": pre,
        "hook_resid_mid": pre + attn_out,
        "hook_resid_post": pre + attn_out + mlp_out,
    }


@torch.no_grad()
def reference(model: Any, family: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> value of every hook point for one forward pass of the bare model.

    Rows of the text tower that are padding carry no meaning (a fully masked row has no pattern): compare real rows.
    """
    where = parts(model, family)
    modules = [where.language, where.final_norm, where.projector, *where.deepstack]
    for block in (*where.text, *where.vision):
        modules += [block.block, block.attn, *block.qkv, block.out, block.norm_mlp, block.mlp, block.down]
    language_in: dict[str, Tensor] = {}

    def keep_embeds(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        language_in["embeds"] = kwargs["inputs_embeds"].clone()

    handle = where.language.register_forward_pre_hook(keep_embeds, with_kwargs=True)
    with Taps(*(m for m in modules if m is not where.language)) as taps:
        model(**inputs)
    handle.remove()

    points = {
        "hook_embed": language_in["embeds"],
        "ln_final.hook_normalized": taps.out[where.final_norm],
        "projector.hook_out": taps.out[where.projector],
    }
    points |= {f"blocks.{i}.hook_deepstack": taps.out[merger] for i, merger in enumerate(where.deepstack)}
    allowed = text_allowed(inputs["attention_mask"])
    for i, block in enumerate(where.text):
        values = _block_points(block, taps, allowed, rotary=True, packed=False)
        points |= {f"blocks.{i}.{name}": value for name, value in values.items()}
    packed = family.startswith("qwen")
    for i, block in enumerate(where.vision):
        allowed = vision_allowed(model, family, inputs, i)
        values = _block_points(block, taps, allowed, rotary=packed, packed=packed)
        points |= {f"vision.blocks.{i}.{name}": value for name, value in values.items()}
    return points


def tolerance(*values: Tensor) -> float:
    """1e-5 of the largest finite magnitude, and at least 1e-5."""
    finite = [v[v.isfinite()].abs().max().item() for v in values if v.isfinite().any()]
    return 1e-5 * max(1.0, *finite) if finite else 1e-5


def of_one_block(names: Iterable[str]) -> list[str]:
    """The points outside the blocks and those of block 1 of both towers: one of each kind."""
    return [name for name in names if "blocks." not in name or "blocks.1." in name]
