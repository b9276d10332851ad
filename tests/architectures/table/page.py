"""The table as a page for people who ask whether their model opens, and what runs on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.architectures.table.cells import ABSENT, FAILS, REFUSED, YES
from tests.architectures.table.row import COLUMNS

Row = Mapping[str, Any]
Shown = tuple[str, str]
_SHOWN = {YES: "yes", ABSENT: "–", REFUSED: "refused", FAILS: "**fails**"}
_HEAD = """# What works on which architecture

Made by `make architectures` with transformers {transformers} and torch {torch}: {n} tiny random models (large weights,
random gains and biases), one or more for every image-text-to-text architecture of transformers, for such models with
another language model inside, and for text-only ones. Nothing here is copied from a list; every word was measured.

- **yes**: numbers were compared, and none was further off than 1e-5 × max(1, largest logit) (or, where a model
  magnifies its own rounding more than that, than four times what one step of rounding at every block moves them).
  *opens*: the self-check of opening went through. *logits identical*: `torch.equal` to the bare model, with nothing
  attached and after `close()`. Points: read and written against plain PyTorch hooks. *sweep*: every intervention
  against one full forward. *map*, *lens*, *logit attribution*, *attribution patching*, *paths*, *knockout*,
  *attention mass*, *grafts*: against the same worked out with plain PyTorch.
- **–**: the model has no such part, or it could not be proved; the note says which.
- **refused**: the analysis says in one sentence what it lacks; the note quotes it.
- **fails**: a wrong number or a raw exception; a fault of ours.

{summary}
"""


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    notes: dict[str, int] = {}
    groups = {
        "Image-text-to-text": [r for r in rows if r["name"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES],
        "With another language model inside, or other settings": [r for r in rows if "+" in r["name"]],
    }
    known = {r["name"] for group in groups.values() for r in group}
    groups["Text only"] = [r for r in rows if r["name"] not in known]
    tables = [f"## {title}\n\n{_table(group, notes)}" for title, group in groups.items() if group]
    told = "\n".join(f"{number}. {why}" for why, number in notes.items())
    head = _HEAD.format(
        transformers=rows[0]["transformers"], torch=rows[0]["torch"], n=len(rows), summary=summary(rows)
    )
    return "\n\n".join([head.rstrip(), *tables, f"## Notes\n\n{told}"]) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many say what, column by column."""
    lines = [f"| of {len(rows)} | yes | – | refused | fails |", "|---|---:|---:|---:|---:|"]
    for column in COLUMNS:
        counts = Counter(row["cells"][column]["state"] for row in rows)
        lines.append(f"| {column} | " + " | ".join(str(counts[state]) for state in _SHOWN) + " |")
    return "\n".join(lines)


def read_back(page: str) -> dict[str, dict[str, Shown]]:
    """What a page says: name to column to what is shown and the note beside it."""
    body, _, notes = page.partition("\n## Notes\n")
    numbered = dict(re.findall(r"^(\d+)\. (.*)$", notes, re.MULTILINE))
    found: dict[str, dict[str, Shown]] = {}
    columns: list[str] = []
    for line in body.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name == "architecture":
            columns = cells
        elif columns and line.startswith("| "):
            parts = [cell.removesuffix("</sup>").partition(" <sup>") for cell in cells]
            shown = [(said, numbered[number] if number else "") for said, _, number in parts]
            found[name] = dict(zip(columns, shown, strict=True))
    return found


def sentence(page: str) -> str:
    """What the README says of supported models, from what the page says."""
    rows = read_back(page)

    def count(column: str, *names: str) -> int:
        return sum(rows[name][column][0] == _SHOWN[YES] for name in names or rows)

    own = [name for name in rows if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    return (
        f"Of the {len(own)} image-text-to-text architectures of transformers {count('opens', *own)} open as tiny "
        f"random models, and with other language models inside and text-only ones {count('opens')} of {len(rows)}. "
        f"The sweep is one full forward per intervention on {count('sweep')} of them, maps run on {count('map')}, the "
        f"lens on {count('lens')}, knockouts on {count('knockout')}, grafts on {count('grafts')}; "
        "[docs/architectures.md](docs/architectures.md) says which, and what the others lack."
    )


def _table(rows: Sequence[Row], notes: dict[str, int]) -> str:
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [_cell(row["cells"][column], notes) for column in COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any], notes: dict[str, int]) -> str:
    said, why = shown(cell)
    return said if not why else f"{said} <sup>{notes.setdefault(why, len(notes) + 1)}</sup>"


def shown(cell: Mapping[str, Any]) -> Shown:
    """What the page shows of a cell, and the note beside it."""
    return _SHOWN[cell["state"]], cell["why"].replace("|", "\\|")
