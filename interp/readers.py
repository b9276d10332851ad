"""A user's own questions: a JSONL file beside a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from hooks.errors import FrankenlensError
from interp.examples import Example

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Fields:
    """Names of a row's fields. `image` holds a path or a list of paths; the last four may be absent."""

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    task: str = "task"
    reasoning: str = "reasoning"


@dataclass(frozen=True)
class Failure:
    """A row that was not read.

    Attributes:
        row: its line in the file, from 1.
        reason: what is wrong with it.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of a file. `str(report)` says it in words.

    Attributes:
        path: the file.
        n_rows: rows that are not blank.
        n_read: rows that became examples.
        failures: the others.
        renamed: rows whose id had occurred before and got `#row` appended.
    """

    path: str
    n_rows: int
    n_read: int
    failures: tuple[Failure, ...] = ()
    renamed: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.n_read} of {self.n_rows} rows read, {len(self.failures)} failed"]
        lines += [f"  row {failure.row}: {failure.reason}" for failure in self.failures]
        if self.renamed:
            lines.append(
                f"  {len(self.renamed)} rows repeat an id and were renamed, the first in row {self.renamed[0]}"
            )
        return "\n".join(lines)


def read_jsonl(
    path: str | Path, images: str | Path | None = None, fields: Fields | None = None
) -> tuple[list[Example], ReadReport]:
    """Examples of a JSONL file, and a report that counts every row that could not be read.

    Arguments:
        path: one JSON object per line.
        images: folder that relative image paths start from; by default the file's own.
        fields: names of the fields.

    Raises:
        FrankenlensError: no such file, no rows, or a required field (question, answer, image) that no row has.
    """
    path, fields = Path(path), fields or Fields()
    if not path.is_file():
        raise FrankenlensError(f"{path}: no such file; give a JSONL file with one object per line")
    root = path.parent if images is None else Path(images)
    lines = [
        (n, line)
        for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        if line.strip()
    ]
    rows, failures = _parsed(lines)
    _require_fields(path, rows, failures, fields)
    examples: list[Example] = []
    renamed: list[int] = []
    used: set[str] = set()
    for n, row in rows:
        try:
            example = _example(n, row, root, fields, used)
        except _RowError as error:
            failures.append(Failure(n, str(error)))
            continue
        if example.id != str(row.get(fields.id, n)):
            renamed.append(n)
        used.add(example.id)
        examples.append(example)
    failures.sort(key=lambda failure: failure.row)
    return examples, ReadReport(str(path), len(lines), len(examples), tuple(failures), tuple(renamed))


class _RowError(Exception):
    """One row cannot become an example."""


def _parsed(lines: Iterable[tuple[int, str]]) -> tuple[list[tuple[int, dict[str, Any]]], list[Failure]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    failures: list[Failure] = []
    for n, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            failures.append(Failure(n, f"no JSON: {error}"))
            continue
        if isinstance(row, dict):
            rows.append((n, row))
        else:
            failures.append(Failure(n, f"a JSON {type(row).__name__}, not an object"))
    return rows, failures


def _require_fields(
    path: Path, rows: list[tuple[int, dict[str, Any]]], failures: list[Failure], fields: Fields
) -> None:
    if not rows:
        first = f"; row {failures[0].row}: {failures[0].reason}" if failures else ""
        raise FrankenlensError(f"{path} holds no JSON objects{first}")
    present = dict.fromkeys(key for _, row in rows for key in row)
    for role in ("question", "answer", "image"):
        if getattr(fields, role) not in present:
            raise FrankenlensError(
                f"{path}: no row has the field {getattr(fields, role)!r} for the {role}. Fields there: "
                f"{', '.join(present)}. Name the right one as Fields({role}=...)."
            )


def _example(n: int, row: Mapping[str, Any], root: Path, fields: Fields, used: set[str]) -> Example:
    paths = row.get(fields.image)
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        raise _RowError(f"the field {fields.image!r} must hold a path or a list of paths")
    question = _without_markers(_text(row, fields.question), len(paths))
    reasoning = row.get(fields.reasoning)
    name = str(row.get(fields.id, n))
    return Example(
        id=f"{name}#{n}" if name in used else name,
        images=tuple(_image(root / p) for p in paths),
        question=question,
        answer=_text(row, fields.answer),
        task=str(row.get(fields.task) or ""),
        reasoning=None if reasoning is None else str(reasoning),
        meta={"row": n, "images": paths},
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _RowError(f"the field {name!r} must hold text, found {value!r}")
    return value


def _without_markers(question: str, n_images: int) -> str:
    """Many data sets write `<image>` before the question, once per image; the chat template does that itself."""
    text, markers = question.lstrip(), 0
    while text.startswith(IMAGE_MARKER):
        text, markers = text[len(IMAGE_MARKER) :].lstrip(), markers + 1
    if markers > n_images or IMAGE_MARKER in text:
        raise _RowError(
            f"the question has {question.count(IMAGE_MARKER)} {IMAGE_MARKER} markers and the row {n_images} images; "
            "markers may only stand before the question, at most one per image"
        )
    if markers and not text:
        raise _RowError(f"the question holds nothing but {IMAGE_MARKER}")
    return text if markers else question


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise _RowError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _RowError(f"image {path} cannot be read: {error}") from error
