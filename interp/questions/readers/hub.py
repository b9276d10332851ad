"""Public data sets through `datasets`: MathVista, MATH-500, GSM8K; from the hub, its cache, or a local copy."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from interp.questions.examples import Example
from interp.questions.grading import extract
from interp.questions.readers.draw import Draw, take
from interp.questions.readers.pictures import PIXELS, Access, images_of
from interp.questions.readers.report import ReadReport, RowError, counted
from interp.questions.readers.rows import gradable, text_of

Row = Mapping[str, Any]


class Unreachable(FrankenlensError):
    """A data set that is neither on this machine nor to be had from the hub."""


IMAGE = "decoded_image"
"""MathVista's column of images."""
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


def read_mathvista(
    source: str | Path = "AI4Math/MathVista",
    *,
    split: str = "testmini",
    category: str | None = None,
    n: int | None = None,
    draw: Draw | None = None,
    images_anywhere: bool = False,
    max_pixels: int = PIXELS,
) -> tuple[list[Example], ReadReport]:
    """MathVista. The question is the benchmark's own `query` (with hint and options); the task is its category.

    Multiple choice is graded by option, integers and floats as numbers (what rounds to the row's `precision` is
    right, as in the benchmark), lists as mathematics, other text by its letters. No description comes with it.

    Args:
        source: name on the hub, or a local file or folder.
        split: testmini has the answers.
        category: "general-vqa" or "math-targeted-vqa"; both by default.
        n: at most so many examples, the first.
        draw: instead of n, which of them.
        images_anywhere, max_pixels: as in `read_jsonl`; images that are not in the rows lie in the folder of `source`.

    Raises:
        FrankenlensError: it cannot be loaded, a column is missing, or no row can be read.
    """
    columns = ("pid", "query", IMAGE, "answer", "question_type", "answer_type", "metadata")

    def wanted(row: Row) -> bool:
        return category is None or (row["metadata"] or {}).get("category") == category

    return _read(
        source,
        split,
        columns,
        _mathvista,
        draw=draw or Draw(n),
        wanted=wanted,
        what=f"of the category {category!r} ",
        access=Access(images_anywhere, max_pixels),
    )


def read_math500(
    source: str | Path = "HuggingFaceH4/MATH-500",
    *,
    split: str = "test",
    n: int | None = None,
    draw: Draw | None = None,
) -> tuple[list[Example], ReadReport]:
    """MATH-500: text-only problems, graded by math-verify; arguments and errors as `read_mathvista`."""
    return _read(source, split, ("problem", "answer", "unique_id"), _math500, draw=draw or Draw(n))


def read_gsm8k(
    source: str | Path = "openai/gsm8k",
    *,
    split: str = "test",
    n: int | None = None,
    draw: Draw | None = None,
) -> tuple[list[Example], ReadReport]:
    """GSM8K: text-only problems, graded as numbers; arguments and errors as `read_mathvista`."""
    return _read(source, split, ("question", "answer"), _gsm8k, config="main", draw=draw or Draw(n))


def _mathvista(index: int, row: Row) -> Example:
    images, choices = row[IMAGE], row.get("choices")
    known = row["metadata"] or {}
    meta: dict[str, Any] = {key: known[key] for key in ("category", "task", "source") if known.get(key)}
    meta |= {"unit": row.get("unit"), "question": row.get("question")}
    if row["question_type"] == "multi_choice":
        if not choices:
            raise RowError("a multiple-choice question without choices")
        meta |= {"grader": "choice", "choices": tuple(choices)}
    elif row["answer_type"] in ("integer", "float"):
        meta["grader"] = "number"
        if row["answer_type"] == "float" and row.get("precision") is not None:
            meta["decimals"] = int(row["precision"])
    else:
        meta["grader"] = "math" if row["answer_type"] == "list" else "text"
    question, answer = text_of(row, "query"), text_of(row, "answer")
    task = str(known.get("category") or "mathvista")
    return Example(f"mathvista-{row['pid']}", images, question, answer, task, meta=meta)


