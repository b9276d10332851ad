"""How often a claim was looked at on a pair, so that asking again until it is true is not taken for an answer.

A claim on its bound is supported by one look in twenty, and by one of ten looks in three. The ledger keeps, beside the
result, every look: pair, claim, prompts and verdict. A look is told by its prompts: the same prompts again are the
same look. What counts:

    The family says how far its prompts grow (`Family.n_max`): alpha is spent over the looks, each of which is on the
    prompts of the last and further ones (`interp.statistics.looks`). All together err as one would.

    It does not: the first look is the test. A later one, on other prompts or with another bound, is exploratory: it may
    confirm the first verdict, and is undecided otherwise, whatever its p.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError, one_line, shown
from interp.hypotheses.claim import Claim, Family
from interp.questions.examples import Example, fingerprint


@dataclass(frozen=True)
class Looks:
    """The looks at one claim on one pair, this one last.

    Attributes:
        number: of this one, from 1.
        first: the first verdict that decided something, or else the last; "" before the first look.
        shares: of `n_max`, at each look; empty where the prompts are not to grow.
    """

    number: int = 1
    first: str = ""
    shares: tuple[float, ...] = ()


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
            FrankenlensError: prompts that are to grow, and leave out some of the last look's, or exceed `n_max`.
        """
        prompts = sorted({fingerprint(example) for example in examples})
        if family.n_max is not None and len(prompts) > family.n_max:
            raise FrankenlensError(
                f"{len(prompts)} prompts, and the family was registered with n_max {family.n_max}; give fewer (--n)"
            )
        found, registered = {}, _registered(claims)
        for name, claim in claims.items():
            before = self._before(pair, claim, prompts, registered)
            if family.n_max is None:
                found[name] = Looks(len(before) + 1, _first(before))
                continue
            sizes = [len(one["prompts"]) for one in before]
            if before and (lost := len(set(before[-1]["prompts"]) - set(prompts))):
                raise FrankenlensError(
                    f"claim {name!r} was looked at on {sizes[-1]} prompts, and {lost} of them are not among these "
                    f"{len(prompts)}: prompts that grow (n_max) keep those they had. Give the same --seed and "
                    "data and a larger --n, or register the claim anew without n_max."
                )
            if any(one["n_max"] != family.n_max for one in before):
                raise FrankenlensError(
                    f"claim {name!r} was looked at without n_max {family.n_max} before; how far prompts grow is fixed "
                    "before the first look"
                )
            shares = tuple(size / family.n_max for size in (*sizes, len(prompts)))
            found[name] = Looks(len(before) + 1, _first(before), shares)
        return found

    def write(
        self,
        pair: str,
        family: Family,
        claims: Mapping[str, Claim],
        examples: Sequence[Example],
        said: Mapping[str, str],
    ) -> None:
        """Keep this look; one at the same prompts, bound and level is there already.

        Args:
            pair, family, claims, examples: as in `looks`.
            said: the verdict by claim.
        """
        prompts, registered = sorted({fingerprint(example) for example in examples}), _registered(claims)
        new = []
        for name, claim in claims.items():
            if said[name] == "refused":
                continue  # nothing was seen
            entry = {
                "pair": pair,
                "family": family.name,
                "claim": claim.text,
                "question": _digest(claim.question),
                "bound": claim.bound,
                "registered": registered,
                "n_max": family.n_max,
                "verdict": said[name],
                "prompts": prompts,
            }
            if not any(_same(entry, one) for one in self._known):
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

    def _before(self, pair: str, claim: Claim, prompts: list[str], registered: str) -> list[dict[str, Any]]:
        """Looks at this question on this pair up to this one, if it was there; of each the claim nearest to this one.

        Claims with several bounds that are registered together are one look, and corrected together.
        """
        question = _digest(claim.question)
        looks: dict[tuple[str, ...], dict[str, Any]] = {}
        for one in self._known:
            if (one["pair"], one["question"]) != (pair, question):
                continue
            look = (one.get("registered", ""), *one["prompts"])
            if look == (registered, *prompts):
                break  # this one, and what came after it
            if look not in looks or one["bound"] == claim.bound:
                looks[look] = one
        return list(looks.values())


def _registered(claims: Mapping[str, Claim]) -> str:
    """What was claimed together: questions and bounds."""
    return _digest(json.dumps(sorted((claim.question, claim.bound) for claim in claims.values())))


def _is_look(one: Any) -> bool:
    """Whether a line holds what is read of it."""
    if not isinstance(one, dict):
        return False
    prompts, n_max = one.get("prompts"), one.get("n_max")
    return (
        all(isinstance(one.get(name), str) for name in ("pair", "question", "verdict"))
        and isinstance(one.get("bound"), int | float)
        and isinstance(one.get("registered", ""), str)
        and isinstance(prompts, list)
        and all(isinstance(prompt, str) for prompt in prompts)
        and (n_max is None or isinstance(n_max, int))
    )


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("pair", "question", "bound", "prompts"))


def _first(before: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [one["verdict"] for one in before]
    return next(
        (one for one in verdicts if one in ("supported", "refuted")), verdicts[-1] if verdicts else ""
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
