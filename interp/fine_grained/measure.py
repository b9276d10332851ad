"""Asking a model the questions of the fine-grained metrics, and what it comes to per example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped

from hooks import FrankenlensError, HookedVLM
from interp.fine_grained.descriptions import MODEL, TEMPLATE, Describe, described_by_model
from interp.fine_grained.questions import (
    APART,
    METRICS,
    NEEDS,
    Questions,
    described_by,
    questions,
    require_askable,
)
from interp.fine_grained.replies import Reply, joining, replied, replies
from interp.prompts import PromptBuilder
from interp.questions.examples import Example, cluster_of
from interp.questions.grading import Grade, judge
from interp.results.store import Store, under
from interp.transfer.outcomes import Ids, Metric, OfTexts, Outcomes, Texts, Together

Judge = Callable[[str | None, Example], Grade]
"""How an answer (None: there is none) is graded."""


def fine_grained(
    vlm: HookedVLM,
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    describe: Describe | str | None = None,
    template: str = TEMPLATE,
    metrics: Sequence[str] = METRICS,
    judge: Judge = judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> xr.Dataset:
    """Ask every variant of every example, greedily, and grade it: `ask(vlm, questions(...))`.

    Examples with images are asked as they are, with black images, and with black images and the description in words;
    examples without are asked as they are. To compare models, make the questions once and `ask` each model: where
    each describes the images itself, v2r also measures how well it describes.

    Args:
        vlm: the model.
        builder: makes its prompts.
        examples, template, metrics: as in `questions`.
        describe: None: `meta["description"]`; a function of the example; or "model": the model itself.
        judge, max_new_tokens, batch_size, progress: as in `ask`.

    Returns:
        As `ask`.

    Raises:
        FrankenlensError: as `questions`, or another word for `describe`.
    """
    if isinstance(describe, str):
        if describe != MODEL:
            raise FrankenlensError(
                f"describe={describe!r}: give None, a function of an example, or {MODEL!r}"
            )
        require_askable(examples, template, metrics)
        if "v2r" in metrics:
            settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
            examples = described_by_model(vlm, builder, examples, **settings)
        describe = None
    asked = questions(builder, examples, describe=describe, template=template, metrics=metrics)
    return ask(
        vlm, asked, judge=judge, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )


def ask(
    vlm: HookedVLM,
    asked: Questions,
    *,
    judge: Judge = judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
    keep: Store | None = None,
) -> xr.Dataset:
    """A model's answers to the questions, graded.

    A reply that ends without an answer, or is cut off at `max_new_tokens` before its answer is complete, is wrong, and
    `note` says so. What cannot be asked or graded is NaN, with the reason in `why`; it is in no metric that needs it.

    Args:
        vlm: the model.
        asked: the questions.
        judge: grades an answer.
        max_new_tokens: longest reply.
        batch_size: prompts a forward.
        progress: show bars.
        keep: where it is kept what the model writes.

    Returns:
        right [variant example] (1, 0, NaN), answer, why and note [variant example]; value [metric example] (1, 0, NaN)
        and left_out [metric example], the reason ("" where it counts); description, described_by, task [example].
    """
    settings = (max_new_tokens, batch_size, progress)
    return _graded(asked, judge, lambda name: replies(vlm, asked.prompts[name], *settings, under(keep, name)))


def _graded(asked: Questions, judge: Judge, found: Callable[[str], Mapping[int, Reply]]) -> xr.Dataset:
    """What `ask` returns of the replies to each variant."""
    shape = (len(asked.variants), len(asked.examples))
    right = np.full(shape, np.nan)
    answer, why, note = (np.full(shape, "", dtype=object) for _ in range(3))
    for k, variant in enumerate(asked.variants):
        why[k] = asked.why[variant]
        for row, reply in found(variant).items():
            answer[k, row] = reply.answer or ""
            verdict = Grade(False, "", reply.cut) if reply.cut else judge(reply.answer, asked.examples[row])
            if verdict.right is None:
                why[k, row] = verdict.why
            else:
                right[k, row] = verdict.right
                note[k, row] = verdict.why
    return _dataset(asked, right, answer, why, note)


def _texts(asked: Questions, max_new_tokens: int, batch_size: int) -> list[Texts]:
    """What a model writes when it is asked, in the order of `_read`."""
    return [
        Texts(tuple(asked.prompts[variant][row] for row in rows), max_new_tokens, batch_size)
        for variant in asked.variants
        for rows in joining(asked.prompts[variant])
    ]


def _read(asked: Questions, judge: Judge, written: Iterator[Ids]) -> xr.Dataset:
    """What `ask` returns of what was written for `_texts`, drawn one after the other."""

    def found(variant: str) -> dict[int, Reply]:
        prompts = asked.prompts[variant]
        each = (replied(prompts, rows, next(written)) for rows in joining(prompts))
        return {row: reply for some in each for row, reply in some.items()}

    return _graded(asked, judge, found)


def metrics_of(
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    describe: Describe | None = None,
    template: str = TEMPLATE,
    metrics: Sequence[str] = METRICS,
    judge: Judge = judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> dict[str, Metric]:
    """M_vis, M_v2r and M_rea as `interp.transfer.transfer` takes them: one function of a model per metric.

    Every model gets the same prompts, the same descriptions among them. Examples that do not belong to a metric (an
    image for rea, none for vis and v2r) are not among its outcomes.

    Raises:
        FrankenlensError: as `questions`.
    """

    def metric(name: str) -> Metric:
        belonging = [example for example in examples if bool(example.images) == (name != "rea")]
        asked = questions(builder, belonging, describe=describe, template=template, metrics=[name])

        def read(written: Sequence[Ids]) -> Outcomes:
            return _outcomes(_read(asked, judge, iter(written)), belonging, name)

        return OfTexts(tuple(_texts(asked, max_new_tokens, batch_size)), read)

    return {f"M_{name}": metric(name) for name in metrics}


def table_2_metrics(
    builder: PromptBuilder,
    examples: Mapping[str, Sequence[Example]],
    *,
    template: str = TEMPLATE,
    judge: Judge = judge,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> Together:
    """M_vis, M_v2r and M_rea, each on questions of its own, and the accuracy of these as they are asked.

    Args:
        builder: makes the prompts, once for every model.
        examples: metric to its questions.
        template: as in `questions`.
        judge, max_new_tokens, batch_size: as in `ask`.

    Returns:
        The metrics M_vis, M_v2r, M_rea, and "accuracy", whose tasks and ids begin with the metric's name.

    Raises:
        FrankenlensError: as `questions`.
    """
    asked = {
        name: questions(builder, some, template=template, metrics=[name]) for name, some in examples.items()
    }

    texts = [one for own in asked.values() for one in _texts(own, max_new_tokens, batch_size)]

    def read(written: Sequence[Ids]) -> dict[str, Outcomes]:
        each = iter(written)
        found: dict[str, Outcomes] = {}
        accuracy: list[tuple[str, str, float, str]] = []
        for name, own in asked.items():
            one = _read(own, judge, each)
            found[f"M_{name}"] = _outcomes(one, own.examples, name)
            whole = one.sel(variant=NEEDS[name][0])
            why = np.where(whole["why"] != "", whole["why"], whole["note"]).tolist()
            rows = zip(own.examples, whole["right"].to_numpy().tolist(), why, strict=True)
            accuracy += [(f"M_{name}: {e.id}", f"M_{name}", right, reason) for e, right, reason in rows]
        ids, tasks, right, why = zip(*accuracy, strict=True)
        of = tuple(cluster_of(example) for own in asked.values() for example in own.examples)
        return {**found, "accuracy": Outcomes(ids, tasks, right, why, of)}

    def measure(vlm: HookedVLM) -> dict[str, Outcomes]:
        return read([one.written(vlm) for one in texts])

    return Together((*(f"M_{name}" for name in asked), "accuracy"), measure, tuple(texts), read)


def _outcomes(found: xr.Dataset, examples: Sequence[Example], name: str) -> Outcomes:
    """One metric per example, with the reason of a NaN or what is wrong with an answer."""
    values = tuple(found["value"].sel(metric=name).to_numpy().tolist())
    why = found["left_out"].sel(metric=name).to_numpy().tolist()
    noted = found["note"].sel(variant=list(NEEDS[name])).transpose("example", "variant").to_numpy().tolist()
    notes = (next((note for note in some if note), "") for some in noted)
    reasons = tuple(reason or note for reason, note in zip(why, notes, strict=True))
    ids, tasks = zip(*((example.id, example.task) for example in examples), strict=True)
    return Outcomes(ids, tasks, values, reasons, tuple(cluster_of(example) for example in examples))


def _dataset(
    asked: Questions,
    right: Float[np.ndarray, "variant example"],
    answer: Shaped[np.ndarray, "variant example"],
    why: Shaped[np.ndarray, "variant example"],
    note: Shaped[np.ndarray, "variant example"],
) -> xr.Dataset:
    metrics = [name for name in METRICS if set(NEEDS[name]) <= set(asked.variants)]
    rows = {variant: k for k, variant in enumerate(asked.variants)}
    value = np.full((len(metrics), len(asked.examples)), np.nan)
    left_out = np.full(value.shape, "", dtype=object)
    for k, name in enumerate(metrics):
        needed = [rows[variant] for variant in NEEDS[name]]
        wanted = [name != "vis" or variant != "black" for variant in NEEDS[name]]
        met = np.all([(right[row] == 1) == yes for row, yes in zip(needed, wanted, strict=True)], axis=0)
        value[k] = np.where(np.isnan(right[needed]).any(0), np.nan, met)
        for row, variant in reversed(list(zip(needed, NEEDS[name], strict=True))):
            for column in np.flatnonzero(why[row] != ""):
                reason = why[row, column]
                left_out[k, column] = reason if reason in APART else f"{variant}: {reason}"
    by_variant, by_metric, examples = ("variant", "example"), ("metric", "example"), asked.examples
    return xr.Dataset(
        {
            "right": (by_variant, right),
            "answer": (by_variant, answer.astype(str)),
            "why": (by_variant, why.astype(str)),
            "note": (by_variant, note.astype(str)),
            "value": (by_metric, value),
            "left_out": (by_metric, left_out.astype(str)),
            "description": ("example", [str(e.meta.get("description") or "") for e in examples]),
            "described_by": ("example", [described_by(e) for e in examples]),
        },
        coords={
            "variant": list(asked.variants),
            "metric": metrics,
            "example": [example.id for example in examples],
            "task": ("example", [example.task for example in examples]),
            "cluster": ("example", [cluster_of(example) for example in examples]),
        },
        attrs={"template": asked.template, "decoding": "greedy"},
    )
