"""Names of parameters and modules as one regular expression that matches these and no others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from hooks.errors import FrankenlensError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def pattern_of(names: Collection[str], others: Iterable[str]) -> str:
    """A regular expression, anchored at both ends, that finds exactly these names; `search` and `fullmatch` agree.

    Names that differ in one number alone (the layer) are one branch, as are those of the same layers.

    Args:
        names: to be matched.
        others: all names, among which no further one may match.

    Raises:
        FrankenlensError: there are no names, or one holds a line break.
    """
    if not names or any("\n" in name for name in names):
        raise FrankenlensError("a pattern needs at least one name")
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)  # what is before and after a layer's number
    plain: list[str] = []
    for name in names:
        found = _NUMBER.search(name)
        if found is None:
            plain.append(re.escape(name))
        else:
            numbers[name[: found.start()], name[found.end() :]].add(int(found[0]))
    rests: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (before, after), layers in numbers.items():
        rests[before, tuple(sorted(layers))].append(re.escape(after))
    branches = [
        re.escape(before) + _any(map(str, layers)) + _any(afters)
        for (before, layers), afters in rests.items()
    ]
    pattern = f"^{_any([*plain, *branches])}$"
    matched = {name for name in {*others, *names} if re.search(pattern, name)}
    assert matched == set(names), "a pattern matches what it should not"
    return pattern


def _any(some: Iterable[str]) -> str:
    branches = list(some)
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
