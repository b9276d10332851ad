"""A user's own questions: a file of rows, beside a folder of images where they have any."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError, nearest
from interp.questions.examples import Example
from interp.questions.grading.settings import NUMBERS
from interp.questions.readers.draw import Draw, take
from interp.questions.readers.pictures import PIXELS, Access, images_of
from interp.questions.readers.report import ReadReport, RowError, counted, shown
from interp.questions.readers.rows import gradable, text_if_any, text_of, without_markers
from interp.questions.readers.tables import Row, rows_of

META = ("grader", "choices", *NUMBERS, "description")
"""Fields that go into `meta` where a row has them: see `interp.questions.grading` and `interp.fine_grained`."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NONE = "a row has null for an image, and is a question without one"


@dataclass(frozen=True)
class Fields:
    """Names of a row's fields. `image` holds an image or a list of them; all but the first two may be absent.

    An image is a path, a data URI, base64, or {"bytes": ..., "path": ...} as `datasets` keeps it. `cluster` names what
    rows share that are not independent of one another (a scene, a video, a patient); "", or a row without it: its
    images (`interp.questions.examples.cluster_of`).
    """

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    task: str = "task"
    reasoning: str = "reasoning"
    cluster: str = ""

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Fields:
        """From a command line: `question=problem answer=solution image=images`.

        Raises:
            FrankenlensError: one that is not of that form, or names no field of ours.
        """
        ours = asdict(cls())
        found: dict[str, str] = {}
        for text in texts:
            role, _, name = text.partition("=")
            if role not in ours or not name or role in found:
                raise FrankenlensError(
                    f"--fields has {text!r}; give each field once, as ours=yours (answer=solution). Ours are "
                    f"{', '.join(ours)}. {nearest(role, ours)}".strip()
                )
            found[role] = name
        return cls(**found)


def read_jsonl(
    path: str | Path,
    images: str | Path | None = None,
    fields: Fields | None = None,
    *,
    encoding: str | None = None,
    draw: Draw | None = None,
    images_anywhere: bool = False,
    max_pixels: int = PIXELS,
) -> tuple[list[Example], ReadReport]:
    """Examples of a file of rows, and a report that counts every row that could not be read.

    A row may also name its grader, and have the fields of `META`; a row whose own reference its grader does not
    accept is not read. Questions without images need no field for them; where some rows have the field and others do
    not, those others are not read: `[]` or `null` says that a question has no image (`null` is counted in the notes).
    Nor is a row that repeats another's id. Of the rows that are drawn, and of no others, the images
    are decoded, once now and again when they are used (`interp.questions.on_demand`).

    Arguments:
        path: JSON lines (one object a line); or the same rows as a JSON array, CSV or parquet.
        images: folder that relative image paths start from; by default the file's own.
        fields: names of the fields.
        encoding: of text, as Python names it; by default UTF-8, or the UTF-16 or UTF-32 that a file shows.
        draw: which rows are taken, and hence read; by default all.
        images_anywhere: whether rows may name images outside of their folder.
        max_pixels: of an image; a row with a larger one is not read.

    Raises:
        FrankenlensError: no such file, one of another kind, no rows, a required field (question, answer) or one that
            was named and that no row has, or images under another name than `image`.
    """
    path, fields = Path(path), fields or Fields()
    rows, failures = rows_of(path, encoding)
    n_rows = len(rows) + len(failures)
    _require_fields(path, rows, fields)
    root = path.parent if images is None else Path(images)
    n_with_image = sum(fields.image in row for _, row in rows)
    names, access = _names(rows, fields), Access(images_anywhere, max_pixels)
    notes: Counter[str] = Counter()

    def read(n: int, row: Row) -> Example:
        if n_with_image and fields.image not in row:
            raise RowError(
                f"it has no field {fields.image!r}, and {n_with_image} other rows have; write [] there if the question "
                "has no image"
            )
        name = names[n]
        if isinstance(name, int):
            raise RowError(
                f"the id {shown(row[fields.id])} is that of row {name}, too; give each row an id of its own"
            )
        example, remarks = _example(n, row, name, root, fields, access)
        notes.update(remarks)
        return example

    taken = take(rows, draw or Draw(), lambda row: _asked(row, fields), read)
    if not any(example.images for example in taken.examples):
        notes.pop(NONE, None)  # a file of text alone
    failures = sorted([*failures, *taken.failures], key=lambda failure: failure.row)
    n_read = len(taken.examples)
    return list(taken.examples), ReadReport(
        str(path), n_rows, n_read, tuple(failures), counted(notes), taken.passed
    )


