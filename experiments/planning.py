"""`frankenlens plan COMMAND`, and `--plan` on a command: what it would take, from configurations alone.

A command says in its `plan` which work it is; one that has none is refused by name, rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import tyro

from experiments.contract import SAMPLE as TRIED
from experiments.contract import admitted
from experiments.frame import Command
from experiments.options import from_command_line
from experiments.settings import PairSettings, checkpoints, prompt_settings, require_sound
from hooks.errors import FrankenlensError
from hooks.memory import memory_limit, parse_bytes
from interp.plan.machine import amount, measured_rate, parse_rate
from interp.plan.plan import Plan
from interp.plan.prompts import SAMPLE, Workload, stated
from interp.plan.runs import Runs
from interp.plan.structure import Weightless, at_tokens, weightless
from interp.plan.work import Work
from interp.prompts import Prompt, PromptBuilder
from interp.results.whole import write_whole


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
    device_memory: str | None = None


@dataclass(frozen=True)
class Bench:
    """What a command plans with: the structure of its models, and what they are asked.

    Attributes:
        settings: of the plan.
        config: of the command.
        vlm: the structure of the models of the pair.
        examples: of those that the command asks; empty where numbers are stated.
        prompts: some of its prompts.
        n: how many there are.
    """

    settings: PlanSettings
    config: Any
    vlm: Weightless
    examples: Sequence[Any]
    prompts: Sequence[Prompt]
    n: int

    @cached_property
    def workload(self) -> Workload:
        """What the models are asked."""
        own = self.settings
        trace = self.config.max_new_tokens if own.trace_tokens is None else own.trace_tokens
        return Workload(self.prompts, self.n, trace, own.decided, own.decided_at, own.tries)

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
        return _builder(self.vlm, self.config)

    def runs(self, batch_size: int | None = None) -> Runs:
        """Of one model, so many prompts at a time as the command's settings say."""
        return Runs(self.vlm, batch_size or self.config.batch_size)


@dataclass(frozen=True)
class Planned:
    """What a command is planned by.

    Attributes:
        works: its steps, of all of its prompts.
        base: whether Base is opened too, where the settings or the shipped triple have one.
    """

    works: Callable[[Bench, Any], Iterable[Work]]
    base: bool = False


def plan(name: str, command: Any, args: Sequence[str]) -> Plan:
    """Plan a command, print the plan, and write plan.json to `--out` where that is given.

    Args:
        name: of the command.
        command: what `experiments.cli` runs.
        args: of the command line, the command's and the plan's.

    Raises:
        FrankenlensError: no honest count exists of this command; settings contradict each other.
    """
    if not isinstance(command, Command) or command.plan is None:
        raise FrankenlensError(
            f"there is no plan of {name} yet: what it computes is counted nowhere, and a guess is no plan. "
            "frankenlens plan --help names the commands that have one."
        )
    settings, config = read(name, command, args)
    require_sound(config)
    command.check(config)
    made = planned(name, command, config, settings)
    print(made.table())
    if any(arg == "--out" or arg.startswith("--out=") for arg in args):
        config.out.mkdir(parents=True, exist_ok=True)
        write_whole(config.out / "plan.json", json.dumps(made.data(), indent=1).encode())
        print(f"{config.out}: plan.json")
    return made


def read(name: str, command: Command, args: Sequence[str]) -> tuple[PlanSettings, Any]:
    """The options of the plan, and those of the command, from one command line."""
    settings, rest = tyro.cli(
        PlanSettings, prog=f"frankenlens plan {name}", args=list(args), return_unknown_args=True
    )
    return settings, from_command_line(command.settings, rest, f"frankenlens {name}")


def planned(name: str, command: Command, config: Any, settings: PlanSettings) -> Plan:
    """The plan of a command, and what to cut where it does not fit."""
    with memory_limit(config.max_memory):
        bench = bench_of(command, config, settings)
        made = _plan(name, command, bench)
        budget = parse_bytes(settings.device_memory)
        if budget is None or made.peak <= budget:
            return made
        return replace(
            made, cuts=tuple(_cuts(made, budget, lambda other: _plan(name, command, other), bench))
        )


