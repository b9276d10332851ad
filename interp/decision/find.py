"""Find, once per prompt and on RL's own greedy trace, the decision that RL changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.decision.result import Decision, DecisionSet
from interp.decision.soft import soft_difference
from interp.decision.traces import Divergence, chosen_tokens, diverging
from interp.metrics import LogitDifference, Metric, evaluate
from interp.pair.elsewhere import Traces, at_least_as_long
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.prompts.roles import count_faults
from interp.questions.examples import Example
from interp.questions.grading import Ungraded, grade
from interp.results.store import Store, under

Choice = Literal["first", "decisive", "soft"]
Grader = Callable[[str | None, Example], bool]


@dataclass(frozen=True)
class _Run:
    """Both models on the same prompts: greedy traces and how they end."""

    rl_traces: tuple[Prompt, ...]
    in_traces: tuple[Prompt, ...]
    rl_correct: np.ndarray
    in_correct: np.ndarray
    graded: np.ndarray


@torch.no_grad()
def find_decisions(
    pair: Pair,
    examples: Sequence[Example],
    choice: Choice | str = "decisive",
    *,
    grader: Grader = grade,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
    traces: Mapping[str, Traces] | None = None,
) -> DecisionSet:
    """The decision RL changed, on each prompt that has one.

    Arguments:
        choice: `first`: the first position of RL's greedy trace where the arg max of the two models differs on the
            same prefix. `decisive`: on prompts that RL gets right and IN wrong, the first such position where forcing
            RL's token makes IN's own greedy continuation end right. `soft`: all positions of the trace, weighted by
            how much the two models' probabilities differ.
        grader: (answer as the trace format reads it, or None; example) -> right or wrong.
        max_new_tokens: longest trace.
        progress: show bars.
        keep: where it is kept what the models write.
        traces: of "in", "rl" or both: traces that were written elsewhere, in place of greedy ones
            (`interp.pair.elsewhere`). Where RL's are sampled, decisions are taken at those of their tokens that RL
            would choose itself; all others are left out (`n_unstable`).

    Raises:
        FrankenlensError: an unknown choice, no examples, or one without a trace among those given.
    """
    if choice not in get_args(Choice) or not examples:
        raise FrankenlensError(
            f"find_decisions takes at least one example and a choice of {', '.join(get_args(Choice))}; "
            f"got {len(examples)} examples and {choice!r}"
        )
    prompts = [pair.builder.build(example) for example in examples]
    max_new_tokens = at_least_as_long(max_new_tokens, traces, prompts)
    run = _run(pair, prompts, grader, max_new_tokens, batch_size, progress, keep, traces or {})
    divergences, unstable = [], 0
    chosen_by = [chosen_tokens(vlm, run.rl_traces, batch_size, progress) for vlm in (pair.rl, pair.in_)]
    for trace, of_rl, of_in in zip(run.rl_traces, *chosen_by, strict=True):
        found, ties = diverging(trace, of_rl, of_in)
        divergences.append(found)
        unstable += ties
    if choice == "soft":
        decisions = tuple(Decision(row, trace) for row, trace in enumerate(run.rl_traces))
        metric: Metric = soft_difference(pair.rl, pair.in_, run.rl_traces, batch_size, progress)
        excluded: Counter[str] = Counter()
    else:
        if choice == "first":
            chosen = {row: found[0] for row, found in enumerate(divergences) if found}
            excluded = Counter({"no divergence": len(prompts) - len(chosen)})
        else:
            forcing = (grader, max_new_tokens, batch_size, progress, keep)
            chosen, excluded = _decisive(pair, run, divergences, *forcing)
        decisions = tuple(_decision(run.rl_traces[row], row, at) for row, at in sorted(chosen.items()))
        metric = _difference(decisions)
    cut = [decision.prompt for decision in decisions]
    in_values, rl_values = (evaluate(vlm, cut, metric, batch_size) for vlm in (pair.in_, pair.rl))
    both_traces = {"in": run.in_traces, "rl": run.rl_traces}
    return DecisionSet(
        choice,
        decisions,
        metric,
        in_values,
        rl_values,
        run.rl_traces,
        run.in_traces,
        run.rl_correct,
        run.in_correct,
        n_diverge=sum(map(bool, divergences)),
        excluded={reason: n for reason, n in excluded.items() if n},
        unparsed={name: count_faults(p.trace for p in rows) for name, rows in both_traces.items()},
        n_unstable=unstable,
        given={name: given.source for name, given in (traces or {}).items()},
    )


def _run(
    pair: Pair,
    prompts: Sequence[Prompt],
    grader: Grader,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    keep: Store | None,
    given: Mapping[str, Traces],
) -> _Run:
    traces, correct = {}, {}
    graded = np.ones(len(prompts), dtype=bool)
    for name, vlm in (("rl", pair.rl), ("in", pair.in_)):
        if name in given:
            written = given[name].of(prompts)
        else:
            written = greedy(vlm, prompts, max_new_tokens, batch_size, progress, under(keep, name))
        traces[name] = tuple(p.with_tokens(ids) for p, ids in zip(prompts, written, strict=True))
        grades = [_grade(grader, p) for p in traces[name]]
        correct[name] = np.array([grade is True for grade in grades])
        graded &= np.array([grade is not None for grade in grades])
    return _Run(traces["rl"], traces["in"], correct["rl"], correct["in"], graded)


def _grade(grader: Grader, prompt: Prompt) -> bool | None:
    """None: it cannot be graded."""
    try:
        return bool(grader(prompt.trace.answer, prompt.example))
    except Ungraded:
        return None


def _decisive(
    pair: Pair,
    run: _Run,
    divergences: Sequence[Sequence[Divergence]],
    grader: Grader,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    keep: Store | None,
) -> tuple[dict[int, Divergence], Counter[str]]:
    """Scan the divergences in order, the k-th of all open prompts in one batch."""
    wanted = run.rl_correct & ~run.in_correct & run.graded
    excluded = Counter(
        {
            "an answer cannot be graded": int((~run.graded).sum()),
            "RL is wrong": int((~run.rl_correct & run.graded).sum()),
            "IN is right already": int((run.rl_correct & run.in_correct & run.graded).sum()),
        }
    )
    ungraded = "IN's answer after RL's token cannot be graded"
    chosen: dict[int, Divergence] = {}
    waiting = np.flatnonzero(wanted).tolist()
    for k in range(max((len(divergences[row]) for row in waiting), default=0)):
        waiting = [row for row in waiting if row not in chosen and len(divergences[row]) > k]
        forced = [_forced(run.rl_traces[row], divergences[row][k].index) for row in waiting]
        again = under(keep, f"forced-{k}")
        right = _ends_right(pair.in_, forced, grader, max_new_tokens, batch_size, progress, again)
        chosen.update({row: divergences[row][k] for row, good in zip(waiting, right, strict=True) if good})
        unknown = {row for row, good in zip(waiting, right, strict=True) if good is None}
        excluded[ungraded] += len(unknown)
        waiting = [row for row in waiting if row not in unknown]
    excluded["no single token of RL's makes IN end right"] = (
        int(wanted.sum()) - len(chosen) - excluded[ungraded]
    )
    return chosen, excluded


def _forced(trace: Prompt, index: int) -> Prompt:
    """RL's trace up to and including its token at a divergence."""
    return trace.truncated(trace.n_prompt_tokens + index + 1)