def _math500(index: int, row: Row) -> Example:
    meta = {"grader": "math", "subject": row.get("subject"), "level": row.get("level")}
    return Example(
        f"math-500-{row['unique_id']}",
        (),
        text_of(row, "problem"),
        text_of(row, "answer"),
        "math-500",
        row.get("solution"),
        meta,
    )


def _gsm8k(index: int, row: Row) -> Example:
    solution = text_of(row, "answer")
    answer, stated = extract(solution)
    if not stated or "####" not in solution:
        raise RowError("the field 'answer' has no '#### result'")
    chain = re.sub(r"<<[^<>]*>>", "", solution.rpartition("####")[0]).strip()
    question = text_of(row, "question")
    return Example(f"gsm8k-{index}", (), question, answer, "gsm8k", chain, {"grader": "number"})


def _read(
    source: str | Path,
    split: str,
    columns: Sequence[str],
    to_example: Callable[[int, Row], Example],
    *,
    config: str | None = None,
    draw: Draw,
    wanted: Callable[[Row], bool] | None = None,
    what: str = "",
    access: Access | None = None,
) -> tuple[list[Example], ReadReport]:
    rows = _undecoded(_load(str(source), split, config))
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise FrankenlensError(
            f"{source} has no column {', '.join(missing)}; there are {', '.join(rows.column_names)}"
        )
    small = rows.select_columns([name for name in rows.column_names if name != IMAGE])
    places = [(i + 1, i) for i, row in enumerate(small) if wanted is None or wanted(row)]
    remarks: Counter[str] = Counter()
    root = Path(source) if os.path.isdir(source) else Path(source).parent

    def read(number: int, place: int) -> Example:
        row = rows[place]
        if IMAGE in columns:
            if row[IMAGE] is None:
                raise RowError(f"the field {IMAGE!r} holds no image")
            row[IMAGE], said = images_of([row[IMAGE]], root, access)
            remarks.update(said)
        return gradable(to_example(place, row))

    taken = take(places, draw, lambda place: json.dumps(small[place], default=str), read)
    failures, n_read = taken.failures, len(taken.examples)
    if not n_read and not taken.passed:
        first = f"; row {failures[0].row}: {failures[0].reason}" if failures else ""
        raise FrankenlensError(f"{source}, split {split}: no row {what}can be read{first}")
    name, tried = f"{source} ({split})", n_read + len(failures)
    return list(taken.examples), ReadReport(
        name, tried, n_read, failures, notes=counted(remarks), passed=taken.passed
    )


def _undecoded(rows: Any) -> Any:
    """The rows with images as their bytes, which `images_of` reads as it reads all others."""
    import datasets

    if isinstance(rows.features.get(IMAGE), datasets.Image):
        return rows.cast_column(IMAGE, datasets.Image(decode=False))
    return rows


def _load(source: str, split: str, config: str | None) -> Any:
    """The rows of a split, as a `datasets.Dataset`."""
    require_installed("reading a public data set", "datasets")
    import datasets

    path = Path(source)
    try:
        if os.path.isfile(path):
            if path.suffix not in _FORMATS:
                raise FrankenlensError(f"{source}: give a file of the kind {', '.join(_FORMATS)}")
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=source, split="train")
        if os.path.isdir(path) and any(
            (path / name).is_file() for name in ("state.json", "dataset_dict.json")
        ):
            found = datasets.load_from_disk(source)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source, None if os.path.isdir(path) else config, split=split)
    except FrankenlensError:
        raise
    except Exception as error:  # the hub, the network, the file system and pyarrow each raise their own
        reason = str(error).strip().split("\n")[0]
        raise Unreachable(
            f"the data set {source!r} (split {split!r}) cannot be loaded: {type(error).__name__}: {reason}. Give a "
            "local copy (of a command: --copies, a folder of parquet or JSON files or of what save_to_disk wrote), or "
            "load it once with a network, after which it is in the cache."
        ) from error
