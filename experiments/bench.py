"""What a command is planned with: what is taken for granted, the structure of its models, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments.contract import SAMPLE as TRIED
from experiments.settings import prompt_settings
from hooks.errors import FrankenlensError
from interp.plan.prompts import SAMPLE, Workload, stated
from interp.plan.runs import Runs
from interp.plan.structure import Weightless, at_tokens
from interp.plan.work import Work
from interp.prompts import Prompt, PromptBuilder


@dataclass(frozen=True)
class PlanSettings:
    """What a plan takes for granted, beside the options of the command that is planned.

    Attributes:
        tokens: of each prompt, its image included; by default the questions are read, and prompts made of them.
        image_tokens: of those, of its image.
        trace_tokens: that each model writes; by default as many as --max-new-tokens lets it.
        decided: share of the prompts that have a decision.
        decided_at: where in the trace it stands, 0 to 1.
        tries: continuations tried on a prompt that RL gets right and IN wrong (decision decisive).
        on: what is planned for: cpu or cuda.
        rate: such as 50TFLOP/s, of one device; by default a matrix product is timed, where `on` is at hand.
        devices: that the models are split over.
        workers: that the prompts are shared out over.
        changed: share of the entries in which RL differs from IN (with --one-resident), 0 to 1; by default that of a
            sample of both checkpoints where these are folders, else 0.2.
        device_memory: of one device, the models' own included, such as 24GiB: where more is needed, the plan says what
            to cut.
    """

    tokens: int | None = None
    image_tokens: int = 0
    trace_tokens: int | None = None
    decided: float = 1.0
    decided_at: float = 0.5
    tries: float = 1.0
    on: str = "cpu"
    rate: str | None = None
    devices: int = 1
    workers: int = 1
    changed: float | None = None
    device_memory: str | None = None


@dataclass(frozen=True)
class Questions:
    """What is asked, read when it is first wanted; numbers where these are stated.

    Attributes:
        load: reads them.
        config, settings: whose questions they are.
        vlm: whose prompts they are made into.
    """

    load: Callable[[Any], Any]
    config: Any
    settings: PlanSettings
    vlm: Weightless

    @cached_property
    def loaded(self) -> Any:
        """What the command loads; None where numbers are stated."""
        return None if self.settings.tokens is not None else self.load(self.config)

    @cached_property
    def examples(self) -> Sequence[Any]:
        """Some that stand for all; empty where numbers are stated."""
        every = self._every
        return every[:: -(-len(every) // SAMPLE)] if every else ()

    @property
    def _every(self) -> Sequence[Any]:
        if self.settings.tokens is not None:
            return ()
        examples = list(getattr(self.loaded, "examples", ()))
        if not examples:
            raise FrankenlensError("this command asks no questions that a plan can read; state --tokens")
        return examples

    @cached_property
    def prompts(self) -> Sequence[Prompt]:
        """Of the examples."""
        own = self.settings
        if own.tokens is None:
            return [self.builder.build(one) for one in self.examples]
        some = min(self.config.n, SAMPLE, max(2, self.config.batch_size))  # they are all alike
        return stated(some, own.tokens, own.image_tokens)

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self._every) or self.config.n

    @cached_property
    def builder(self) -> PromptBuilder:
        """Makes prompts, as that of the pair."""
        if self.vlm.processor is None:
            raise FrankenlensError(
                "the models have no processor here, so no prompts are made: state --tokens (and --image-tokens)"
            )
        wording = prompt_settings(self.config)
        return PromptBuilder(
            self.vlm.processor, self.config.trace_format, n_logits=self.vlm.n_logits, **wording
        )


@dataclass(frozen=True)
class Bench:
    """What a command plans with: the structure of its models, and what they are asked.

    Attributes:
        settings: of the plan.
        config: of the command.
        vlm: the structure of the models of the pair.
        questions: that the command asks.
    """

    settings: PlanSettings
    config: Any
    vlm: Weightless
    questions: Questions

    @property
    def examples(self) -> Sequence[Any]:
        """Some of those that the command asks; empty where numbers are stated."""
        return self.questions.examples

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Some of its prompts."""
        return self.questions.prompts

    @property
    def n(self) -> int:
        """How many there are."""
        return self.questions.n

    @property
    def trace_tokens(self) -> int:
        """That each model writes."""
        own = self.settings.trace_tokens
        return self.config.max_new_tokens if own is None else own

    @cached_property
    def workload(self) -> Workload:
        """What the models are asked."""
        return self.asking(self.prompts, self.n)

    def asking(self, prompts: Sequence[Prompt], n: int) -> Workload:
        """Other prompts than all of them, by the same assumptions."""
        own = self.settings
        return Workload(prompts, n, self.trace_tokens, own.decided, own.decided_at, own.tries)

    @cached_property
    def at_tokens(self) -> bool:
        """Whether sweeps can be taken up at a token."""
        return at_tokens(self.vlm)

    @property
    def scale(self) -> float:
        """Prompts that each of those at hand stands for."""
        return self.n / len(self.prompts)

    @property
    def builder(self) -> PromptBuilder:
        """Makes prompts, as that of the pair."""
        return self.questions.builder

    def runs(self, batch_size: int | None = None) -> Runs:
        """Of one model, so many prompts at a time as the command's settings say."""
        return Runs(self.vlm, batch_size or getattr(self.config, "batch_size", 1))


@dataclass(frozen=True)
class Planned:
    """What a command is planned by.

    Attributes:
        works: its steps, of all of its prompts.
        base: whether Base is opened too, where the settings or the shipped triple have one.
        assumed: what it takes for granted beside what every plan does, in words.
        asks: whether it asks prompts, whose numbers are then named.
        weights: model to bytes, where it holds others than those of the pair.
        structure: of its models, where they are not IN's.
        load: what is read in place of what the command loads.
    """

    works: Callable[[Bench, Any], Iterable[Work]]
    base: bool = False
    assumed: Callable[[Bench, Any], Iterable[str]] | None = None
    asks: bool = True
    weights: Callable[[Bench, Any], dict[str, int]] | None = None
    structure: Callable[[Any, PlanSettings], Weightless] | None = None
    load: Callable[[Any], Any] | None = None


def tried(bench: Bench, prompts: Sequence[Any], n: int | float, models: int = 2) -> Work:
    """Texts that show, before anything is measured, whether what the models write can be read."""
    steps = [bench.trace_tokens] * len(prompts)
    one = bench.runs().written("whether texts can be read", prompts, steps)
    return replace(one.times(models * min(n, TRIED) / len(prompts)), scales=False)