def _ends_right(
    vlm: HookedVLM,
    forced: Sequence[Prompt],
    grader: Grader,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    keep: Store | None,
) -> Iterable[bool | None]:
    open_rows = [i for i, p in enumerate(forced) if p.trace_ids[-1] not in p.builder.end_ids]
    room = {i: max_new_tokens - len(forced[i].trace_ids) for i in open_rows}
    open_rows = [i for i in open_rows if room[i] > 0]
    ended = list(forced)
    if open_rows:
        longest = max(room[i] for i in open_rows)
        written = greedy(vlm, [forced[i] for i in open_rows], longest, batch_size, progress, keep)
        for i, ids in zip(open_rows, written, strict=True):
            ended[i] = forced[i].with_tokens(ids[: room[i]])
    return [_grade(grader, prompt) for prompt in ended]


def _decision(trace: Prompt, row: int, at: Divergence) -> Decision:
    place = trace.n_prompt_tokens + at.index
    return Decision(
        row, trace.truncated(place), at.index, trace.ids[place], at.other_token, trace.roles[place]
    )


def _difference(decisions: Sequence[Decision]) -> LogitDifference:
    tokens = [[getattr(d, name) for d in decisions] for name in ("rl_token", "in_token")]
    return LogitDifference(*(torch.tensor(ids, dtype=torch.long) for ids in tokens))
