"""What finding decisions computes, and the controls that a map sets beside them."""

from __future__ import annotations

from dataclasses import replace

import torch

from interp.decision import NOISE_PAIRS
from interp.map.noise import NOISE_PROMPTS
from interp.plan.maps import MapPlan
from interp.plan.prompts import Workload
from interp.plan.runs import Reads, Runs, of_decision, of_trace
from interp.plan.work import Work, together
from interp.prompts import Prompt


def reads_of(choice: str) -> Reads:
    """What the metric of a choice of decisions reads."""
    return of_trace if choice == "soft" else of_decision


def found_decisions(runs: Runs, asked: Workload, choice: str) -> list[Work]:
    """`interp.decision.find_decisions`, step by step, on the prompts at hand."""
    steps = [asked.trace_tokens] * len(asked.prompts)
    texts = [runs.written(f"greedy text of {name}", asked.prompts, steps) for name in ("RL", "IN")]
    along = 2 if choice == "soft" else 1
    read = runs.read("both models along RL's text", asked.traces, of_trace, 2 * along)
    read = replace(read, uses=read.used + 2 * along * len(asked.traces))  # the logits of each by itself
    works = [*texts, read]
    if choice == "decisive":
        left = [len(whole) - len(cut) for whole, cut in zip(asked.traces, asked.cut, strict=True)]
        forced = runs.written("IN's own text after RL's token", asked.cut, left)
        works.append(forced.times(asked.tries * asked.decided))
    values = runs.read("the metric of both models", _decided(asked, choice), reads_of(choice), 2)
    return [*works, values.times(_share(asked, choice))]


def null_pairs(runs: Runs, asked: Workload, choice: str) -> Work:
    """`interp.decision.null_pair_denominator`: random updates, and RL rounded where it is kept in float32."""
    draws = NOISE_PAIRS + (runs.vlm.model.dtype != torch.bfloat16)
    same = runs.read("same decisions", _decided(asked, choice), reads_of(choice)).times(_share(asked, choice))
    along = runs.read("along the text", asked.traces, of_trace)
    if choice == "soft":
        own = [along.times(2)]
    else:
        own = [along, runs.read("own decisions", asked.cut, of_decision, 2).times(asked.decided)]
    all_of_them = together("pairs that learnt nothing", [same, *own]).times(draws)
    return set_aside(all_of_them, runs)


def two_by_two(runs: Runs, asked: Workload) -> Work:
    """`interp.decision.two_by_two`: the prefix by each model, the last token by each on either's keys and values."""
    whole = runs.read("2x2: whose weights, whose prefix", asked.cut, of_decision, 4)
    return whole.times(asked.decided)


def noise_maps(runs: Runs, planned: MapPlan, asked: Workload, choice: str) -> Work:
    """`interp.map.noise_cells`, with `planned` a map of one direction and the donor's cells alone."""
    some = _decided(asked, choice)[:NOISE_PROMPTS]
    n = min(NOISE_PROMPTS, round(asked.n * _share(asked, choice)))
    own = runs.read("decisions of its own", asked.traces[: len(some)], of_trace)
    maps = planned.work(some).times(2 * n / len(some))
    work = together("maps of pairs that learnt nothing", [own, maps]).times(NOISE_PAIRS)
    return replace(set_aside(work, runs), scales=False)


def _decided(asked: Workload, choice: str) -> list[Prompt]:
    return asked.traces if choice == "soft" else asked.cut


def _share(asked: Workload, choice: str) -> float:
    return 1.0 if choice == "soft" else asked.decided


def set_aside(work: Work, runs: Runs) -> Work:
    """One model holds other weights in the meantime, and its own are kept."""
    return work.beside("one model's weights, set aside", runs.footprint.weights())