def _names(rows: Sequence[tuple[int, Row]], fields: Fields) -> dict[int, str | int]:
    """What each row is called, whichever are drawn; of one that repeats an id, the row that had it first."""
    names: dict[int, str | int] = {}
    first: dict[str, int] = {}
    for n, row in rows:
        given = row.get(fields.id)
        if isinstance(given, (str, int, float, Decimal)) and given != "":
            name = str(given)
            names[n] = name if first.setdefault(name, n) == n else first[name]
    for n, _ in rows:
        names.setdefault(
            n, f"{n}" if f"{n}" not in first else f"{n}#{n}"
        )  # without an id, or one that is refused
    return names


def _asked(row: Row, fields: Fields) -> str:
    """What a row asks, in one text: the same wherever it stands, and whatever it is called."""
    held = [row.get(name) for name in (fields.question, fields.answer, fields.image)]
    return json.dumps(
        held, sort_keys=True, default=lambda one: one.hex() if isinstance(one, bytes) else str(one)
    )


def _require_fields(path: Path, rows: Sequence[tuple[int, Row]], fields: Fields) -> None:
    present = dict.fromkeys(key for _, row in rows for key in row)
    for role, name in asdict(fields).items():
        if name and name not in present and (role in ("question", "answer") or name != role):
            raise FrankenlensError(
                f"{path}: no row has the field {name!r} for the {role}. Fields there: {', '.join(map(str, present))}. "
                f"Name the right one: {_naming(role)}."
            )
    if fields.image not in present and (looks := _like_images(rows, present)):
        raise FrankenlensError(
            f"{path}: no row has the field {fields.image!r}, and {' and '.join(looks)} looks like images, which "
            f"would be left out. Call it {fields.image!r} in the file, or name it: {_naming('image', looks[0])}."
        )


def _naming(role: str, name: str = "NAME") -> str:
    return f'--fields {role}={name} (in Python: Fields({role}="{name}"))'


def _like_images(rows: Sequence[tuple[int, Row]], present: Iterable[str]) -> list[str]:
    """Fields that are named for images, or hold some."""
    return [
        name
        for name in present
        if "image" in name.lower()
        or name.lower() in ("img", "imgs", "picture", "photo")
        or any(_is_like_image(row.get(name)) for _, row in rows)
    ]


def _is_like_image(value: Any) -> bool:
    return any(
        (isinstance(one, str) and one.lower().endswith(IMAGES))
        or (isinstance(one, str) and one.startswith("data:image/"))
        or (isinstance(one, Mapping) and set(one) == {"bytes", "path"})
        for one in (value if isinstance(value, list) else [value])
    )


def _example(
    n: int, row: Row, name: str, root: Path, fields: Fields, access: Access
) -> tuple[Example, list[str]]:
    """The example of a row, and what is to be remarked about it."""
    given = row.get(fields.image)
    values = given if isinstance(given, list) else [] if given is None else [given]
    question = without_markers(text_of(row, fields.question), len(values))
    text_if_any(row, fields.id)
    images, remarks = images_of(values, root, access)
    example = Example(
        id=name,
        images=images,
        question=question,
        answer=text_of(row, fields.answer),
        task=text_if_any(row, fields.task) or "",
        reasoning=text_if_any(row, fields.reasoning),
        cluster=_cluster(row, fields),
        meta={"row": n} | {key: _setting(row, key) for key in META if row.get(key) is not None},
    )
    return gradable(example), [*remarks, *([NONE] if given is None and fields.image in row else [])]


def _cluster(row: Row, fields: Fields) -> str:
    """What a row hangs together with; "" where no field is named for it (a column without a name is no answer)."""
    value = row.get(fields.cluster) if fields.cluster else None
    return "" if value is None else str(value)


def _setting(row: Row, key: str) -> Any:
    value = text_of(row, key) if key == "description" else row[key]
    if key == "decimals" and isinstance(value, float) and value.is_integer():
        return int(value)  # a column of whole numbers with gaps is one of floats in CSV and parquet
    return value
