"""Attention shift: how much reasoning tokens look at the image, per layer and head, in IN and in RL (2602.12395).

A(R -> V) of a head is the attention that each reasoning token R pays to all visual tokens V together, averaged over R:
the *mass*. Divided by the number of visual tokens it is the *mean* weight of one. The paper prints the mean; its figure
shows the mass. Both are given.

Each model reads its own traces and the other's, which tells what changed in the model from what changed in the text.
Beside them stand models that learnt nothing (`interp.decision.null_changes`), on the same shared traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import fitting, forward_bytes, in_parts, scores_bytes
from hooks.engine import HookContext, HookFunction
from interp.decision import Change, changed_weights
from interp.metrics.logits import sparing_logits
from interp.pair.elsewhere import Traces, at_least_as_long
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import Prompt, collate
from interp.prompts.roles import ROLES
from interp.questions.examples import Example, cluster_of, clusters_of
from interp.results.store import Store, fingerprint, part, under
from interp.statistics import adjust, difference_interval, mean_interval, mean_test

MODELS = ("in", "rl")
TRACES = ("own", "in", "rl")
"""Whose traces are read: each model its own, both IN's, or both RL's."""
PAIR = "RL − IN"
"""The comparison of the pair; all others are of models that learnt nothing."""
NULLS = {
    "bf16": ("rl", "RL rounded to bfloat16 − RL"),
    "random": ("in", "IN with a random update of RL's norm − IN"),
}
"""Model that learnt nothing (`interp.decision.null_changes`) to the one it was made from, and the comparison's name."""


