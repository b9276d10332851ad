"""`frankenlens plan COMMAND`, and `--plan` on a command: what it would take, from configurations alone.

A command says in its `plan` which work it is; one that has none is refused by name, rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import tyro

from experiments.bench import Bench, Planned, PlanSettings, Questions, tried
from experiments.contract import admitted
from experiments.frame import Command, Recipe
from experiments.options import from_command_line
from experiments.settings import checkpoints, require_sound
from hooks.errors import FrankenlensError
from hooks.memory import memory_limit, parse_bytes
from interp.plan.machine import amount, measured_rate, parse_rate
from interp.plan.plan import Plan
from interp.plan.resident import TYPICAL, Turning, measured_share, turning
from interp.plan.structure import weightless
from interp.plan.work import Work
from interp.results.whole import write_whole

Planable = Command[Any, Any, Any] | Recipe[Any]
"""What has a plan, or may get one."""


def plan(name: str, command: Any, args: Sequence[str]) -> Plan:
    """Plan a command, print the plan, and write plan.json to `--out` where that is given.

    Args:
        name: of the command.
        command: what `experiments.cli` runs.
        args: of the command line, the command's and the plan's.

    Raises:
        FrankenlensError: no honest count exists of this command; settings contradict each other.
    """
    if getattr(command, "plan", None) is None:
        raise FrankenlensError(
            f"there is no plan of {name} yet: what it computes is counted nowhere, and a guess is no plan. "
            "frankenlens plan --help names the commands that have one."
        )
    settings, config = read(name, command, args)
    if isinstance(command, Command):
        require_sound(config)
        command.check(config)
    made = planned(name, command, config, settings)
    print(made.table())
    if any(arg == "--out" or arg.startswith("--out=") for arg in args):
        config.out.mkdir(parents=True, exist_ok=True)
        write_whole(config.out / "plan.json", json.dumps(made.data(), indent=1).encode())
        print(f"{config.out}: plan.json")
    return made


def read(name: str, command: Planable, args: Sequence[str]) -> tuple[PlanSettings, Any]:
    """The options of the plan, and those of the command, from one command line."""
    settings, rest = tyro.cli(
        PlanSettings, prog=f"frankenlens plan {name}", args=list(args), return_unknown_args=True
    )
    return settings, from_command_line(command.settings, rest, f"frankenlens {name}")


def planned(name: str, command: Planable, config: Any, settings: PlanSettings) -> Plan:
    """The plan of a command, and what to cut where it does not fit."""
    with memory_limit(getattr(config, "max_memory", None)):
        bench = bench_of(command, config, settings)
        made = _plan(name, command, bench)
        budget = parse_bytes(settings.device_memory)
        if budget is None or made.peak <= budget:
            return made
        return replace(
            made, cuts=tuple(_cuts(made, budget, lambda other: _plan(name, command, other), bench))
        )


def bench_of(command: Planable, config: Any, settings: PlanSettings) -> Bench:
    """What the command plans with; its questions are read where no numbers are stated, its models never."""
    own = _planned_by(command)
    if own.structure is not None:
        vlm = own.structure(config, settings)
    else:
        vlm = weightless(checkpoints(config)[0], getattr(config, "dtype", "auto"), settings.on)
    load = own.load or getattr(command, "load", _nothing)
    return Bench(settings, config, vlm, Questions(load, config, settings, vlm))


def _nothing(config: Any) -> None:
    """What a recipe asks."""


def works_of(command: Planable, bench: Bench) -> Iterator[Work]:
    """The steps of a command, with what is tried before anything is measured."""
    if isinstance(command, Command) and command.admit is admitted and _planned_by(command).asks:
        yield tried(bench, bench.prompts, bench.n)
    yield from _planned_by(command).works(bench, bench.config)


def _planned_by(command: Planable) -> Planned:
    assert isinstance(command.plan, Planned)
    return command.plan


def _plan(name: str, command: Planable, bench: Bench) -> Plan:
    own, settings, runs = _planned_by(command), bench.settings, bench.runs()
    works, turned = list(works_of(command, bench)), _turning(own, bench)
    rate = parse_rate(settings.rate) if settings.rate else measured_rate(bench.vlm.model.dtype, settings.on)
    return Plan(
        name,
        works,
        _weights(own, bench, turned),
        rate,
        "stated" if settings.rate else "a matrix product on this machine; a whole model is slower",
        settings.devices,
        settings.workers,
        settings.on == "cpu",
        list(_assumed(command, bench)),
        runs.arithmetic.uncounted,
        turning=turned,
    )


def _turning(own: Planned, bench: Bench) -> Turning | None:
    """Of a pair with one model in memory; None of others."""
    config, settings = bench.config, bench.settings
    if own.weights is not None or not getattr(config, "one_resident", False):
        return None
    share, told = settings.changed, "as stated"
    if share is None:
        share, told = measured_share(*checkpoints(config)[:2], config.dtype), "on a sample of each tensor"
    if share is None:
        share, told = TYPICAL, "as RL often does in bfloat16 (state --changed)"
    if not 0 <= share <= 1:
        raise FrankenlensError(f"--changed is {share:g}; give a share of the entries, 0 to 1.")
    return turning(bench.vlm.model, share, told, settings.on == "cpu")


def _weights(own: Planned, bench: Bench, turned: Turning | None) -> dict[str, int]:
    if own.weights is not None:
        return own.weights(bench, bench.config)
    base = checkpoints(bench.config)[2] if own.base else bench.config.base
    names = ["IN", "RL", *(["Base"] if base else [])]
    whole = bench.runs().footprint.weights()
    found = dict.fromkeys(names, whole)
    if turned is None:
        return found
    return {**found, "RL": turned.changes + whole - turned.whole}  # its buffers are its own


def assumed_by(command: Planable, bench: Bench) -> Iterator[str]:
    """What a command takes for granted, in words."""
    planned_by, own = _planned_by(command), bench.settings
    if planned_by.asks:
        asked = bench.workload
        yield f"{asked.n:,} prompts like the {len(asked.prompts)} at hand, traces of {asked.trace_tokens} tokens"
    if hasattr(bench.config, "decision"):
        yield f"{own.decided:.0%} of them have a decision, at {own.decided_at:.0%} of the trace"
    if getattr(bench.config, "decision", None) == "decisive":
        yield f"{own.tries:g} continuation{'' if own.tries == 1 else 's'} tried for each"
    if planned_by.assumed is not None:
        yield from planned_by.assumed(bench, bench.config)


def _assumed(command: Planable, bench: Bench) -> Iterator[str]:
    yield from assumed_by(command, bench)
    if bench.settings.on == "cpu":
        yield (
            "memory is given back when it is freed; the C library keeps some, as much again at worst "
            "(MALLOC_MMAP_THRESHOLD_=262144 in the environment gives it back)"
        )


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
    size = getattr(bench.config, "batch_size", 1)
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
