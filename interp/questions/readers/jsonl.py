"""A user's own questions: a JSONL file, beside a folder of images where they have any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError
from interp.questions.examples import Example
from interp.questions.readers.pictures import image_of
from interp.questions.readers.report import Failure, ReadReport, RowError, counted
from interp.questions.readers.rows import Row, gradable, objects, text_of, without_markers

META = ("grader", "choices", "tolerance", "decimals", "iou", "description")
"""Fields that go into `meta` where a row has them: see `interp.questions.grading` and `interp.fine_grained`."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Fields:
    """Names of a row's fields. `image` holds an image or a list of them; all but the first two may be absent.

    An image is a path, a data URI, base64, or {"bytes": ..., "path": ...} as `datasets` keeps it.
    """

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    task: str = "task"
    reasoning: str = "reasoning"


def read_jsonl(
    path: str | Path, images: str | Path | None = None, fields: Fields | None = None
) -> tuple[list[Example], ReadReport]:
    """Examples of a JSONL file, and a report that counts every row that could not be read.

    A row may also name its grader, and have the fields of `META`; a row whose own reference its grader does not
    accept is not read. Questions without images need no field for them.

    Arguments:
        path: one JSON object per line.
        images: folder that relative image paths start from; by default the file's own.
        fields: names of the fields.

    Raises:
        FrankenlensError: no such file, no rows, a required field (question, answer) that no row has, or images under
            another name than `image`.
    """
    path, fields = Path(path), fields or Fields()
    rows, failures = objects(path)
    n_rows = len(rows) + len(failures)
    _require_fields(path, rows, fields)
    root = path.parent if images is None else Path(images)
    examples: list[Example] = []
    renamed: list[int] = []
    used: set[str] = set()
    notes: Counter[str] = Counter()
    for n, row in rows:
        try:
            example = _example(n, row, root, fields, used, notes)
        except RowError as error:
            failures.append(Failure(n, str(error)))
            continue
        if example.id != str(row.get(fields.id, n)):
            renamed.append(n)
        used.add(example.id)
        examples.append(example)
    failures.sort(key=lambda failure: failure.row)
    return examples, ReadReport(
        str(path), n_rows, len(examples), tuple(failures), tuple(renamed), counted(notes)
    )


def _require_fields(path: Path, rows: Sequence[tuple[int, Row]], fields: Fields) -> None:
    present = dict.fromkeys(key for _, row in rows for key in row)
    for role in ("question", "answer"):
        if getattr(fields, role) not in present:
            raise FrankenlensError(
                f"{path}: no row has the field {getattr(fields, role)!r} for the {role}. Fields there: "
                f"{', '.join(present)}. Name the right one as Fields({role}=...)."
            )
    if fields.image not in present and (looks := _like_images(rows, present)):
        raise FrankenlensError(
            f"{path}: no row has the field {fields.image!r}, and {' and '.join(looks)} looks like images, which "
            f"would be left out. Call it {fields.image!r} in the file, or name it as Fields(image=...)."
        )


def _like_images(rows: Sequence[tuple[int, Row]], present: Iterable[str]) -> list[str]:
    """Fields that are named for images, or hold paths of some."""
    return [
        name
        for name in present
        if "image" in name.lower()
        or name.lower() in ("img", "imgs", "picture", "photo")
        or any(_is_path_of_image(row.get(name)) for _, row in rows)
    ]


def _is_path_of_image(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and text.lower().endswith(IMAGES) for text in texts)


def _example(n: int, row: Row, root: Path, fields: Fields, used: set[str], notes: Counter[str]) -> Example:
    given = row.get(fields.image)
    values = given if isinstance(given, list) else [] if given is None else [given]
    opened = [image_of(value, root) for value in values]
    reasoning = row.get(fields.reasoning)
    name = str(row.get(fields.id, n))
    example = Example(
        id=f"{name}#{n}" if name in used else name,
        images=tuple(image for image, _ in opened),
        question=without_markers(text_of(row, fields.question), len(values)),
        answer=text_of(row, fields.answer),
        task=str(row.get(fields.task) or ""),
        reasoning=None if reasoning is None else str(reasoning),
        meta={"row": n} | {key: row[key] for key in META if row.get(key) is not None},
    )
    notes.update(remark for _, remarks in opened for remark in remarks)
    return gradable(example)
