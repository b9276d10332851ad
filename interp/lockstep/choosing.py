"""Which of the components that a map finds strong can be moved together and still leave a control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hooks import Address, FrankenlensError, HookedVLM
from interp.lockstep.controls import Kind, alike, kind_of, overlap


@dataclass(frozen=True)
class Choice:
    """Components that are moved, strongest first, and those stronger than the last of them that are not, with why."""

    components: tuple[str, ...]
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        passed = f" (passed over: {', '.join(self.passed_over)})" if self.passed_over else ""
        return ", ".join(self.components) + passed


def independent(vlm: HookedVLM, ranked: Iterable[str], k: int) -> Choice:
    """The first k of a ranking that share nothing and leave at least as many others of their kind as a control.

    Args:
        vlm: the model that they are components of.
        ranked: addresses, strongest first.
        k: how many; fewer where the ranking has no more.

    Raises:
        FrankenlensError: none of them can be moved.
    """
    picked: list[str] = []
    passed: list[str] = []
    kinds: Counter[Kind] = Counter()
    for name in ranked:
        if len(picked) == k:
            break
        address = Address.parse(name)
        kind = kind_of(address)
        if any(overlap(address, Address.parse(other)) for other in picked):
            passed.append(f"{name}, part of another")
        elif 2 * (kinds[kind] + 1) > len(alike(vlm, kind)):
            passed.append(f"{name}, too few others of its kind for a control")
        else:
            picked.append(name)
            kinds[kind] += 1
    if not picked:
        raise FrankenlensError("the map has no component that can be moved; give --components.")
    return Choice(tuple(picked), tuple(passed))
