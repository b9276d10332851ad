"""Proofs, on the very model that was opened, that a block's stream is the sum of what is read at its hook points.

Each equation holds at every entry to the rounding of that entry: so many steps of what was summed there, and never a
share of the largest number of the tensor, which in bfloat16 would allow nearly everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.anatomy import Block
from hooks.anatomy.precise import eps_of, within_rounding
from hooks.anatomy.watching import forward
from hooks.anatomy.writers import coefficient_of
from hooks.opened import Opened


@torch.no_grad()
def unequal(vlm: Opened, seen: Mapping[str, Sequence[Tensor]]) -> dict[str, str]:
    """Points of blocks whose stream is not the sum of what is read at them; a wrong place cannot be.

    Args:
        vlm: the opened model.
        seen: what stands at each point in one forward pass, call by call.
    """
    taps = {name: calls[-1] for name, calls in seen.items()}
    found: dict[str, str] = {}
    for prefix, tower in vlm.anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            name = f"{prefix}blocks.{layer}"
            ends = [f"{name}.hook_resid_{end}" for end in ("pre", "post")]
            writers = [point for point in vlm.hook_points if is_writer(point, name)]
            if not writers or any(point not in taps for point in (*ends, *writers)):
                continue
            pre, post = (taps[end] for end in ends)
            parts = [taps[point].reshape(pre.shape) for point in writers]
            if off := _off(post, [pre, *parts], coefficient_of(vlm.model, block.gain)):
                why = f"the stream of {name} is not the sum of what was read ({off})."
                found |= dict.fromkeys(writers, why)
            found |= _unlike_neurons(vlm, taps, name, block)
    return found


def _off(total: Float[Tensor, "..."], parts: Sequence[Float[Tensor, "..."]], gain: float | Tensor) -> str:
    """How far a stream is from a block's gain times a sum; "" where that is its rounding.

    Of n parts n - 1 sums are rounded, each part when it is scaled, the gain's product, and the whole.
    """
    factor = gain.double().to(total.device) if isinstance(gain, Tensor) else gain
    expected = sum(part.double() for part in parts) * factor
    size = sum(part.double().abs() for part in parts) * abs(factor)
    step = eps_of(total, *parts) / 2
    least = max(torch.finfo(part.dtype).tiny for part in (total, *parts))
    error = (total.double() - expected).abs()  # type: ignore[union-attr]
    if bool((error <= (len(parts) + 2) * (step * size + least)).all()):
        return ""
    return f"off by {error.max().item():.2e}"


def is_writer(point: str, block: str) -> bool:
    """Whether a point is of what a block adds to its stream."""
    leaf = point.removeprefix(f"{block}.")
    return (
        leaf != point and re.fullmatch(r"hook_(attn|cross_attn|mixer|mlp|rest)_out(_\d+)?", leaf) is not None
    )


@torch.no_grad()
def _unlike_neurons(vlm: Opened, taps: Mapping[str, Tensor], name: str, block: Block) -> dict[str, str]:
    """`hook_post` must be what the MLP's last layer reads."""
    writer, post, out = block.writer("mlp"), f"{name}.mlp.hook_post", f"{name}.hook_mlp_out"
    if writer is None or writer.last is None or writer.module != writer.body or writer.coefficient != 1.0:
        return {}
    if post not in taps or out not in taps:
        return {}
    last: Any = vlm.module(writer.last)
    expected = last.forward(taps[post])
    made = taps[out].reshape(expected.shape)
    if within_rounding(made.double() - expected.double(), expected.double().abs(), eps_of(expected)):
        return {}
    return {post: f"{writer.last} does not make the MLP's output of it."}


@torch.no_grad()
def split_from_the_stream(vlm: Opened, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Streams inside a block that, written, reach only what reads them there, and not the stream itself.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        names: the points that are sound so far.
    """
    inner = [name for name in names if ".hook_resid_mid" in name]
    if not inner:
        return {}
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Tensor] = {}

    def shifted(activation: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(activation.shape, generator=generator).to(activation)
        seen[hook.name] = activation + 0.1 * activation.std() * noise
        return seen[hook.name]

    def look(activation: Tensor, hook: Any) -> None:
        seen[hook.name] = activation.clone()

    blocks = {name.rpartition(".")[0] for name in inner}
    read = [name for name in names if name.rpartition(".")[0] in blocks and name not in inner]
    with vlm.hooks([*((name, shifted) for name in inner), *((name, look) for name in read)]):
        forward(vlm.model, inputs)
    return {name: why for name in inner if (why := _unreached(vlm, name, inner, seen))}


def _unreached(vlm: Opened, name: str, inner: Sequence[str], seen: Mapping[str, Tensor]) -> str:
    """Why the stream behind a block does not hold what was written inside it; "" where it does."""
    block, order = name.rpartition(".")[0], list(vlm.hook_points)
    after = [n for n in order[order.index(name) + 1 :] if is_writer(n, block)]
    end = f"{block}.hook_resid_post"
    if end not in seen or any(n not in seen for n in after):
        return ""
    if any(n.startswith(f"{block}.") and order.index(n) > order.index(name) for n in inner):
        return ""  # what is written there stands for everything before it
    own = vlm.anatomy.towers[block.rpartition("blocks.")[0]].blocks[int(block.rpartition(".")[2])]
    parts = [seen[name], *(seen[n].reshape(seen[name].shape) for n in after)]
    off = _off(seen[end], parts, coefficient_of(vlm.model, own.gain))
    return off and f"what is written here does not reach the stream behind the block ({off})."
