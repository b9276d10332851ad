"""What became of a claim: as an object, as text, as a row of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from interp.hypotheses.claim import Claim
from interp.statistics import Interval, interval_text

VERDICTS = ("supported", "refuted", "undecided", "refused")


@dataclass(frozen=True)
class Verdict:
    """What became of one claim.

    Attributes:
        claim: as it was registered, regions resolved.
        verdict: of `VERDICTS`; "refused" where nothing can be tested, see `reason`.
        interval: of the quantity, at 1 - 2 alpha, not corrected (the two one-sided tests' counterpart).
        control: the same quantity of the control (`interp.hypotheses.measure.measure`), likewise.
        p, p_against: one-sided, corrected: for the claim, and against it.
        p_control: one-sided, corrected: the component moves more than its control, in magnitude; NaN for a claim that
            something is small. A claim whose control moves more than its component is not supported, whatever its p.
        power: chance of support at this n, and at this look, the whole family corrected, if the quantity were
            `claim.alternative`.
        detectable: value of the quantity that would be supported with 80 % power at this n, when corrected as the
            strongest claim (normal scores).
        n: examples with a value.
        units: independent ones among them: clusters, by image where nothing else is given.
        n_needed: for 80 % power at `claim.alternative`, likewise, at one further look where looks are planned; None
            where there is no alternative.
        origin: of `interp.hypotheses.claim.ORIGINS`.
        reason: why refused, not testable or, though the numbers would do, not decided.
        population: what the prompts were, and so what the claim is about.
        look: the how manieth on this pair (`interp.hypotheses.ledger`); 1 without a ledger.
    """

    claim: Claim
    verdict: str
    interval: Interval
    control: Interval
    p: float = math.nan
    p_against: float = math.nan
    p_control: float = math.nan
    power: float = math.nan
    detectable: float = math.nan
    n: int = 0
    n_needed: int | None = None
    origin: str = "not stated"
    reason: str = ""
    units: int = 0
    population: str = ""
    look: int = 1

    def require(self) -> None:
        """For tests: pass where the claim is supported.

        Raises:
            AssertionError: it is not; with everything a reader has to see.
        """
        __tracebackhide__ = True  # pytest shows the caller
        if self.verdict != "supported":
            raise AssertionError(self.text)

    @property
    def line(self) -> str:
        """The verdict in a line."""
        mark = (
            ""
            if self.origin == "held out"
            else f" [{self.origin.replace('not stated', 'origin not stated')}]"
        )
        value = (
            ""
            if self.verdict == "refused"
            else f", {self.claim.quantity} {shown(self.interval)}, n = {self.n}"
        )
        return f"{self.verdict}{mark}: {self.claim.name}{value}"

    @property
    def control_says(self) -> str:
        """Whether the control does as well: "beyond control", "as its control", or "" for a claim of little or none."""
        if math.isnan(self.p_control):
            return ""
        return "beyond control" if self.p_control <= self.claim.alpha else "not told from control"

    @property
    def _size(self) -> str:
        return f"n = {self.n}" + (f" in {self.units} clusters" if self.units < self.n else "")

    @property
    def text(self) -> str:
        """Everything a reader has to see, in a few lines."""
        again = ", or looked at again" if self.look > 1 else ""
        mark = {"exploratory": f" [EXPLORATORY: tested on prompts it was found on{again}]", "held out": ""}
        marked = mark.get(self.origin, " [what it was found on is not stated]")
        at_n = f" at n = {self.n}" if self.verdict == "undecided" else ""
        lines = [f"{self.claim.name}: {self.verdict.upper()}{at_n}{marked}", f"  claim     {self.claim.text}"]
        if self.claim.where:
            lines.append(f"  written   {self.claim.where}")
        if self.verdict == "refused":
            return "\n".join([*lines, f"  reason    {self.reason}"])
        level = f"{100 * self.claim.confidence:g} %"
        lines += [
            f"  measured  {shown(self.interval)} ({level} interval, {self._size})",
            f"  control   {shown(self.control)} {self.control_says}".rstrip(),
            f"  test      p = {self.p:.3g} for, {self.p_against:.3g} against (one-sided, corrected), "
            f"alpha {self.claim.alpha:g}",
        ]
        if self.population:
            lines.append(f"  of        {self.population}")
        if self.look > 1:
            lines.append(f"  look      {self.look} at this claim on this pair")
        if self.reason:
            lines.append(f"  reason    {self.reason}")
        if self.claim.alternative is not None and not math.isnan(self.power):
            needed = "" if self.n_needed is None else f"; 80 % needs n = {self.n_needed}"
            lines.append(f"  power     {self.power:.0%} if it were {self.claim.alternative:.3g}{needed}")
        if not math.isnan(self.detectable):
            lines.append(f"  power     80 % at this n if it were {self.detectable:.3g}")
        return "\n".join(lines)


def verdict_table(verdicts: list[Verdict], pair: str = "") -> pd.DataFrame:
    """One row per claim: what was claimed, what was found, and what it rests on."""
    rows = []
    for v in verdicts:
        c = v.claim
        rows.append(
            {
                "claim": c.name,
                "pair": pair,
                "verdict": v.verdict,
                "value": float(v.interval.value),
                "low": float(v.interval.low),
                "high": float(v.interval.high),
                "quantity": c.quantity,
                "relation": c.relation,
                "bound": c.bound,
                "component": " + ".join(c.component),
                "more_than": " + ".join(c.more_than),
                "body": c.body,
                "role": c.role,
                "direction": c.direction,
                "n": v.n,
                "units": v.units,
                "look": v.look,
                "population": v.population,
                "alpha": c.alpha,
                "p_corrected": v.p,
                "p_against_corrected": v.p_against,
                "control": float(v.control.value),
                "control_low": float(v.control.low),
                "control_high": float(v.control.high),
                "p_beyond_control_corrected": v.p_control,
                "control_says": v.control_says,
                "expected": math.nan if c.alternative is None else c.alternative,
                "power": v.power,
                "n_needed": v.n_needed,
                "detectable": v.detectable,
                "origin": v.origin,
                "reason": v.reason,
                "where": c.where,
            }
        )
    return pd.DataFrame(rows).astype({"n_needed": "Int64"})


def shown(interval: Interval) -> str:
    """Value and interval for people."""
    return interval_text(interval.value, interval.low, interval.high)
