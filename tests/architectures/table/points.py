"""Every offered point, read and written, against plain hooks: one cell of the table for each kind of point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooks import HookedVLM
from hooks.points import HookPoint
from tests.architectures.table import plain, plain_experts
from tests.architectures.table.bench import SHAKES, shaken
from tests.architectures.table.cells import ABSENT, FAILS, YES, Cell, finite, within

KINDS = (
    "stream",
    "writers",
    "mixer",
    "cross-attention",
    "attention",
    "pattern",
    "q k v",
    "z / result",
    "neurons",
    "experts",
    "final norm",
    "vision",
    "projector",
)
_OF_LEAF = {
    "hook_embed": "stream",
    "hook_mixer_out": "mixer",
    "hook_cross_attn_out": "cross-attention",
    "hook_pattern": "pattern",
    "hook_z": "z / result",
    "hook_result": "z / result",
    "hook_post": "neurons",
    "hook_normalized": "final norm",
    "hook_deepstack": "projector",
} | dict.fromkeys(("hook_q", "hook_k", "hook_v"), "q k v")
LARGE = 100
"""How much larger than what is allowed to differ the effect of a write must be."""


@dataclass
class Proof:
    """What was found at one point: how far reading and writing are off, and how large the effect of the write is."""

    read: float = 0.0
    write: float = 0.0
    effect: float = 0.0
    faults: list[str] = field(default_factory=list)


def kind_of(point: HookPoint) -> str:
    """The column that a point belongs to."""
    if point.name.startswith(("vision.", "tower_")):
        return "vision"
    if point.name.startswith("projector."):
        return "projector"
    if ".cross_attn." in point.name:
        return "cross-attention"
    if point.leaf in _OF_LEAF:
        return _OF_LEAF[point.leaf]
    if point.leaf.startswith("hook_resid"):
        return "stream"
    if "expert" in point.leaf or "router" in point.leaf or "shared" in point.leaf:
        return "experts"
    if point.leaf.startswith("hook_mixer_out"):
        return "mixer"
    if point.leaf.startswith("hook_cross_attn_out"):
        return "cross-attention"
    return "writers" if "_out" in point.leaf else "attention"


@torch.no_grad()
def prove(vlm: HookedVLM, inputs: Mapping[str, Tensor], bare: Tensor) -> dict[str, Proof]:
    """Every offered point by name."""
    points = vlm.hook_points
    paths = {point.module for point in points.values()}
    paths |= {str(point.key) for point in points.values() if point.place == "rest"}
    seen = plain.look(vlm.model, inputs, paths)
    cache = _read(vlm, inputs)
    proofs = {name: Proof() for name in points}
    for name, point in points.items():
        proof, own = proofs[name], cache[name]
        of_experts = point.place in plain_experts.PLACES
        expected = (plain_experts if of_experts else plain).read(vlm, point, seen)
        if expected is not None:
            _compare_read(proof, point, own, expected, _lead(vlm, cache, point))
        _write(vlm, point, inputs, bare, seen, proof)
    return proofs


def _read(vlm: HookedVLM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every point's value. Scores and patterns, for which attention is worked out in another way, are read module by
    module, so that no later layer is given what was rounded otherwise."""
    dense: dict[str, list[str]] = {}
    for name, point in vlm.hook_points.items():
        if point.leaf in ("hook_attn_scores", "hook_pattern"):
            dense.setdefault(point.module, []).append(name)
    inside = {name for names in dense.values() for name in names}
    found: dict[str, Tensor] = {}
    for names in ([name for name in vlm.hook_points if name not in inside], *dense.values()):
        _, cache = vlm.run_with_cache(inputs, names, use_cache=False)
        found |= {name: cache[name] for name in names}
    return found


def _lead(vlm: HookedVLM, cache: Mapping[str, Tensor], point: HookPoint) -> tuple[int, ...]:
    """How the tokens of a point's block lie: the axes of its stream but for the width and those of parallel streams."""
    if point.layer is None:
        return ()
    stream = f"{point.tower}blocks.{point.layer}.hook_resid_pre"
    axes = vlm.hook_points[stream].axes
    return tuple(size for axis, size in zip(axes[:-1], cache[stream].shape, strict=False) if axis != "stream")


def _compare_read(
    proof: Proof, point: HookPoint, own: Tensor, expected: Tensor, lead: tuple[int, ...]
) -> None:
    if point.place == "expert_out" and expected.ndim == 2:
        own = own.sum(-2)
    if (
        point.relaid or point.experts is not None
    ):  # tokens in a row, or an axis of one, are shown as the stream's are
        behind = expected.shape[expected.ndim - (own.ndim - len(lead)) :]
        expected = expected.reshape(*lead, *behind)
    elif point.place == "attention" and len(lead) == 1:  # packed towers have no batch axis
        expected = expected.squeeze(0)
    if own.shape != expected.shape:
        proof.faults.append(f"read {tuple(own.shape)} where plain hooks see {tuple(expected.shape)}")
        return
    expected = expected.to(own.dtype)
    if point.leaf == "hook_attn_scores":  # what is hidden may be -inf or very low
        seen = (own > -1e30) & (expected > -1e30)
        own, expected = own[seen], expected[seen]
    proof.read = within(own, expected)
    if not proof.read <= 1.0:
        proof.faults.append(f"read is {proof.read:.1e} times what is allowed off plain hooks")


