"""A plan: the work of a command, and what it takes on one device, several, or many workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.plan.machine import amount, duration
from interp.plan.resident import Turning
from interp.plan.work import Work


@dataclass(frozen=True)
class Plan:
    """What a command takes.

    Attributes:
        command: its name.
        works: its steps.
        weights: model to the bytes of its weights.
        rate: FLOPs a second of one device.
        rate_is: where the rate is from, in words.
        devices: that each worker's models are split over, layer by layer.
        workers: that the prompts are shared out over, each with models of its own.
        on_host: whether the device is the host itself.
        assumed: what was taken for granted, in words.
        uncounted: what no number covers, in words.
        cuts: what would make it fit, in words.
        turning: of a pair with one model in memory; `weights` then hold what RL takes beyond IN.
    """

    command: str
    works: Sequence[Work]
    weights: Mapping[str, int]
    rate: float
    rate_is: str = "stated"
    devices: int = 1
    workers: int = 1
    on_host: bool = True
    assumed: Sequence[str] = ()
    uncounted: Sequence[str] = ()
    cuts: Sequence[str] = field(default_factory=tuple)
    turning: Turning | None = None

    @property
    def flops(self) -> int | float:
        """Of all steps, whoever does them; what every worker does is counted once."""
        return sum(work.flops for work in self.works)

    @property
    def runs(self) -> int | float:
        """Forward passes, steps of generation and interventions, each on a batch."""
        return sum(work.runs for work in self.works)

    @property
    def widest(self) -> Work:
        """The step that holds most."""
        return max(self.works, key=lambda work: work.peak)

    @property
    def held(self) -> dict[str, int]:
        """Item to bytes on one device at the widest moment, weights first."""
        weights = {f"weights of {name}": size // self.devices for name, size in self.weights.items()}
        return {**weights, **self.widest.held}

    @property
    def peak(self) -> int:
        """Bytes on one device."""
        return sum(self.held.values())

    @property
    def host(self) -> int:
        """Bytes of main memory of one worker: where devices have their own, a model passes through it to them."""
        return self.peak if self.on_host else max(self.weights.values(), default=0)

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that are read, and of the results."""
        unread = 0 if self.turning is None else self.turning.whole - self.turning.changes
        return sum(self.weights.values()) + unread + sum(work.disk for work in self.works)

    @property
    def seconds(self) -> float:
        """Of the slowest worker: its share of what grows with the prompts, and all of what does not."""
        shared = sum(work.flops for work in self.works if work.scales) / self.workers
        return (shared + sum(work.flops for work in self.works if not work.scales)) / self.rate

    @property
    def turns(self) -> int | float:
        """How often one memory is turned to the other model, to and fro, at most: whenever one is taken into use."""
        return 0 if self.turning is None else 2 * sum(work.used for work in self.works)

    def table(self) -> str:
        """The plan in lines of a terminal."""
        width = max([len(work.what) for work in self.works] + [24])
        lines = [f"{'':<{width}}  {'runs':>10}  {'arithmetic':>12}  {'time':>9}  {'held beside weights':>19}"]
        lines += [_line(work.what, work, self.rate, width) for work in self.works]
        total = Work("all", self.runs, self.flops, self.widest.held)
        lines += [_line("together", total, self.rate, width), ""]
        lines += [f"at most on one device, in {self.widest.what!r}: {_bytes(self.peak)}"]
        lines += [f"  {_bytes(size):>9}  {name}" for name, size in self.held.items() if size]
        where = "the same" if self.on_host else _bytes(self.host)
        lines += [f"main memory: {where}; read from and left on disk: {_bytes(self.disk)}"]
        lines += [f"rate: {amount(self.rate, 'FLOP')}/s, {self.rate_is}; {duration(self.seconds)} in all"]
        lines += self._spread() + self._turned()
        lines += [f"assumed: {one}" for one in self.assumed]
        lines += [f"not counted: {one}" for one in self.uncounted]
        return "\n".join([*lines, *self.cuts])

    def _spread(self) -> list[str]:
        told = []
        if self.devices > 1:
            told.append(
                f"{self.devices} devices: each holds its layers, and they work one after another, so that "
                "the time is that of one"
            )
        if self.workers > 1:
            once = [work.what for work in self.works if not work.scales]
            again = f"; done by one of them alone: {', '.join(once)}" if once else ""
            size = _bytes(sum(self.weights.values()))
            told.append(
                f"{self.workers} workers: prompts are shared out, the models ({size}) are there once a worker{again}"
            )
        return told

    def _turned(self) -> list[str]:
        own = self.turning
        if own is None:
            return []
        each = f"{_bytes(own.moved)} read and written each time"
        if own.seconds is not None:
            each += (
                f", {duration(own.seconds)} here; {duration(own.seconds * self.turns)} in all, beside that"
            )
        return [
            f"one model in memory: RL differs in {own.share:.1%} of the entries, {own.share_is}; changed over at most "
            f"{self.turns:,.0f} times: {each}"
        ]

    def data(self) -> dict[str, Any]:
        """The plan as JSON."""
        names = ("command", "flops", "runs", "held", "peak", "host", "disk", "rate", "rate_is", "seconds")
        works = [{**vars(work), "held": dict(work.held)} for work in self.works]
        more = {"devices": self.devices, "workers": self.workers, "assumed": list(self.assumed)}
        told: dict[str, Any] = {"uncounted": list(self.uncounted), "cuts": list(self.cuts)}
        if self.turning is not None:
            told["turning"] = {**vars(self.turning), "moved": self.turning.moved, "turns": self.turns}
        return {name: getattr(self, name) for name in names} | {"works": works} | more | told


def _bytes(n: int | float) -> str:
    return amount(n, "B", 1024)


def _line(what: str, work: Work, rate: float, width: int) -> str:
    flops, took = amount(work.flops, "FLOP"), duration(work.flops / rate)
    return f"{what:<{width}}  {work.runs:>10,.0f}  {flops:>12}  {took:>9}  {_bytes(work.peak):>19}"
