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

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hooks.errors import FrankenlensError, nearest
from hooks.whereabouts import require_file
from interp.hypotheses.claim import Claim, ClaimError, Family
from interp.hypotheses.held_out import examples_of

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
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise FrankenlensError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
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
        shared["alpha"] = float(head.pop("alpha").value)
    claims_at = head.pop("claims")
    claims = tuple(_claim(node, path, shared) for node in claims_at.node.value)
    try:
        return Family(path.name, claims, **{name: item.value for name, item in head.items()})
    except ClaimError as error:
        line = head[error.field].line if error.field in head else claims_at.line
        raise FrankenlensError(f"{path}:{line}: {error}") from None


@dataclass(frozen=True)
class _Item:
    node: Any
    line: int

    @property
    def value(self) -> Any:
        return yaml.SafeLoader("").construct_object(self.node, deep=True)


def _mapping(node: Any, path: Path, known: Iterable[str]) -> dict[str, _Item]:
    if not isinstance(node, yaml.MappingNode):
        raise FrankenlensError(
            f"{path}:{node.start_mark.line + 1}: expected keys and values ({', '.join(known)})"
        )
    found: dict[str, _Item] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value not in known:
            hint = nearest(str(key.value), known)
            raise FrankenlensError(
                f"{path}:{line}: there is no key {key.value!r}, only {', '.join(known)}. {hint}".strip()
            )
        if key.value in found:
            raise FrankenlensError(f"{path}:{line}: {key.value!r} is given twice")
        found[key.value] = _Item(value, line)
        _require_kind(key.value, found[key.value], path)
    return found


def _require_kind(key: str, item: _Item, path: Path) -> None:
    if key in ("claims", "found_on"):
        return
    value, wanted = item.value, "text"
    if key in _NUMBERS:
        sound, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif key in _NAMES and isinstance(value, list):
        sound, wanted = bool(value) and all(isinstance(one, str) for one in value), "a list of addresses"
    else:
        sound = isinstance(value, str)
    if not sound:
        raise FrankenlensError(f"{path}:{item.line}: {key} is {value!r}; give {wanted}")


def _claim(node: Any, path: Path, shared: dict[str, Any]) -> Claim:
    items = _mapping(node, path, _OF_CLAIM)
    line = node.start_mark.line + 1
    for name in ("name", "component"):
        if name not in items:
            raise FrankenlensError(f"{path}:{line}: a claim needs {name}")
    given = {name: item.value for name, item in items.items()}
    given |= {name: float(given[name]) for name in _NUMBERS if name in given}
    given |= {name: tuple(given[name]) for name in _NAMES if isinstance(given.get(name), list)}
    if "found_on" in items:
        given["found_on"] = _found_on(items["found_on"], path)
    try:
        return Claim(**{**shared, **given, "where": f"{path}:{line}"})
    except ClaimError as error:
        at = items[error.field].line if error.field in items else line
        raise FrankenlensError(f"{path}:{at}: claim {given['name']!r}: {error}") from None


def _found_on(item: _Item | None, path: Path) -> frozenset[str] | None:
    if item is None or item.value is None:
        return None
    value = item.value
    if isinstance(value, str):
        try:
            return examples_of(path.parent / value)
        except FrankenlensError as error:
            raise FrankenlensError(f"{path}:{item.line}: found_on: {error}") from None
    if not isinstance(value, list):
        raise FrankenlensError(f"{path}:{item.line}: found_on is a result (map.nc) or a list of ids")
    return frozenset(map(str, value))
