"""How often a claim was looked at on a pair, so that asking again until it is true is not taken for an answer.

A claim on its bound is supported by one look in twenty, and by one of ten looks in three. The ledger keeps, beside the
result, every look: pair, claim, prompts and verdict. A look is told by its prompts: the same prompts again are the
same look. What counts:

    The family says how far its prompts grow (`Family.n_max`): alpha is spent over the looks, each of which is on the
    prompts of the last and further ones (`interp.statistics.looks`). All together err as one would.

    It does not: the first look is the test. A later one, on other prompts or with another bound, can only confirm: its
    verdict stands where what an earlier one found implies it (at least .2 implies at least .1, not .3) at a level no
    laxer. Else it is undecided, whatever its p, and marked exploratory. A bound, level or correction that is easily
    passed would otherwise buy all that are not.

What is asked has one form: components in order, A over B and B under A the same, and at least and at most the two sides
of one question.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError, one_line, shown
from interp.hypotheses.claim import Claim, Family
from interp.questions.examples import Example, fingerprint
from interp.statistics.looks import NEAREST

Look = list[dict[str, Any]]
"""The lines of one look that ask the same."""
OTHER_SIDE = {"supported": "refuted", "refuted": "supported"}
"""What a verdict on "at least" is on "at most"."""
STRICTEST_FIRST = ("holm", "bh", "none")


@dataclass(frozen=True)
class Looks:
    """The looks at one claim on one pair, this one last.

    Attributes:
        number: of this one, from 1.
        first: of the earlier verdicts at the bound nearest to this one, as verdicts on this claim, the first that
            decided something, or else the last; "" before the first look.
        shares: of `n_max`, at each look; empty where the prompts are not to grow.
        implied: the verdicts on this claim that follow from an earlier one.
    """

    number: int = 1
    first: str = ""
    shares: tuple[float, ...] = ()
    implied: frozenset[str] = frozenset()


class Ledger:
    """A file of looks, one JSON object a line.

    Args:
        path: the file; made when the first look is written.

    Raises:
        FrankenlensError: it is there and cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._known: list[dict[str, Any]] = []
        if not self.path.exists():
            return
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self._known = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError, RecursionError) as error:
            raise FrankenlensError(
                f"{self.path} is to hold the looks at claims, and cannot be read ({one_line(error)}); mend it or move "
                "it away"
            ) from None
        for number, one in enumerate(self._known, 1):
            if not _is_look(one):
                raise FrankenlensError(
                    f"{self.path}, line {number} is no look at a claim ({shown(one)}); mend it or move the file away"
                )

    def looks(
        self, pair: str, family: Family, claims: Mapping[str, Claim], examples: Sequence[Example]
    ) -> dict[str, Looks]:
        """Of every claim by name, this look among those before.

        Raises:
            FrankenlensError: prompts that are to grow, and leave out some of the last look's, are the same again under
                something else that was registered, or exceed `n_max`; another `n_max` than before.
        """
        prompts = sorted({fingerprint(example) for example in examples})
        if family.n_max is not None and len(prompts) > family.n_max:
            raise FrankenlensError(
                f"{len(prompts)} prompts, and the family was registered with n_max {family.n_max}; give fewer (--n)"
            )
        registered = _registered(family, claims)
        return {name: self._look(pair, family, claim, prompts, registered) for name, claim in claims.items()}

    def _look(self, pair: str, family: Family, claim: Claim, prompts: list[str], registered: str) -> Looks:
        before = self._before(pair, claim, prompts, registered)
        same = [look for look in before if look[0]["prompts"] == prompts]
        _require_the_same_end(claim, family, same if family.n_max is None else before)
        seen = {"first": _first(claim, before), "implied": _implied(claim, family, before)}
        if family.n_max is None:
            return Looks(len(before) + 1, **seen)
        sizes = [len(look[0]["prompts"]) for look in before]
        if before and (lost := len(set(before[-1][0]["prompts"]) - set(prompts))):
            raise FrankenlensError(
                f"claim {claim.name!r} was looked at on {sizes[-1]} prompts, and {lost} of them are not among these "
                f"{len(prompts)}: prompts that grow (n_max) keep those they had. Give the same --seed and "
                "data and a larger --n, or register the claim anew without n_max."
            )
        if before and sizes[-1] == len(prompts):
            raise FrankenlensError(
                f"claim {claim.name!r} was looked at on these {len(prompts)} prompts, with other claims, bounds, level "
                f"or decision than family {family.name!r} has now; with n_max a look is a larger sample. "
                "Give more prompts (--n), or what was registered then."
            )
        shares = tuple(size / family.n_max for size in (*sizes, len(prompts)))
        if before and shares[-1] - shares[-2] < NEAREST * (1 - 1e-6):
            raise FrankenlensError(
                f"claim {claim.name!r} was looked at on {sizes[-1]} prompts, and these are {len(prompts)}; of n_max "
                f"{family.n_max} each look adds {math.ceil(NEAREST * family.n_max)} at least. Give more (--n)."
            )
        return Looks(len(before) + 1, shares=shares, **seen)

    def write(
        self,
        pair: str,
        family: Family,
        claims: Mapping[str, Claim],
        examples: Sequence[Example],
        said: Mapping[str, str],
    ) -> None:
        """Keep this look; one at the same prompts, of the same that was registered, is there already.

        Args:
            pair, family, claims, examples: as in `looks`.
            said: the verdict by claim.
        """
        prompts = sorted({fingerprint(example) for example in examples})
        registered, new = _registered(family, claims), []
        for name, claim in claims.items():
            if said[name] == "refused":
                continue  # nothing was seen
            question, relation, bound = claim.asked
            entry = {
                "pair": pair,
                "family": family.name,
                "claim": claim.text,
                "question": _digest(question),
                "relation": relation,
                "bound": bound,
                "alpha": family.alpha,
                "correction": family.correction,
                "level": family.level,
                "registered": registered,
                "n_max": family.n_max,
                "verdict": said[name],
                "prompts": prompts,
            }
            if not any(_same(entry, one) for one in [*self._known, *new]):
                new.append(entry)
        if not new:
            return
        self._known += new
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in new)
        except OSError as error:
            raise FrankenlensError(
                f"the looks at claims are kept in {self.path}, which cannot be written ({error.strerror}); name "
                "another file (--ledger)"
            ) from None

    def _before(self, pair: str, claim: Claim, prompts: list[str], registered: str) -> list[Look]:
        """Looks at this question on this pair up to this one, if it was there; of each, every claim that asked it.

        Claims with several bounds that are registered together are one look, and corrected together.
        """
        question = _digest(claim.asked[0])
        looks: dict[tuple[str, ...], Look] = {}
        for one in self._known:
            if (one["pair"], one["question"]) != (pair, question):
                continue
            look = (one["registered"], *one["prompts"])
            if look == (registered, *prompts):
                break  # this one, and what came after it
            looks.setdefault(look, []).append(one)
        return list(looks.values())


