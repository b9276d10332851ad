"""Many interventions on one batch, each continued from where it begins and all moved up the layers together.

A lane is a copy of the batch under one intervention. It joins at the layer, and starts at the token, where its
intervention begins: below and before that everything is the clean run's. Lanes with the same first token share every
matrix product from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hooks.engine import as_added, head_results
from hooks.plain import plain_weight
from hooks.uninterrupted import registered
from interp.metrics.logits import Logits
from interp.sweep.activations import activation_of
from interp.sweep.edits import Edit, Span
from interp.sweep.stored import StoredRun

Lane = tuple[int, Edit]
"""An intervention's number and its edit."""
Value = tuple[int, Logits | None]
"""An intervention's number and the logits under it at the run's columns; None where nothing has changed."""


def own_part(edit: Edit, in_turn: bool) -> str:
    """What of its own block a lane runs: all of it ("block"), all of it with the edit inside its attention ("inside"),
    the writer behind the edit ("second"), or nothing ("").
    """
    if edit.stage == "mid":
        return "second" if in_turn else ""
    return {"pre": "block", "inside": "inside"}.get(edit.stage or "", "")


@torch.no_grad()  # in its own steps: what is yielded to keeps its own mode
def run_lanes(run: StoredRun, lanes: Sequence[Lane], span: Span) -> Iterator[Value]:
    """Run lanes that all begin in the first column of `span`, all at once; inside `segments_on`.

    Args:
        run: the clean run.
        lanes: interventions; none may lie in the vision tower.
        span: from the first column that any of them touches to the last one that is read.
    """
    waiting = sorted(lanes, key=lambda lane: lane[1].start)
    riding: list[int] = []
    stream: Tensor | None = None
    n_layers = len(run.blocks)
    for layer in range(waiting[0][1].start[0] if waiting else 0, n_layers):
        here: dict[str, list[Lane]] = {"block": [], "inside": [], "second": [], "": []}
        while waiting and waiting[0][1].start[0] == layer:
            number, edit = waiting.pop(0)
            here[own_part(edit, run.halves[layer].in_turn)].append((number, edit))
        begun, unchanged = _begun(run, layer, here, span)
        for number in unchanged:
            yield number, None
        joined: list[Tensor] = []
        riding += [number for number, _ in begun["block"]]
        whole = [new for _, new in begun["block"]]
        if stream is not None or whole:
            stream = _together(whole if stream is None else [stream, *whole])
            joined.append(run.run_block(layer, stream, span))
        if here["inside"]:
            riding += [number for number, _ in here["inside"]]
            joined.append(_run_inside(run, layer, [edit for _, edit in here["inside"]], span))
        if begun["second"]:
            riding += [number for number, _ in begun["second"]]
            mids = _together([new for _, new in begun["second"]])
            joined.append(_run_mlp(run, layer, mids, span))
        riding += [number for number, _ in begun[""]]
        joined += [new for _, new in begun[""]]
        stream = _together(joined) if joined else None
        if stream is not None and layer in run.added:
            extra = run.added[layer][:, span.columns]
            stream = stream + extra.to(stream).repeat(len(stream) // len(extra), 1, 1)
    yield from _read(run, riding, stream, waiting, span)


def _begun(
    run: StoredRun, layer: int, here: Mapping[str, Sequence[Lane]], span: Span
) -> tuple[dict[str, list[tuple[int, Tensor]]], list[int]]:
    """What the lanes of this layer begin with, by `own_part`, and those that nothing changes in: they do not ride."""
    begun: dict[str, list[tuple[int, Tensor]]] = {"block": [], "second": [], "": []}
    unchanged: list[int] = []
    for part, lanes in begun.items():
        if not here[part]:
            continue
        own = {"block": run.pre, "second": run.mid, "": run.post}[part](layer, span)
        for number, edit in here[part]:
            if part == "block":
                new = _begin_pre(run, edit, own, span)
            elif part == "second":
                new = _begin_mid(run, layer, edit, own, span)
            else:
                new = _begin_post(run, layer, edit, own, span)
            if torch.equal(new, own):
                unchanged.append(number)
            else:
                lanes.append((number, new))
    return begun, unchanged


def _together(lanes: Sequence[Tensor]) -> Tensor:
    return lanes[0] if len(lanes) == 1 else torch.cat(list(lanes))


def _begin_pre(run: StoredRun, edit: Edit, own: Tensor, span: Span) -> Tensor:
    if edit.point.leaf != "hook_out":
        return edit.apply(own, span)
    whole = run.pre(0, Span(0, run.batch.roles.shape[1])).clone()
    features = run.read(edit.point.name)
    new = edit.apply(features, Span(0, features.shape[0]))
    whole[run.image_mask] = new.reshape(-1, new.shape[-1]).to(whole)
    return whole[:, span.columns]


def _begin_mid(run: StoredRun, layer: int, edit: Edit, own: Tensor, span: Span) -> Tensor:
    """The stream behind the first writer, which the second reads."""
    if edit.point.leaf == "hook_resid_mid":
        return edit.apply(own, span)
    old, new = _added(run, layer, edit, span)
    return own if torch.equal(new, old) else run.pre(layer, span) + new


def _begin_post(run: StoredRun, layer: int, edit: Edit, own: Tensor, span: Span) -> Tensor:
    if edit.point.leaf == "hook_resid_post":
        return edit.apply(own, span)
    old, new = _added(run, layer, edit, span)
    if torch.equal(new, old):
        return own
    return run.mid(layer, span) + new if run.halves[layer].in_turn else own + (new - old)


def _added(run: StoredRun, layer: int, edit: Edit, span: Span) -> tuple[Tensor, Tensor]:
    """What the edited writer adds to the stream in the clean run, and with the edit."""
    half, leaf = run.halves[layer], edit.point.leaf
    if leaf in ("hook_z", "hook_result"):
        assert half.first is not None
        old = run.read(half.point(half.first), span)
        return old, _of_heads(run, layer, edit, old, span)
    if leaf == "hook_post":
        assert half.second is not None
        old = run.read(half.point(half.second), span)
        return old, _of_neurons(run, layer, edit, old, span)
    if leaf == "hook_expert_out":
        assert half.second is not None
        old = run.read(half.point(half.second), span)
        mine = activation_of(run.vlm, lambda name: run.read(name, span), edit.point.name, edit.index)
        change = edit.alone(mine, span) - mine
        return old, old + (change if edit.index is not None else change.sum(-2)).to(old.dtype)
    old = run.read(edit.point.name, span)
    return old, edit.apply(old, span)


def _of_heads(run: StoredRun, layer: int, edit: Edit, old: Tensor, span: Span) -> Tensor:
    half, block = run.halves[layer], run.halves[layer].block
    assert half.first is not None
    out = run.vlm.module(block.out)
    z = run.read(f"blocks.{layer}.attn.hook_z", span)
    if edit.point.leaf == "hook_z":
        mixed = edit.apply(z, span)
        # a product of fewer columns may round differently
        return (
            old
            if torch.equal(mixed, z)
            else half.added(half.first, half.project(block.out, mixed.flatten(-2)))
        )
    if edit.index is not None and (weight := plain_weight(out)) is not None:
        own = weight.to(z.device).unflatten(1, (block.n_heads, -1))[:, edit.index]
        wide = torch.promote_types(z.dtype, torch.float32)
        mine = as_added(run.vlm.model, edit.point, z[:, :, edit.index].to(wide) @ own.T.to(wide))
        change = (_one_head(edit, mine, span) - mine).to(old.dtype)
    else:
        result = as_added(run.vlm.model, edit.point, head_results(out, z))
        change = (edit.apply(result, span) - result).sum(-2).to(old.dtype)
    if half.first.module == half.first.body:  # its factor is in the results
        return old + change
    return (
        half.added(half.first, half.project(block.out, z.flatten(-2)) + change) if bool(change.any()) else old
    )


def _of_neurons(run: StoredRun, layer: int, edit: Edit, old: Tensor, span: Span) -> Tensor:
    half, block = run.halves[layer], run.halves[layer].block
    assert half.second is not None
    down = run.vlm.module(block.mlp_out)
    post = run.read(f"blocks.{layer}.mlp.hook_post", span)
    weight = plain_weight(down) if edit.index is not None and half.adds_as_made(half.second) else None
    if weight is not None:
        mine = post[:, :, edit.index]
        assert edit.where is not None
        here = edit.where[:, span.columns].to(mine.device)
        change = torch.where(here, edit.new(mine, span).to(mine) - mine, 0)
        return old + change[..., None] * weight[:, edit.index].to(old)
    changed = edit.apply(post, span)
    return (
        old if torch.equal(changed, post) else half.added(half.second, half.project(block.mlp_out, changed))
    )


def _one_head(edit: Edit, mine: Tensor, span: Span) -> Tensor:
    """`edit.apply` without the other heads' results, which need not be computed."""
    assert edit.where is not None
    here = edit.where[:, span.columns, None].to(mine.device)
    return torch.where(here, edit.new(mine, span).to(mine), mine)


def _run_mlp(run: StoredRun, layer: int, mids: Tensor, span: Span) -> Tensor:
    if layer < len(run.blocks) - 1:
        return run.run_mlp(layer, mids)
    wanted = run.reads_within(span)
    after = mids.clone()
    after[:, wanted] = run.run_mlp(layer, mids[:, wanted])
    return after


def _run_inside(run: StoredRun, layer: int, edits: Sequence[Edit], span: Span) -> Tensor:
    """Lanes whose intervention lies inside attention: the block from its beginning, with the edits in it."""
    rows = len(run.batch)
    stream = run.pre(layer, span).repeat(len(edits), 1, 1)

    def tap(leaf: str, value: Tensor, place: str = "attention") -> Tensor:
        acts = [edit.point.leaf == leaf and edit.point.place == place for edit in edits]
        if not any(acts):
            return value
        parts = zip(edits, acts, value.split(rows), strict=True)
        return torch.cat([edit.apply(part, span) if on else part for edit, on, part in parts])

    leaves = {edit.point.leaf for edit in edits}
    dense = bool(leaves & {"hook_attn_scores", "hook_pattern"})
    tapped = [
        partial(run.vlm.module(point.module).register_forward_hook, _projection(point, tap))
        for point in {e.point for e in edits if e.point.place == "output"}
    ]
    with registered(*tapped):
        return run.run_block(layer, stream, span, tap, dense)


def _projection(point: Any, tap: Callable[[str, Tensor, str], Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return point.split.into(output, tap(point.leaf, point.split.of(output), point.place))

    return hook


def _read(
    run: StoredRun, riding: Sequence[int], stream: Tensor | None, final: Sequence[Lane], span: Span
) -> Iterator[Value]:
    """Logits at the columns that are read, those before the span being the clean run's."""
    rows, norm = len(run.batch), run.vlm.module(run.vlm.anatomy.final_norm)
    columns = run.reads_within(span)
    if riding:
        assert stream is not None
        for number, normed in zip(riding, norm(stream[:, columns]).split(rows), strict=True):
            yield number, run.logits_of(normed, span)
    for number, edit in final:
        own = norm(run.post(len(run.blocks) - 1, span))
        new = edit.apply(own, span)
        yield number, None if torch.equal(new, own) else run.logits_of(new[:, columns], span)
