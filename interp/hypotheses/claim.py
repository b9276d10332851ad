"""A claim about a component of a pair, and the family of claims it was registered with.

A claim fixes, before the prompts are drawn that test it, what is moved, what is measured, on which side of which bound
it lies, and at which level it is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

from hooks.address import Address
from hooks.errors import FrankenlensError, nearest, shown
from interp.prompts.roles import ROLES
from interp.regions import NAMES

Quantity = Literal["recovery", "effect", "accuracy"]
Body = Literal["activation", "weights"]
Direction = Literal["rl_to_in", "in_to_rl"]
Correction = Literal["holm", "bh", "none"]
CHOICES = {
    "quantity": get_args(Quantity),
    "body": get_args(Body),
    "direction": get_args(Direction),
    "role": (*ROLES, "decision", "all"),
}
ALPHA = 0.05
LARGEST = 1e300
"""Of a number in a claim."""
ORIGINS = ("held out", "exploratory", "not stated")
"""How a claim relates to its prompts: found on others; found on some of them; nobody said what it was found on."""


class ClaimError(FrankenlensError):
    """A claim that cannot be tested; `field` is the part of it that is wrong."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Claim:
    """One claim, e.g. "head 2 of block 8, moved at reasoning tokens from RL into IN, recovers at least 20 %".

    Attributes:
        name: unique in its family.
        component: what is moved, together: addresses (ranges too) or regions of the family's partition. As an
            activation a block is what it writes (its attn and its mlp); its state is `blocks.8.hook_resid_pre`.
        at_least, at_most: the effect size, one of the two: a share of the decision for a recovery, the metric's units
            for an effect, a share of the examples (0.05: five points) for an accuracy.
        quantity: "recovery", sum(patched - recipient) / sum(donor - recipient); "effect", mean(patched - recipient);
            "accuracy", the change in accuracy of the recipient's own greedy answers (weights only).
        body: "activation" or "weights".
        role: tokens at which an activation is moved.
        direction: "rl_to_in" or "in_to_rl".
        more_than: another component; the claim is then of the quantity's difference, component - more_than.
        expected: the true value for which power is stated; by default half the bound's size beyond the bound.
        alpha: level of each of the two one-sided tests, in (0, 1); the same for a whole family.
        found_on: ids or fingerprints (`interp.hypotheses.fingerprint`) of the examples it was found on; None: not
            stated; empty: on none (theory, other models).
        where: file and line it was written at, for messages.

    Raises:
        ClaimError: a field that is no choice, no address, missing or contradicts another.

    Example:
        >>> fl.Claim("carries a fifth", "blocks.8.attn.head.2", role="reasoning", at_least=0.2).text
        'recovery of blocks.8.attn.head.2 (activation, at reasoning, RL into IN) >= 0.2'
    """

    name: str
    component: tuple[str, ...] | str
    at_least: float | None = None
    at_most: float | None = None
    quantity: Quantity | str = "recovery"
    body: Body | str = "activation"
    role: str = "all"
    direction: Direction | str = "rl_to_in"
    more_than: tuple[str, ...] | str = ()
    expected: float | None = None
    alpha: float = ALPHA
    found_on: frozenset[str] | None = None
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("component", "more_than"):
            value = getattr(self, name)
            several = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not all(isinstance(one, str) for one in several):
                raise ClaimError(f"{name} is {shown(value)}; give an address, or several", name)
            object.__setattr__(self, name, several)
        if self.found_on is not None and not isinstance(self.found_on, frozenset | set | list | tuple):
            raise ClaimError(
                f"found_on is {shown(self.found_on)}; give a set of ids or fingerprints", "found_on"
            )
        if not isinstance(self.name, str) or not self.name.strip():
            raise ClaimError("a claim needs a name", "name")
        self._require_choices()
        self._require_components()
        self._require_numbers()

    @property
    def relation(self) -> str:
        """ ">=" or "<="."""
        return ">=" if self.at_least is not None else "<="

    @property
    def bound(self) -> float:
        """The effect size."""
        return float(self.at_least if self.at_least is not None else self.at_most)  # type: ignore[arg-type]

    @property
    def sign(self) -> int:
        """1 where more of the quantity speaks for the claim, -1 where less does."""
        return 1 if self.at_least is not None else -1

    @property
    def alternative(self) -> float | None:
        """The value for which power is stated; None where there is none (a bound of 0 has no half)."""
        if self.expected is not None:
            return float(self.expected)
        return None if self.bound == 0 else self.bound + self.sign * abs(self.bound) / 2

    @property
    def confidence(self) -> float:
        """Of the intervals shown: 1 - 2 alpha, which two one-sided tests at alpha give; never below a half."""
        return max(1 - 2 * self.alpha, 0.5)

    @property
    def of_an_effect(self) -> bool:
        """Whether it says that something happens, so that a control can do as well; not that something is small."""
        return self.sign * self.bound >= 0

    @property
    def asked(self) -> tuple[str, str, float]:
        """Question, relation and bound in one form, whatever the name and the level: what a second look looks at again.

        However the components are written: in any order, twice, as ranges; A over B by r is B under A by -r.
        """
        own, other = _every(self.component), _every(self.more_than)
        relation, bound = self.relation, self.bound
        if other and other < own:
            own, other = other, own
            relation, bound = {">=": "<=", "<=": ">="}[relation], -bound
        question = repr((self.quantity, own, other, self.body, self.role, self.direction))
        return question, relation, bound + 0.0  # no -0

    @property
    def text(self) -> str:
        """The claim in a line."""
        into = {"rl_to_in": "RL into IN", "in_to_rl": "IN into RL"}[self.direction]
        place = f"at {self.role}, " if self.body == "activation" else ""
        said = f"{self.quantity} of {' + '.join(self.component)}"
        said += f" minus that of {' + '.join(self.more_than)}" if self.more_than else ""
        return f"{said} ({self.body}, {place}{into}) {self.relation} {self.bound:g}"

    def _require_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = nearest(value, choices)
                raise ClaimError(
                    f"{name} {shown(value)}: choose of {', '.join(choices)}. {hint}".strip(), name
                )
        if self.body == "weights" and self.role != "all":
            raise ClaimError(f"weights are moved for all tokens; leave role {self.role!r} out", "role")
        if self.quantity == "accuracy" and self.body != "weights":
            raise ClaimError("a claim of accuracy moves weights; give body: weights", "quantity")

    def _require_components(self) -> None:
        if not self.component:
            raise ClaimError("it names no component", "component")
        for name in ("component", "more_than"):
            for one in getattr(self, name):
                if one in NAMES or str(one).startswith("region "):
                    continue
                try:
                    Address.parse(str(one).removesuffix(".hook_resid_pre"))
                except FrankenlensError as error:
                    raise ClaimError(f"{error} Or a region: {', '.join(NAMES)}.", name) from None

    def _require_numbers(self) -> None:
        given = [name for name in ("at_least", "at_most") if getattr(self, name) is not None]
        if len(given) != 1:
            what = "has no effect size" if not given else "has two effect sizes"
            raise ClaimError(f"it {what}; give at_least or at_most", given[-1] if given else "name")
        for name in (*given, "alpha", *(["expected"] if self.expected is not None else [])):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) < LARGEST:  # no NaN either
                raise ClaimError(f"{name} is {shown(value)}, which is no number", name)
        if not 0 < self.alpha < 1:
            raise ClaimError(f"alpha is {self.alpha:g}; it lies between 0 and 1, e.g. 0.05", "alpha")
        if self.expected is not None and self.sign * (self.expected - self.bound) <= 0:
            raise ClaimError(
                f"expected {self.expected:g} does not lie beyond the bound ({self.relation} {self.bound:g})",
                "expected",
            )