def _require_the_same_end(claim: Claim, family: Family, before: Sequence[Look]) -> None:
    """How far prompts grow says how alpha is spent, so it is fixed before the first look."""
    others = {look[0]["n_max"] for look in before} - {family.n_max}
    if others:
        was = ", ".join("none" if one is None else str(one) for one in sorted(others, key=lambda n: n or 0))
        raise FrankenlensError(
            f"claim {claim.name!r} was looked at with another n_max than {family.n_max or 'none'} before ({was}); how "
            "far prompts grow is fixed before the first look"
        )


def _registered(family: Family, claims: Mapping[str, Claim]) -> str:
    """What was claimed together, how it is judged, and how far it grows."""
    judged = (family.alpha, family.correction, family.n_max, family.decision)
    return _digest(json.dumps([judged, sorted({claim.asked for claim in claims.values()})]))


def _is_look(one: Any) -> bool:
    """Whether a line holds what is read of it."""
    if not isinstance(one, dict):
        return False
    prompts, n_max = one.get("prompts"), one.get("n_max")
    return (
        all(isinstance(one.get(name), str) for name in ("pair", "question", "verdict", "registered"))
        and all(_is_number(one.get(name)) for name in ("bound", "alpha", "level"))
        and one.get("relation") in (">=", "<=")
        and one.get("correction") in STRICTEST_FIRST
        and isinstance(prompts, list)
        and all(isinstance(prompt, str) for prompt in prompts)
        and "n_max" in one
        and (n_max is None or _is_number(n_max))
    )


def _is_number(one: Any) -> bool:
    return isinstance(one, int | float) and not isinstance(one, bool)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("pair", "question", "relation", "bound", "registered", "prompts"))


def _verdict_on(claim: Claim, one: Mapping[str, Any]) -> str:
    """What an earlier verdict says on the side that this claim is on."""
    said: str = one["verdict"]
    return said if one["relation"] == claim.asked[1] else OTHER_SIDE.get(said, said)


def _first(claim: Claim, before: Sequence[Look]) -> str:
    bound = claim.asked[2]
    nearest = [min(look, key=lambda one: abs(one["bound"] - bound)) for look in before]
    verdicts = [_verdict_on(claim, one) for one in nearest]
    return next((one for one in verdicts if one in OTHER_SIDE), verdicts[-1] if verdicts else "")


def _implied(claim: Claim, family: Family, before: Sequence[Look]) -> frozenset[str]:
    """Verdicts on this claim that an earlier one implies, which was reached at a level no laxer than this family's."""
    _, relation, bound = claim.asked
    up, found = 1 if relation == ">=" else -1, set()
    for one in (one for look in before for one in look):
        laxer = (
            one["alpha"] > family.alpha
            or one["level"] > family.level
            or STRICTEST_FIRST.index(one["correction"]) > STRICTEST_FIRST.index(family.correction)
        )
        harder = up * (one["bound"] - bound)  # above 0: a bound that is harder to support, easier to refute
        said = _verdict_on(claim, one)
        if not laxer and (harder >= 0 if said == "supported" else said == "refuted" and harder <= 0):
            found.add(said)
    return frozenset(found)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
