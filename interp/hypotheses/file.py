"""Claims in YAML: one file is one family; every mistake is one error with its line.

alpha: 0.05                 # of the family; also correction, partition, decision, n_max
found_on: out/map/map.nc    # the result the claims were found in (or a list of ids; []: none); relative to the file
claims:
  - name: head 2 of block 8 carries the decision
    component: blocks.8.attn.head.2
    role: reasoning
    at_least: 0.2
  - name: Late carries more than Early
    component: Late
    more_than: Early
    quantity: accuracy
    body: weights
    at_least: 0
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hooks.errors import FrankenlensError, nearest, one_line, shown, shown_path
from hooks.whereabouts import require_file
from interp.hypotheses.claim import LARGEST, Claim, ClaimError, Family
from interp.hypotheses.held_out import examples_of

LONGEST = 500_000
"""Characters of a file of claims: some thousand claims."""
DEEPEST = 100
"""Brackets within one another; the time that YAML takes grows with their square."""
_OF_CLAIM = tuple(f.name for f in fields(Claim) if f.name not in ("alpha", "where"))
_NUMBERS = ("at_least", "at_most", "expected", "alpha", "n_max")
_NAMES = ("component", "more_than")  # one or several
_OF_FAMILY = ("alpha", "correction", "partition", "decision", "n_max", "found_on", "claims")


def read_claims(path: Path | str) -> Family:
    """The family of claims in a YAML file.

    Raises:
        FrankenlensError: no such file, no YAML, an unknown key, an address that is none, no effect size, an alpha
            outside (0, 1), ...; says in which line.
    """
    path = Path(path)
    require_file(path, "a YAML file of claims: frankenlens test CLAIMS")
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LONGEST:
            raise FrankenlensError(f"{path} has {len(text):,} characters; give claims in at most {LONGEST:,}")
        _require_flat(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _require_written_out(root, path)
    except FrankenlensError:
        raise
    except RecursionError:
        raise _too_deep(path) from None
    except (OSError, ValueError) as error:
        raise FrankenlensError(
            f"{shown_path(path)} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise FrankenlensError(f"{path}{line}: no YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        raise FrankenlensError(f"{path} is empty; give claims: a list")
    head = _mapping(root, path, _OF_FAMILY)
    if "claims" not in head or not isinstance(head["claims"].node, yaml.SequenceNode):
        raise FrankenlensError(
            f"{path}:{head['claims'].line if 'claims' in head else 1}: claims must be a list"
        )
    origin = _found_on(head.pop("found_on", None), path)
    shared: dict[str, Any] = {"found_on": origin}
    if "alpha" in head:
        shared["alpha"] = _float(head.pop("alpha").value)
    claims_at = head.pop("claims")
    claims = tuple(_claim(node, path, shared) for node in claims_at.node.value)
    try:
        return Family(path.name, claims, **{name: item.value for name, item in head.items()})
    except ClaimError as error:
        line = head[error.field].line if error.field in head else claims_at.line
        raise FrankenlensError(f"{path}:{line}: {error}") from None


def _require_flat(text: str, path: Path) -> None:
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            raise _too_deep(path)


def _too_deep(path: Path) -> FrankenlensError:
    return FrankenlensError(f"{path} is nested too deeply to be read")


@dataclass(frozen=True)
class _Item:
    node: Any
    line: int
    path: Path

    @property
    def value(self) -> Any:
        """What stands there.

        Raises:
            FrankenlensError: a tag that is not YAML's own, a date that is none, a number of too many digits.
        """
        try:
            return yaml.SafeLoader("").construct_object(self.node, deep=True)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
            what = getattr(error, "problem", None) or one_line(error)
            raise FrankenlensError(f"{self.path}:{self.line}: cannot be read: {what}") from None


def _mapping(node: Any, path: Path, known: Iterable[str]) -> dict[str, _Item]:
    if not isinstance(node, yaml.MappingNode):
        raise FrankenlensError(
            f"{path}:{node.start_mark.line + 1}: expected keys and values ({', '.join(known)})"
        )
    found: dict[str, _Item] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            name = key.value if isinstance(key, yaml.ScalarNode) else "that is a list or a mapping"
            hint = nearest(name, known)
            raise FrankenlensError(
                f"{path}:{line}: there is no key {shown(name)}, only {', '.join(known)}. {hint}".strip()
            )
        if key.value in found:
            raise FrankenlensError(f"{path}:{line}: {key.value!r} is given twice")
        found[key.value] = _Item(value, line, path)
        _require_kind(key.value, found[key.value], path)
    return found


def _require_kind(key: str, item: _Item, path: Path) -> None:
    if key in ("claims", "found_on"):
        return
    value, wanted = item.value, "text"
    if key in _NUMBERS:
        sound, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        sound = sound and abs(value) < LARGEST
    elif key in _NAMES and isinstance(value, list):
        sound, wanted = bool(value) and all(isinstance(one, str) for one in value), "a list of addresses"
    else:
        sound = isinstance(value, str)
    if not sound:
        raise FrankenlensError(f"{path}:{item.line}: {key} is {shown(value)}; give {wanted}")


def _claim(node: Any, path: Path, shared: dict[str, Any]) -> Claim:
    items = _mapping(node, path, _OF_CLAIM)
    line = node.start_mark.line + 1
    for name in ("name", "component"):
        if name not in items:
            raise FrankenlensError(f"{path}:{line}: a claim needs {name}")
    given = {name: item.value for name, item in items.items()}
    given |= {name: _float(given[name]) for name in _NUMBERS if name in given}
    given |= {name: tuple(given[name]) for name in _NAMES if isinstance(given.get(name), list)}
    if "found_on" in items:
        given["found_on"] = _found_on(items["found_on"], path)
    try:
        return Claim(**{**shared, **given, "where": f"{path}:{line}"})
    except ClaimError as error:
        at = items[error.field].line if error.field in items else line
        raise FrankenlensError(f"{path}:{at}: claim {shown(given['name'])}: {error}") from None


def _found_on(item: _Item | None, path: Path) -> frozenset[str] | None:
    if item is None or item.value is None:
        return None
    value = item.value
    if isinstance(value, str):
        try:
            return examples_of(path.parent / value)
        except FrankenlensError as error:
            raise FrankenlensError(f"{path}:{item.line}: found_on: {error}") from None
    if not isinstance(value, list) or not all(isinstance(one, str | int | float) for one in value):
        raise FrankenlensError(f"{path}:{item.line}: found_on is a result (map.nc) or a list of ids")
    return frozenset(map(str, value))


def _float(value: Any) -> Any:
    """A number that `_require_kind` has seen; what else it may be is refused by the claim."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _require_written_out(root: Any, path: Path) -> None:
    """Refuse aliases, a few lines of which can stand for more than any memory holds."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            line = node.start_mark.line + 1
            raise FrankenlensError(
                f"{path}:{line}: aliases (&name, *name) are not read; write it out in each place"
            )
        if isinstance(node, yaml.CollectionNode):
            seen.add(id(node))
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(one,) for one in node.value]
            waiting += [part for pair in pairs for part in pair]
