"""A file's rows, whichever way it is written: JSON lines, a JSON array, CSV or parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError, one_line
from hooks.whereabouts import require_file
from interp.questions.readers.report import Failure, shown

Row = Mapping[str, Any]
Numbered = tuple[list[tuple[int, Row]], list[Failure]]
"""Rows with their numbers, and what holds none."""

KINDS = "JSON lines (one object a line), a JSON array of objects, CSV (.csv, .tsv) or parquet"
DEEP = "nested too deeply to be read"
DEEPEST = 64
"""Lists and objects within one another, of a value that is read."""
DIGITS = 4300
"""Of an integer that Python reads."""
_PARQUET = b"PAR1"
_PACKED = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "compressed (gzip); unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"BZh": "compressed (bzip2); unpack it",
    b"\xfd7zX": "compressed (xz); unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"SQLite": "a database; export its rows",
}


@dataclass(frozen=True)
class Unreadable:
    """What stands in a row in place of a value that cannot be had; whoever needs that value refuses the row."""

    what: str

    def __repr__(self) -> str:
        return self.what


def rows_of(path: Path, encoding: str | None = None) -> Numbered:
    """The rows of a file with their numbers (lines of JSON lines, else places among the rows; from 1).

    Arguments:
        path: of one of `KINDS`.
        encoding: of text; by default UTF-8, or the UTF-16 or UTF-32 that a file shows by its first bytes.

    Raises:
        FrankenlensError: no such file, one of another kind or encoding, or one without rows.
    """
    if "\0" in str(path) or len(os.fsencode(path.name)) > 255:
        raise FrankenlensError(f"{shown(str(path))} is no name of a file; give {KINDS}")
    if os.path.isdir(path):
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
        )
        there = f": {', '.join(inside[:3])}{', …' if len(inside) > 3 else ''}" if inside else ""
        raise FrankenlensError(f"{path} is a folder; give a file of questions in it{there}")
    require_file(path, KINDS)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FrankenlensError(f"{path} cannot be read: {one_line(error)}") from error
    for magic, what in _PACKED.items():
        if data.startswith(magic):
            raise FrankenlensError(f"{path} is {what}, and give {KINDS}")
    if data.startswith(_PARQUET):
        return _parquet(path)
    text = _decoded(path, data, encoding)
    if not text.strip():
        raise FrankenlensError(f"{path} is empty; give {KINDS}")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv(path, text)
    return _json(path, text)


def _decoded(path: Path, data: bytes, encoding: str | None) -> str:
    """A file's text; a byte that its encoding does not know is a lone surrogate there, which `text_of` refuses."""
    name = encoding or json.detect_encoding(data)
    try:
        own = codecs.lookup(name).name
        return data.decode("utf-8-sig" if own == "utf-8" else own, "surrogateescape")
    except UnicodeError as error:
        raise FrankenlensError(
            f"{path} is not in {name}{'' if encoding else ', as it begins'}: {one_line(error)}. Name its encoding "
            '(--encoding gbk, in Python encoding="gbk"), or save it as UTF-8.'
        ) from error
    except (LookupError, TypeError, ValueError):  # no encoding, one that is none of text, or not even a name
        raise FrankenlensError(
            f"there is no encoding {shown(name)}; name one as Python does: utf-8, gbk, latin-1"
        ) from None


def _json(path: Path, text: str) -> Numbered:
    rows: list[tuple[int, Row]] = []
    failures: list[Failure] = []
    every = _elements(path, text) if text.lstrip().startswith("[") else None
    if every is None:
        lines = enumerate(
            re.split("\r\n|\n|\r", text), 1
        )  # no others: inside of a JSON string U+2028 is text
        every = [(n, _parsed(line)) for n, line in lines if line.strip()]
        if not any(isinstance(value, dict) for _, value in every) and isinstance(
            whole := _parsed(text), dict
        ):
            every = [(1, whole)]  # one object over many lines
    for n, value in every:
        if isinstance(value, dict):
            rows.append((n, value))
        else:
            what = (
                value.what
                if isinstance(value, Unreadable)
                else f"a JSON {type(value).__name__}, not an object"
            )
            failures.append(Failure(n, what))
    if not rows:
        raise FrankenlensError(
            f"{path} holds no JSON objects; row {failures[0].row}: {failures[0].reason}. Give {KINDS}."
        )
    return rows, failures


def _elements(path: Path, text: str) -> list[tuple[int, Any]] | None:
    """The elements of one JSON array; None where the file is none."""
    whole = _parsed(text)
    if isinstance(whole, Unreadable) and whole.what == DEEP:
        raise FrankenlensError(
            f"{path} is one JSON array, and {DEEP}; write one object a line, so that only that row fails"
        )
    if not isinstance(whole, list):
        return None
    return [(n, Unreadable(DEEP) if _is_deep(one) else one) for n, one in enumerate(whole, 1)]


def _parsed(text: str) -> Any:
    """A JSON value, or why there is none; in it, why a part of it is none."""
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        return found if isinstance(found, list) or not _is_deep(found) else Unreadable(DEEP)
    except json.JSONDecodeError as error:
        return Unreadable(f"no JSON: {error}")
    except RecursionError:
        return Unreadable(DEEP)


def _is_deep(value: Any) -> bool:
    """Whether more lists and objects lie within one another than are read."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inside
            for one in level
            if isinstance(one, (dict, list))
            for inside in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return Unreadable(f"an object in which the key {shown(twice)} stands twice")


def _integer(digits: str) -> int | Unreadable:
    return int(digits) if len(digits) <= DIGITS else Unreadable(f"a number of {len(digits):,} digits")


def _csv(path: Path, text: str) -> Numbered:
    """Rows under a header; an empty cell is a field that the row does not fill."""
    csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than the module expects of a cell
    between = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    try:
        head, *body = [cells for cells in lines if cells]
    except csv.Error as error:
        raise FrankenlensError(f"{path}, line {lines.line_num}: no CSV: {error}") from error
    if len(set(head)) < len(head):
        raise FrankenlensError(f"{path}: a column is there twice: {', '.join(map(shown, head))}")
    rows: list[tuple[int, Row]] = []
    failures: list[Failure] = []
    for n, cells in enumerate(body, 1):
        if len(cells) != len(head):
            failures.append(Failure(n, f"{len(cells)} cells under {len(head)} columns"))
        else:
            rows.append((n, {name: cell or None for name, cell in zip(head, cells, strict=True)}))
    if not rows:
        raise FrankenlensError(f"{path} holds no rows under its columns {', '.join(map(shown, head))}")
    return rows, failures


def _parquet(path: Path) -> Numbered:
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own, and what its conversions to Python raise
        raise FrankenlensError(f"{path} is no parquet file that can be read: {shown(str(error))}") from error
    if not rows:
        raise FrankenlensError(f"{path} holds no rows")
    return list(enumerate(rows, 1)), []