@dataclass(frozen=True)
class Family:
    """Claims registered together, and corrected together.

    Attributes:
        name: e.g. the file.
        claims: at least one; names differ, alpha does not.
        correction: "holm" (chance of any false support, or any false refutation, at most alpha), "bh" (false discovery
            rate), "none".
        partition: what the names of regions mean, as in `interp.regions.parse_partition`.
        decision: as in `interp.decision.find_decisions`.
        n_max: where the prompts are to grow, how many they become at most: alpha is then spent over the looks
            (`interp.statistics.levels`), each on the prompts of the last and further ones. None: one look; see
            `interp.hypotheses.ledger`.

    Raises:
        ClaimError: no claims, a name used twice, levels that differ, an unknown correction, an n_max that is no number
            of prompts.
    """

    name: str
    claims: tuple[Claim, ...]
    correction: Correction | str = "holm"
    partition: str = "paper"
    decision: str = "decisive"
    n_max: int | None = None

    def __post_init__(self) -> None:
        several = isinstance(self.claims, list | tuple)
        if not several or not all(isinstance(one, Claim) for one in self.claims):
            raise ClaimError(f"claims is {shown(self.claims)}; give a list of Claim", "claims")
        object.__setattr__(self, "claims", tuple(self.claims))
        whole = isinstance(self.n_max, Integral) and not isinstance(self.n_max, bool)
        if self.n_max is not None and not (whole and 1 <= self.n_max < 2**53):
            raise ClaimError(
                f"n_max is {shown(self.n_max)}; give the number of prompts at the last look", "n_max"
            )
        if not self.claims:
            raise ClaimError(f"family {self.name!r} has no claims", "claims")
        chosen = {"correction": get_args(Correction), "decision": ("decisive", "first", "soft")}
        for name, choices in chosen.items():
            if getattr(self, name) not in choices:
                raise ClaimError(f"{name} {shown(getattr(self, name))}: choose of {', '.join(choices)}", name)
        twice = _twice([claim.name for claim in self.claims])
        if twice:
            raise ClaimError(f"two claims are named {twice!r}", "claims")
        levels = sorted({claim.alpha for claim in self.claims})
        if len(levels) > 1:
            raise ClaimError(
                f"the claims of a family share one alpha; these have {', '.join(f'{a:g}' for a in levels)}",
                "alpha",
            )

    @property
    def alpha(self) -> float:
        """Level of the family's tests."""
        return self.claims[0].alpha

    @property
    def level(self) -> float:
        """The level a claim has to pass when it is the strongest: alpha, divided by the claims where corrected."""
        return self.alpha if self.correction == "none" else self.alpha / len(self.claims)


def _every(names: Sequence[str]) -> tuple[str, ...]:
    """The single components that names stand for, in order, each once; a region's name is left as it is."""
    found = set()
    for name in names:
        try:
            found |= {str(one) for one in Address.parse(name).expand()}
        except FrankenlensError:
            found.add(name)
    return tuple(sorted(found))


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