def bench_of(command: Command, config: Any, settings: PlanSettings) -> Bench:
    """What the command plans with; its questions are read where no numbers are stated, its models never."""
    vlm = weightless(checkpoints(config)[0], config.dtype, settings.on)
    if settings.tokens is not None:
        n = config.n
        some = min(n, SAMPLE, max(2, config.batch_size))  # they are all alike
        prompts = stated(some, settings.tokens, settings.image_tokens)
        return Bench(settings, config, vlm, (), prompts, n)
    examples = list(getattr(command.load(config), "examples", ()))
    if not examples:
        raise FrankenlensError("this command asks no questions that a plan can read; state --tokens")
    some = examples[:: -(-len(examples) // SAMPLE)]
    builder = _builder(vlm, config)
    return Bench(settings, config, vlm, some, [builder.build(one) for one in some], len(examples))


def _builder(vlm: Weightless, config: PairSettings) -> PromptBuilder:
    if vlm.processor is None:
        raise FrankenlensError(
            "the models have no processor here, so no prompts are made: state --tokens (and --image-tokens)"
        )
    return PromptBuilder(vlm.processor, config.trace_format, n_logits=vlm.n_logits, **prompt_settings(config))


def _plan(name: str, command: Command, bench: Bench) -> Plan:
    assert command.plan is not None
    settings, runs = bench.settings, bench.runs()
    works = [*_tried(command, bench), *command.plan.works(bench, bench.config)]
    base = checkpoints(bench.config)[2] if command.plan.base else bench.config.base
    names = ["IN", "RL", *(["Base"] if base else [])]
    rate = parse_rate(settings.rate) if settings.rate else measured_rate(bench.vlm.model.dtype, settings.on)
    return Plan(
        name,
        works,
        dict.fromkeys(names, runs.footprint.weights()),
        rate,
        "stated" if settings.rate else "a matrix product on this machine; a whole model is slower",
        settings.devices,
        settings.workers,
        settings.on == "cpu",
        _assumed(bench),
        runs.arithmetic.uncounted,
    )


def _tried(command: Command, bench: Bench) -> Iterator[Work]:
    """Texts that show, before anything is measured, whether what the models write can be read."""
    if command.admit is admitted:
        asked, n = bench.workload, min(bench.n, TRIED)
        steps = [asked.trace_tokens] * len(asked.prompts)
        one = bench.runs().written("whether texts of both models can be read", asked.prompts, steps)
        yield replace(one.times(2 * n / len(asked.prompts)), scales=False)


def _assumed(bench: Bench) -> list[str]:
    own, asked = bench.settings, bench.workload
    told = [
        f"{asked.n:,} prompts like the {len(asked.prompts)} at hand, traces of {asked.trace_tokens} tokens"
    ]
    if hasattr(bench.config, "decision"):
        told.append(f"{own.decided:.0%} of them have a decision, at {own.decided_at:.0%} of the trace")
    if getattr(bench.config, "decision", None) == "decisive":
        told.append(f"{own.tries:g} continuations are tried for each")
    if own.on == "cpu":
        told.append(
            "memory is given back when it is freed; the C library keeps some, as much again at worst "
            "(MALLOC_MMAP_THRESHOLD_=262144 in the environment gives it back)"
        )
    return told


def _cuts(made: Plan, budget: int, again: Callable[[Bench], Plan], bench: Bench) -> Iterator[str]:
    """What would make it fit, largest items first."""
    most = bench.settings.device_memory
    yield f"{amount(made.peak, 'B', 1024)} is more than --device-memory {most}; the largest items:"
    largest = sorted(made.held.items(), key=lambda item: -item[1])[:3]
    yield from (f"  {amount(size, 'B', 1024):>9}  {name}" for name, size in largest)
    weights = sum(made.weights.values())
    if weights // made.devices > budget:
        yield f"the weights alone do not fit: --devices {-(-weights // budget)} or more, or a smaller --dtype"
        return
    size = bench.config.batch_size
    while size > 1:
        size //= 2
        if again(replace(bench, config=replace(bench.config, batch_size=size))).peak <= budget:
            yield f"--batch-size {size} fits"
            return
    yield "one prompt at a time does not fit either"
    points = getattr(bench.config, "points", ())
    for point in points if len(points) > 1 else ():
        one = replace(bench.config, batch_size=1, points=(point,))
        if again(replace(bench, config=one)).peak <= budget:
            yield f"--batch-size 1 --points {point} fits"