def attention_shift(
    pair: Pair,
    examples: Sequence[Example],
    *,
    target: str = "reasoning",
    source: str = "image",
    nulls: Mapping[str, tuple[HookedVLM, Change]] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
    keep: Store | None = None,
    traces: Mapping[str, Traces] | None = None,
) -> xr.Dataset:
    """Attention mass from the target's to the source's tokens, of both models on both models' greedy traces.

    No attention matrix is kept: each is summed up in its own layer.

    Args:
        pair: IN and RL.
        examples: what is asked.
        target: role of the queries.
        source: role of the keys.
        nulls: further models on the same traces, by name: one of the pair's, and how its weights are changed.
        max_new_tokens: longest trace.
        batch_size: prompts that run together.
        progress: show bars.
        keep: where it is kept what the models write, and what each attends to.
        traces: of "in", "rl" or both, written elsewhere, in place of greedy ones (`interp.pair.elsewhere`).

    Returns:
        mass [model trace layer head example], n_target and n_source [trace example] (tokens), why [trace example] (""
        where the trace counts). NaN where a trace does not parse or holds no such tokens.

    Raises:
        FrankenlensError: no examples, or an unknown role; before anything runs.
    """
    if not examples:
        raise FrankenlensError("attention_shift needs at least one example")
    for role in (target, source):
        if role not in ROLES:
            raise FrankenlensError(f"there is no role {role!r}; choose one of {', '.join(ROLES)}")
    prompts = [pair.builder.build(example) for example in examples]
    max_new_tokens = at_least_as_long(max_new_tokens, traces, prompts)
    readers = {name: (pair.models[name], None) for name in MODELS} | dict(nulls or {})
    layers, heads = pair.in_.n_layers, pair.in_.n_heads
    mass = np.full((len(readers), 2, layers, heads, len(prompts)), np.nan)
    counts = np.zeros((2, 2, len(prompts)), dtype=int)
    why = np.full((2, len(prompts)), "", dtype=object)
    for t, name in enumerate(MODELS):
        if traces and name in traces:
            written = traces[name].of(prompts)
        else:
            written = greedy(
                pair.models[name], prompts, max_new_tokens, 2 * batch_size, progress, under(keep, name)
            )
        texts = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
        for row, trace in enumerate(texts):
            counts[:, t, row] = trace.roles.count(target), trace.roles.count(source)
            why[t, row] = _why(trace, target, source)
        rows = [row for row in range(len(texts)) if not why[t, row]]
        some = [texts[row] for row in rows]
        of = fingerprint([list(one.ids) for one in some], target, source)
        for m, (reader, (vlm, change)) in enumerate(readers.items()):

            def read(
                vlm: HookedVLM = vlm, change: Change | None = change, some: Sequence[Prompt] = some
            ) -> np.ndarray:
                with _as_changed(vlm, change):
                    return attention_mass(vlm, some, target, source, batch_size, progress)

            found = part(keep, f"{name}-read-{reader}", read, of)
            mass[m, t, :, :, rows] = np.moveaxis(found, -1, 0)
    return xr.Dataset(
        {
            "mass": (("model", "trace", "layer", "head", "example"), mass),
            "n_target": (("trace", "example"), counts[0]),
            "n_source": (("trace", "example"), counts[1]),
            "why": (("trace", "example"), why.astype(str)),
        },
        coords={
            "model": list(readers),
            "trace": list(MODELS),
            "layer": np.arange(layers),
            "head": np.arange(heads),
            "example": [example.id for example in examples],
            "task": ("example", [example.task for example in examples]),
            "cluster": ("example", [cluster_of(example) for example in examples]),
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

    NaN for prompts without tokens of role `target`, for layers that do not attend, and for heads that a layer lacks.
    """
    for capability in ("positions", "some attention"):
        vlm.require(capability, "attention mass")
    layers, heads = vlm.n_layers, vlm.n_heads
    mass = np.full((layers, heads, len(prompts)), np.nan)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    names = [
        f"blocks.{layer}.attn.hook_pattern"
        for layer, block in enumerate(vlm.anatomy.text.blocks)
        if block.site is not None
    ]

    def measure(rows: Sequence[int]) -> dict[int, Float[Tensor, "batch head"]]:
        batch = collate([prompts[row] for row in rows]).to(vlm.device)
        seen: dict[int, Float[Tensor, "batch head"]] = {}
        hook = summing(batch.mask(target), batch.mask(source), seen)
        with sparing_logits(vlm) as extra:
            vlm.run_with_hooks(batch.inputs, [(name, hook) for name in names], use_cache=False, **extra)
        return seen

    width = max(map(len, prompts), default=1)
    of_row = forward_bytes(vlm, width) + scores_bytes(vlm, width)
    size = fitting(vlm, batch_size, of_row, "attention mass")
    with tqdm(total=len(order), desc="attention", unit="prompt", disable=not progress, delay=1) as bar:
        for rows, seen in in_parts(order, size, measure):
            for layer, found in seen.items():
                mass[layer, : found.shape[1], rows] = found.cpu().numpy()
            bar.update(len(rows))
    return mass


def summing(
    queries: Bool[Tensor, "batch q"], keys: Bool[Tensor, "batch k"], seen: dict[int, Tensor]
) -> HookFunction:
    """A hook for `attn.hook_pattern`: layer -> mass [batch head] into `seen`; the pattern itself is not kept."""
    some = torch.nonzero(queries.any(0)).flatten()

    def add_up(pattern: Tensor, hook: HookContext) -> None:
        rows = pattern[:, :, some.to(pattern.device)]
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        to_source = torch.einsum("bhqk,bk->bhq", wide, keys.to(wide))
        mask = queries[:, some].to(wide)
        layer = hook.layer()
        assert layer is not None
        seen[layer] = torch.einsum("bhq,bq->bh", to_source, mask) / mask.sum(1)[:, None]

    return add_up


@contextmanager
def _as_changed(vlm: HookedVLM, change: Change | None) -> Iterator[None]:
    if change is None:
        yield
        return
    with changed_weights(vlm.model, change):
        yield


def _why(trace: Prompt, target: str, source: str) -> str:
    read = trace.trace
    if not read.ok:
        return f"the trace does not parse: {read.why}"
    if target not in trace.roles:
        return f"the trace has no {target} tokens"
    return "" if source in trace.roles else f"the prompt has no {source} tokens"


def shift(
    found: xr.Dataset,
    traces: str = "own",
    *,
    models: tuple[str, str] = MODELS,
    per: str = "layer",
    measure: str = "mass",
    correction: str = "holm",
    **settings,
) -> pd.DataFrame:
    """RL - IN per layer (mean over heads) or per head, paired by example.

    Args:
        found: what `attention_shift` returns.
        traces: of `TRACES`.
        models: before and after; the second less the first is the difference.
        per: "layer" or "head".
        measure: "mass" or "mean" (mass / number of the source's tokens).
        correction: of the p values, over all rows: "holm" or "bh".
        settings: as in `interp.statistics.ratio_interval`.

    Returns:
        Columns layer, head (-1: mean over heads), before, before_low, before_high, after, after_low, after_high,
        difference, low, high (paired), p (of a mean difference of 0; `mean_test`), p_corrected, n, left_out.

    Raises:
        FrankenlensError: another choice, or the own traces of a model that wrote none.
    """
    written = found["trace"].to_numpy().tolist()
    for given, choices in (
        (traces, TRACES),
        (per, ("layer", "head")),
        (measure, ("mass", "mean")),
        *((model, found["model"].to_numpy().tolist()) for model in models),
        *((model, written) for model in models if traces == "own"),
    ):
        if given not in choices:
            raise FrankenlensError(f"{given!r} is none of {', '.join(choices)}")
    sides = []
    for model in models:
        of = model if traces == "own" else traces
        values = found["mass"].sel(model=model, trace=of)
        values = values / found["n_source"].sel(trace=of) if measure == "mean" else values
        values = values.mean("head") if per == "layer" else values.stack(cell=("layer", "head"))
        sides.append(values.transpose(..., "example").to_numpy())
    heads, layers = found.sizes["head"], found["layer"].to_numpy()
    cells = {
        "layer": layers if per == "layer" else np.repeat(layers, heads),
        "head": -1 if per == "layer" else np.tile(found["head"].to_numpy(), len(layers)),
    }
    settings = {"clusters": clusters_of(found), **settings}
    return pd.DataFrame(cells | _compared(sides[0], sides[1], correction, **settings))


def shifts(found: xr.Dataset, *, measure: str = "mass", **settings) -> pd.DataFrame:
    """RL − IN on every choice of traces, and each model that learnt nothing against the one it was made from.

    Args:
        found: what `attention_shift` returns.
        measure: "mass" or "mean".
        settings: per, correction and the rest, as in `shift`.

    Returns:
        Columns traces, comparison (`PAIR`, or of `NULLS`), measure, and those of `shift`.

    Raises:
        FrankenlensError: as `shift`.
    """
    compared = [(traces, MODELS, PAIR) for traces in TRACES]
    there = set(found["model"].to_numpy().tolist())
    for name in [name for name in NULLS if name in there]:
        origin, comparison = NULLS[name]
        compared += [(traces, (origin, name), comparison) for traces in MODELS]
    tables = []
    for traces, models, comparison in compared:
        table = shift(found, traces, models=models, measure=measure, **settings)
        tables.append(table.assign(traces=traces, comparison=comparison, measure=measure))
    whole = pd.concat(tables, ignore_index=True)
    front = ["traces", "comparison", "measure"]
    return whole.loc[:, [*front, *(name for name in whole if name not in front)]]


def _compared(
    before: Float[np.ndarray, "cell example"],
    after: Float[np.ndarray, "cell example"],
    correction: str,
    **settings,
) -> dict[str, np.ndarray]:
    """The columns of `shift` behind layer and head."""
    columns = {}
    for name, side in (("before", before), ("after", after)):
        end = mean_interval(np.where(np.isnan(after + before), np.nan, side), **settings)
        columns |= {name: end.value, f"{name}_low": end.low, f"{name}_high": end.high}
    difference = difference_interval(after, before, **settings)
    p = mean_test(after - before, clusters=settings.get("clusters"))
    return columns | {
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p": p,
        "p_corrected": adjust(p, correction),
        "n": difference.n,
        "left_out": before.shape[-1] - difference.n,
    }