def _write(
    vlm: HookedVLM,
    point: HookPoint,
    inputs: Mapping[str, Tensor],
    bare: Tensor,
    seen: plain.Seen,
    proof: Proof,
) -> None:
    def change(value: Tensor, hook: object) -> Tensor:
        if point.leaf != "hook_attn_scores":
            return -value
        new = value.clone()
        new[..., 0] += plain.SHIFT
        return new

    ours = vlm.run_with_hooks(inputs, [(point.name, change)], use_cache=False).logits
    again = vlm.run_with_hooks(
        inputs, [(point.name, lambda value, hook: value.clone())], use_cache=False
    ).logits
    keep = finite(bare)
    if point.place in plain_experts.PLACES:
        theirs = plain_experts.written(vlm, point, inputs)
    else:
        theirs = plain.written(vlm, point, inputs, seen)
    proof.effect = within(ours[keep], bare[keep])
    back = within(again[keep], bare[keep])
    if not back <= 1.0:
        proof.faults.append(f"its own value written back moves the logits {back:.1e} times what is allowed")
    if theirs is not None:
        proof.write = within(ours[keep], theirs[keep])
        if not proof.write <= 1.0:
            proof.write /= max(1.0, _rounding(vlm, inputs, point, change, ours))
        if not proof.write <= 1.0:
            proof.faults.append(f"written logits are {proof.write:.1e} times what is allowed off plain hooks")
    if not proof.effect >= LARGE:
        proof.faults.append(f"negating it moves the logits by {proof.effect:.1e} times what is allowed only")


def _rounding(
    vlm: HookedVLM, inputs: Mapping[str, Tensor], point: HookPoint, change: Any, ours: Tensor
) -> float:
    """How far logits move, at most, when every block's input is off by one step of its rounding, in units of what is
    allowed; four times."""
    streams = [name for name in vlm.hook_points if name.endswith("hook_resid_pre")]
    keep, moved = finite(ours), []
    for seed in range(SHAKES):
        shake = shaken(torch.Generator().manual_seed(seed))
        hooks = [*((name, shake) for name in streams), (point.name, change)]
        logits = vlm.run_with_hooks(inputs, hooks, use_cache=False).logits
        moved.append(within(logits[keep], ours[keep]))
    return 4 * max(moved)


def cells(vlm: HookedVLM, proofs: Mapping[str, Proof]) -> dict[str, Cell]:
    """The proofs by kind of point; what is not offered, with the reason."""
    found = {}
    for kind in KINDS:
        own = {name: proof for name, proof in proofs.items() if kind_of(vlm.hook_points[name]) == kind}
        wrong = {name: proof for name, proof in own.items() if proof.faults}
        if wrong:
            name, proof = next(iter(wrong.items()))
            found[kind] = Cell(FAILS, f"{name}: {proof.faults[0]} ({len(wrong)} of {len(own)} points)")
        elif own:
            number = max(max(proof.read, proof.write) for proof in own.values())
            found[kind] = Cell(YES, _where(vlm, kind, own), number, len(own))
        else:
            found[kind] = Cell(ABSENT, why_absent(vlm, kind))
    return found


def _where(vlm: HookedVLM, kind: str, own: Mapping[str, Proof]) -> str:
    """The decoder's blocks that have it, where it is not all of them."""
    if kind in ("vision", "projector", "final norm"):
        return ""
    there = {layer for name in own if (layer := vlm.hook_points[name].layer) is not None}
    if not there or len(there) == vlm.n_layers:
        return ""
    return f"in blocks {', '.join(map(str, sorted(there)))} of 0-{vlm.n_layers - 1}"


def why_absent(vlm: HookedVLM, kind: str) -> str:
    """Why a model offers no point of a kind, in one sentence."""
    told = [why for name, why in vlm.absent.items() if _kind_of_name(name) == kind]
    if told:
        return told[0]
    anatomy = vlm.anatomy
    blocks = anatomy.text.blocks
    sites = [site for block in blocks for site in block.sites if not site.cross]
    moe = any(block.writer("moe") for block in blocks)
    reasons = {
        "mixer": "all its blocks attend",
        "cross-attention": "no block reads another tower",
        "attention": "no block calls the attention interface of transformers",
        "pattern": "no block calls the attention interface of transformers",
        "q k v": "no projection makes exactly its queries, keys or values"
        if sites
        else "no block calls the attention interface of transformers",
        "z / result": "no block calls the attention interface of transformers",
        "neurons": "no block has a dense MLP whose last layer is known",
        "experts": "single experts have no points yet" if moe else "no mixture of experts",
        "final norm": anatomy.absent.get("ln_final", ""),
        "projector": anatomy.absent.get("projector", ""),
        "vision": "no image"
        if "no image" in anatomy.absent.get("projector", "")
        else "no tower of vision blocks",
        "writers": next((block.why for block in blocks if block.why), ""),
    }
    return reasons.get(kind) or "not found"


def _kind_of_name(name: str) -> str:
    """The column of a point that is absent, from its name alone."""
    return kind_of(HookPoint(name, "", "output", ()))
