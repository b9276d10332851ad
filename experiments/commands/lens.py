"""What would each layer of IN and RL say, where do they part, and which components write the token that RL prefers?

`frankenlens lens` is the command; the pieces are in `interp.lens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import xarray as xr

from experiments.bench import Bench, Planned
from experiments.frame import Command
from experiments.given import TraceSettings
from experiments.settings import Questions, load_pair, load_questions
from hooks import FrankenlensError, HookedVLM
from hooks.shared import shared
from interp.decision import DecisionSet, changed_weights, find_decisions, null_changes
from interp.lens import (
    TunedLens,
    answer_layers,
    compare_lenses,
    direct_logit_attribution,
    logit_lens,
    plots,
    train_tuned_lens,
)
from interp.lens.compare import Nulls
from interp.lens.tables import (
    answer_position,
    answer_table,
    apart_table,
    attribution_table,
    own_table,
    with_answers,
)
from interp.metrics import LogitDifference
from interp.pair.pair import Pair
from interp.plan import decisions as plans
from interp.plan.lenses import LensPlan
from interp.plan.prompts import with_trace
from interp.plan.work import Work
from interp.prompts import Prompt
from interp.questions.examples import with_looked_at
from interp.results.lock import making
from interp.results.page import Account, Section
from interp.statistics import interval_text

T = TypeVar("T")


@dataclass(frozen=True)
class LensConfig(TraceSettings):
    """Settings of the lenses; the defaults run on the pair that ships with the package.

    Attributes:
        top_k: size of the sets of likeliest tokens whose overlap is measured.
        tuned_steps: training steps of a tuned lens for each model, on half of the prompts, measured on the other; 0:
            none.
        lenses: folder for the trained lenses (in.safetensors, rl.safetensors); by default they are not kept.
        out: folder for the tables (lens.csv, kl.csv, answers.csv, dla.csv), the figures and report.html.
    """

    top_k: int = 10
    tuned_steps: int = 60
    lenses: Path | None = None
    out: Path = Path("out/lens")


def check(config: LensConfig) -> None:
    """Refuse tuned lenses that cannot be trained, kept or measured."""
    if config.top_k < 1:
        raise FrankenlensError(f"--top-k is {config.top_k}; give at least 1.")
    if config.tuned_steps < 0:
        raise FrankenlensError(
            f"--tuned-steps is {config.tuned_steps}; give at least 1, or 0 for no tuned lens."
        )
    if config.lenses is not None and not config.tuned_steps:
        raise FrankenlensError(
            "--lenses keeps tuned lenses, and --tuned-steps 0 trains none; give one of the two."
        )
    if config.lenses is not None and config.ray is not None:
        raise FrankenlensError(
            "--lenses is a folder of one machine, and --ray trains on many; give one of the two."
        )
    if config.tuned_steps and config.n < 2:
        raise FrankenlensError(
            "a tuned lens is trained on one half of the prompts and measured on the other: --n 2."
        )


def measure(pair: Pair, asked: Questions, config: LensConfig) -> Iterator[Section]:
    """Both models on RL's own greedy traces: lenses, their distance, the answer's layer, and direct attribution."""
    settings = {"batch_size": config.batch_size, "progress": True}
    decisions = find_decisions(
        pair, asked.examples, "first", progress=True, traces=asked.traces, **config.running
    )
    traces = [_without_end(trace) for trace in decisions.rl_traces]
    nulls = null_changes(pair, config.seed)
    tuned, held_out = _tuned(pair, traces, config)
    lens = logit_lens(pair, traces, where="all", top_k=1, **settings)
    other = [traces[row] for row in held_out]
    through = logit_lens(pair, other, where="all", top_k=1, tuned=tuned, **settings) if tuned else None
    apart = compare_lenses(pair, traces, where="all", top_k=config.top_k, nulls=nulls, **settings)
    tables = {"lens": own_table(lens, through), "kl": apart_table(apart)}
    figures = {"lens_own": plots.plot_own(tables["lens"]), "lens_kl": plots.plot_apart(tables["kl"])}
    found = [_apart_found(tables["kl"])]
    answered = with_answers(traces)
    if answered:
        answers, tables["answers"] = _answers(pair, answered, nulls, config)
        figures["lens_answers"] = plots.plot_answers(answers)
        found.append(_answers_found(tables["answers"]))
    if len(decisions):
        tables["dla"] = _dla(pair, decisions, nulls, config)
        figures["lens_dla"] = plots.plot_attribution(tables["dla"])
        found.append(_dla_found(tables["dla"]))
    figures |= _one_prompt(pair, traces[0], config.batch_size)
    account = _account(config, traces, len(answered), len(decisions), len(held_out))
    kept = with_looked_at(lens[["kl", "entropy"]].astype("float32"), asked.examples)
    yield Section("lens", "What each layer would say", " ".join(found), account, tables, figures, kept)


def _account(
    config: LensConfig, traces: Sequence[Prompt], answered: int, decisions: int, held_out: int
) -> Account:
    n = len(traces)
    left_out = {
        "answers: RL's trace holds none": n - answered,
        "dla: both models write the same": n - decisions,
        "lens_image.png, the lens over an image: the prompt that is drawn has none": "image"
        not in traces[0].roles,
    }
    return Account(
        "logit lens (own final norm and unembedding) on RL's greedy traces, read by both models; KL and overlap: mean "
        "over a prompt's tokens of a role, then over prompts; learnt nothing: bf16 (RL rounded, against RL), random "
        "(IN with a random update of RL's norm, against IN); attribution of logit(RL's token) − logit(IN's token) at "
        "the first token on which they differ, scale of the final norm as on the clean run, its gain folded into W_U; "
        "layer 0 is before the first block",
        f"{n} prompts, {answered} with an answer, {decisions} with a differing token"
        + (f"; tuned lens measured on {held_out} prompts it was not trained on" if held_out else ""),
        correction="Holm over the layers of a role (kl), both events (answers), components (dla)",
        seed=config.seed,
        left_out={reason: int(count) for reason, count in left_out.items() if count},
        counts={"examples": n},
    )


def _without_end(trace: Prompt) -> Prompt:
    """Without the token that ends the turn: what would come after it means nothing."""
    ends = trace.trace_ids[-1:] and trace.trace_ids[-1] in trace.builder.end_ids
    return trace.truncated(len(trace) - 1) if ends else trace


def _of_models(pair: Pair, nulls: Nulls, of: Callable[[HookedVLM], T]) -> dict[str, tuple[str, T]]:
    """What is measured of each null: the model it is compared with, and the value."""
    found = {}
    for name, (vlm, change) in nulls.items():
        with changed_weights(vlm.model, change):
            found[name] = "rl" if vlm is pair.rl else "in", of(vlm)
    return found


def _answers(
    pair: Pair, answered: Sequence[Prompt], nulls: Nulls, config: LensConfig
) -> tuple[xr.Dataset, pd.DataFrame]:
    """Where the answer appears and stays: of both models, and as a table beside models that learnt nothing."""

    def of(model: Pair | HookedVLM) -> xr.Dataset:
        where = [[answer_position(trace)] for trace in answered]
        return answer_layers(logit_lens(model, answered, where=where, top_k=1, batch_size=config.batch_size))

    answers = of(pair)
    return answers, answer_table(answers, _of_models(pair, nulls, of))


def _tuned(
    pair: Pair, traces: Sequence[Prompt], config: LensConfig
) -> tuple[dict[str, TunedLens], list[int]]:
    """A tuned lens for each model, trained on one random half of the traces, and the rows of the other half."""
    if not config.tuned_steps or len(traces) < 2:
        return {}, []
    order = np.random.default_rng(config.seed).permutation(len(traces)).tolist()
    half = len(order) // 2
    training = [traces[row] for row in order[:half]]
    models = {"in": pair.in_, "rl": pair.rl}

    def train(name: str) -> TunedLens:
        settings: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
        return train_tuned_lens(models[name], training, steps=config.tuned_steps, **settings)

    lenses = dict(shared("tuned lens", list(models), train))
    if config.lenses is not None:
        with making(config.lenses):
            for name, lens in lenses.items():
                lens.save(config.lenses / f"{name}.safetensors")
    return lenses, sorted(order[half:])


def _dla(pair: Pair, decisions: DecisionSet, nulls: Nulls, config: LensConfig) -> pd.DataFrame:
    """Contributions to logit(RL's token) - logit(IN's token) at the decisions, in both models and the nulls."""
    metric = decisions.metric
    assert isinstance(metric, LogitDifference)

    def of(model: Pair | HookedVLM) -> xr.Dataset:
        return direct_logit_attribution(
            model, decisions.prompts, metric.a, metric.b, where="decision", batch_size=config.batch_size
        )

    return attribution_table(of(pair), _of_models(pair, nulls, of))


def _one_prompt(pair: Pair, trace: Prompt, batch_size: int) -> dict:
    """The two pictures of one prompt: tokens by layer, and visual tokens over the image."""
    lens: xr.Dataset = logit_lens(pair, [trace], where="all", top_k=1, batch_size=batch_size)
    figures = {"lens_tokens": plots.plot_tokens(lens)}
    if len(trace.positions("image")):
        figures["lens_image"] = plots.plot_image(lens, trace)
    return figures


def _apart_found(table: pd.DataFrame) -> str:
    """In the output, at reasoning tokens (at the question's where there are none)."""
    role = next(name for name in ("reasoning", "question", "template") if name in set(table["role"]))
    last = table[(table["layer"] == table["layer"].max()) & (table["role"] == role)].set_index("comparison")
    own, nulls = last.loc["rl"], last.drop(index="rl")
    others = "; ".join(f"{name} {row['kl']:.1e}" for name, row in nulls.iterrows())
    return (
        f"At {role} tokens, in the output, KL(RL || IN) is {interval_text(own['kl'], own['kl_low'], own['kl_high'])} "
        f"nats (n = {int(own['n'])} prompts); learnt nothing: {others}."
    )


def _answers_found(table: pd.DataFrame) -> str:
    row = table[table["event"] == "stays"].iloc[0]
    return (
        f"The answer stays the likeliest from layer {row['in']:.2f} (IN) and {row['rl']:.2f} (RL) on, RL − IN "
        f"{_interval(row, '')} layers (n = {int(row['n'])}, p = {row['p_corrected']:.2g}); learnt nothing: "
        f"{_of_nulls(table, row)}."
    )


def _dla_found(table: pd.DataFrame) -> str:
    inside = table.query("layer >= 0")
    strongest = inside.assign(size=inside["difference"].abs()).nlargest(3, "size")
    texts = [
        f"{row['component']} {_interval(row, '')} ({_of_nulls(table, row)})"
        for _, row in strongest.iterrows()
    ]
    return (
        "From IN's token towards RL's, what these write differs most, RL − IN, in logits (in models that learnt "
        f"nothing): {'; '.join(texts)}; n = {int(table['n'].max())} tokens, selected for differing."
    )


def _interval(row: pd.Series, prefix: str) -> str:
    ends: Any = [row[f"{prefix}{end}"] for end in ("difference", "low", "high")]
    return interval_text(*ends)


def _of_nulls(table: pd.DataFrame, row: pd.Series) -> str:
    names = [name.removesuffix("_difference") for name in table if str(name).endswith("_difference")]
    return ", ".join(f"{name} {_interval(row, f'{name}_')}" for name in names)


def work(bench: Bench, config: LensConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    asked, runs = bench.workload, bench.runs()
    for one in plans.found_decisions(runs, asked, "first"):
        yield one.times(asked.scale)
    traces = [with_trace(prompt, max(0, asked.trace_tokens - 1)) for prompt in asked.prompts]
    whole, half = LensPlan(runs, asked.scale), LensPlan(runs, asked.scale / 2)
    nulls = 1 + (bench.vlm.model.dtype != torch.bfloat16)
    tuned = bool(config.tuned_steps) and asked.n > 1
    if tuned:
        trained = half.trained(traces, config.tuned_steps)
        yield replace(trained.times(2), what="tuned lenses of both models, trained on half of the prompts")
    yield replace(whole.spelt(traces).times(2), what="logit lens of both models")
    if tuned:
        yield replace(half.spelt(traces, tuned=True).times(2), what="tuned lens on the other half")
    yield replace(whole.apart(traces, both=True), what="IN and RL apart")
    beside = replace(whole.apart(traces, both=False).times(nulls), what="models that learnt nothing, apart")
    yield plans.set_aside(beside, runs)
    some = LensPlan(runs, asked.scale * asked.decided)
    answers = replace(some.spelt(traces, 1), what="the layer of the answer, with models that learnt nothing")
    yield plans.set_aside(answers.times(2 + nulls), runs)
    parts = replace(some.attributed(asked.cut), what="attribution, with models that learnt nothing")
    yield plans.set_aside(parts.times(2 + nulls), runs)
    one = replace(LensPlan(runs).spelt(traces[:1]).times(2), what="lens of one prompt", scales=False)
    yield one


def assumed(bench: Bench, config: LensConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    own = bench.settings
    yield f"{own.decided:.0%} of the prompts have an answer, and a differing token at {own.decided_at:.0%} of the trace"


COMMAND = Command(
    LensConfig, check, load_questions, load_pair, measure, plan=Planned(work, assumed=assumed), on_ray=True
)
