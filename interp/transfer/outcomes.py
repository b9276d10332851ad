"""Metrics of a transfer: what they find, and which of them read nothing but what a model writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooks import HookedVLM
from interp.pair.generation import greedy
from interp.prompts import Prompt

Ids = Sequence[Sequence[int]]
"""Token ids that were written after each prompt."""


@dataclass(frozen=True)
class Outcomes:
    """What one model did on the examples of a metric.

    Attributes:
        examples: ids, the same ones in the same order for every model.
        tasks: one per example; "" where there is only one.
        right: 1 or 0; NaN where the example could not be measured, and `why` says why not.
        why: the reason of a NaN, or what is wrong with the form of an answer that counts as wrong; "" otherwise.
        clusters: which examples hang together (`interp.questions.examples.cluster_of`); none: each stands alone.
    """

    examples: tuple[str, ...]
    tasks: tuple[str, ...]
    right: tuple[float, ...]
    why: tuple[str, ...]
    clusters: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts that a model continues greedily.

    Attributes:
        prompts: at least one.
        max_new_tokens: the most that is written after each.
        batch_size: prompts that run together, at most.
    """

    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    batch_size: int

    def written(self, vlm: HookedVLM) -> list[list[int]]:
        """What a model writes, as `greedy` returns it."""
        return greedy(vlm, self.prompts, self.max_new_tokens, self.batch_size)


@dataclass(frozen=True, eq=False)
class OfTexts:
    """A metric that is known from texts, so that several models may write them together.

    Attributes:
        texts: what is written.
        read: of each of `texts` what was written, to what the model did.
    """

    texts: tuple[Texts, ...]
    read: Callable[[Sequence[Ids]], Outcomes]

    def __call__(self, vlm: HookedVLM) -> Outcomes:
        return self.read([texts.written(vlm) for texts in self.texts])


Metric = Callable[[HookedVLM], Outcomes]
"""Runs a model and grades what it did."""


@dataclass(frozen=True)
class Together:
    """Several metrics of the same answers of a model.

    Attributes:
        names: of the metrics.
        measure: runs a model; name to what it did.
        texts: what is written, where that is all that they are known from; none: `measure` runs the model.
        read: of each of `texts` what was written, to the name and what the model did.
    """

    names: tuple[str, ...]
    measure: Callable[[HookedVLM], Mapping[str, Outcomes]]
    texts: tuple[Texts, ...] = ()
    read: Callable[[Sequence[Ids]], Mapping[str, Outcomes]] | None = None


Metrics = Mapping[str, Metric | Together]
"""By name; that of a `Together` does not matter."""


def names_of(metrics: Metrics) -> list[str]:
    """Every metric, those that are measured together among them."""
    each = ((one.names if isinstance(one, Together) else (name,)) for name, one in metrics.items())
    return [name for names in each for name in names]


def texts_of(metric: Any) -> tuple[Texts, ...]:
    """What is written for a metric; none where it runs the model in its own way."""
    return metric.texts if isinstance(metric, (OfTexts, Together)) else ()


def measured(name: str, metric: Metric | Together, vlm: HookedVLM) -> Mapping[str, Outcomes]:
    """What a model does, by metric."""
    return metric.measure(vlm) if isinstance(metric, Together) else {name: metric(vlm)}


def read(name: str, metric: Metric | Together, written: Sequence[Ids]) -> Mapping[str, Outcomes]:
    """The same of what was written for each of `texts_of`."""
    if isinstance(metric, Together) and metric.read is not None:
        return metric.read(written)
    assert isinstance(metric, OfTexts)
    return {name: metric.read(written)}


def unknown(like: Outcomes, why: str) -> Outcomes:
    """Of a variant that was not run."""
    n = len(like.examples)
    return Outcomes(like.examples, like.tasks, (float("nan"),) * n, (why,) * n, like.clusters)
