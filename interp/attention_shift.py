"""Attention shift: how much reasoning tokens look at the image, per layer and head, in IN and in RL (2602.12395).

A(R -> V) of a head is the attention that each reasoning token R pays to all visual tokens V together, averaged over R:
the *mass*. Divided by the number of visual tokens it is the *mean* weight of one. The paper prints the mean; its figure
shows the mass. Both are given.

Each model reads its own traces and the other's, which tells what changed in the model from what changed in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.engine import HookContext, HookFunction
from interp.examples import Example
from interp.generation import greedy
from interp.pair import Pair
from interp.prompts import Prompt, collate
from interp.statistics import adjust, bootstrap_difference, bootstrap_mean, sign_flip

MODELS = ("in", "rl")
TRACES = ("own", "in", "rl")
"""Whose traces are read: each model its own, both IN's, or both RL's."""


def attention_shift(
    pair: Pair,
    examples: Sequence[Example],
    *,
    target: str = "reasoning",
    source: str = "image",
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Attention mass from the target's to the source's tokens, of both models on both models' greedy traces.

    No attention matrix is kept: each is summed up in its own layer.

    Args:
        pair: IN and RL.
        examples: what is asked.
        target: role of the queries.
        source: role of the keys.
        max_new_tokens: longest trace.
        batch_size: prompts that run together.
        progress: show bars.

    Returns:
        mass [model trace layer head example], n_target and n_source [trace example] (tokens), why [trace example] (""
        where the trace counts). NaN where a trace does not parse or holds no such tokens.

    Raises:
        FrankenlensError: no examples, or an unknown role.
    """
    if not examples:
        raise FrankenlensError("attention_shift needs at least one example")
    prompts = [pair.builder.build(example) for example in examples]
    models = {name: pair.models[name] for name in MODELS}
    blocks = pair.in_.anatomy.text.blocks
    mass = np.full((2, 2, len(blocks), blocks[0].n_heads, len(prompts)), np.nan)
    counts = np.zeros((2, 2, len(prompts)), dtype=int)
    why = np.full((2, len(prompts)), "", dtype=object)
    for t, written_by in enumerate(models.values()):
        written = greedy(written_by, prompts, max_new_tokens, 2 * batch_size, progress)
        traces = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
        batch = collate(traces)
        for role, end in ((target, 0), (source, 1)):
            counts[end, t] = batch.mask(role).sum(1).numpy()
        why[t] = [_why(trace, *counts[:, t, row].tolist()) for row, trace in enumerate(traces)]
        rows = [row for row in range(len(traces)) if not why[t, row]]
        for m, vlm in enumerate(models.values()):
            found = attention_mass(vlm, [traces[row] for row in rows], target, source, batch_size, progress)
            mass[m, t, :, :, rows] = np.moveaxis(found, -1, 0)
    return xr.Dataset(
        {
            "mass": (("model", "trace", "layer", "head", "example"), mass),
            "n_target": (("trace", "example"), counts[0]),
            "n_source": (("trace", "example"), counts[1]),
            "why": (("trace", "example"), why.astype(str)),
        },
        coords={
            "model": list(MODELS),
            "trace": list(MODELS),
            "layer": np.arange(len(blocks)),
            "head": np.arange(blocks[0].n_heads),
            "example": [example.id for example in examples],
        },
        attrs={"target": target, "source": source, "units": "share of a query's attention"},
    )


@torch.no_grad()
def attention_mass(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    target: str,
    source: str,
    batch_size: int = 16,
    progress: bool = False,
) -> Float[np.ndarray, "layer head example"]:
    """Attention from a token of role `target` to all tokens of role `source` together, averaged over the former.

    NaN for prompts without tokens of role `target`.
    """
    layers, heads = vlm.n_layers, vlm.n_heads
    mass = np.full((layers, heads, len(prompts)), np.nan)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    starts = range(0, len(order), batch_size)
    for first in tqdm(starts, desc="attention", disable=not progress, delay=1):
        rows = order[first : first + batch_size]
        batch = collate([prompts[row] for row in rows]).to(vlm.device)
        seen: dict[int, Float[Tensor, "batch head"]] = {}
        hook = _summing(batch.mask(target), batch.mask(source), seen)
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(layers)]
        vlm.run_with_hooks(batch.inputs, [(name, hook) for name in names], use_cache=False)
        for layer in range(layers):
            mass[layer][:, rows] = seen[layer].T.cpu().numpy()
    return mass


def _summing(
    queries: Bool[Tensor, "batch q"], keys: Bool[Tensor, "batch k"], seen: dict[int, Tensor]
) -> HookFunction:
    def add_up(pattern: Tensor, hook: HookContext) -> None:
        wide = pattern.float() if pattern.dtype in (torch.float16, torch.bfloat16) else pattern
        to_source = torch.einsum("bhqk,bk->bhq", wide, keys.to(wide))
        mask = queries.to(wide)
        layer = hook.layer()
        assert layer is not None
        seen[layer] = torch.einsum("bhq,bq->bh", to_source, mask) / mask.sum(1)[:, None]

    return add_up


def _why(trace: Prompt, n_target: int, n_source: int) -> str:
    read = trace.trace
    if not read.ok:
        return f"the trace does not parse: {read.why}"
    if not n_target:
        return "the trace has no tokens of the target's role"
    return "" if n_source else "the prompt has no tokens of the source's role"


def shift(
    found: xr.Dataset,
    traces: str = "own",
    *,
    per: str = "layer",
    measure: str = "mass",
    correction: str = "holm",
    **settings,
) -> pd.DataFrame:
    """RL - IN per layer (mean over heads) or per head, paired by example.

    Args:
        found: what `attention_shift` returns.
        traces: of `TRACES`.
        per: "layer" or "head".
        measure: "mass" or "mean" (mass / number of the source's tokens).
        correction: of the p values, over all rows: "holm" or "bh".
        settings: as in `interp.statistics.bootstrap_ratio`.

    Returns:
        Columns layer, head (-1: mean over heads), in, rl, difference, low, high, p (sign flips), p_corrected, n.

    Raises:
        FrankenlensError: another choice.
    """
    for given, choices in ((traces, TRACES), (per, ("layer", "head")), (measure, ("mass", "mean"))):
        if given not in choices:
            raise FrankenlensError(f"{given!r} is none of {', '.join(choices)}")
    sides = []
    for model in MODELS:
        of = model if traces == "own" else traces
        values = found["mass"].sel(model=model, trace=of)
        values = values / found["n_source"].sel(trace=of) if measure == "mean" else values
        values = values.mean("head") if per == "layer" else values.stack(cell=("layer", "head"))
        sides.append(values.transpose(..., "example").to_numpy())
    before, after = sides
    difference = bootstrap_difference(after, before, **settings)
    ends = [bootstrap_mean(np.where(np.isnan(after + before), np.nan, side)).value for side in sides]
    heads = found.sizes["head"]
    layers = found["layer"].to_numpy()
    p = np.array([sign_flip(a, b) for a, b in zip(after, before, strict=True)])
    return pd.DataFrame(
        {
            "layer": layers if per == "layer" else np.repeat(layers, heads),
            "head": -1 if per == "layer" else np.tile(found["head"].to_numpy(), len(layers)),
            "in": ends[0],
            "rl": ends[1],
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": p,
            "p_corrected": adjust(p, correction),
            "n": difference.n,
        }
    )
