"""What an experiment hands over: figures, tables and one sentence on what they rest on; on disk, and on one page."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from interp.results.csv import write_csv
from interp.results.files import save_dataset
from interp.results.marks import Scale
from interp.results.palette import MIXED
from interp.results.picture import Picture, caption_of
from interp.statistics import Interval, interval_text

SHOWN = 40  # rows of a table on the page; the file has them all


@dataclass(frozen=True)
class Account:
    """What a result rests on; it is printed on every figure, stands in every table and on the page.

    Attributes:
        definition: what was measured, in words exact enough to measure it again.
        n: how many examples (tensors, ...), e.g. "100 questions a task".
        correction: of p values for being many, e.g. "Holm over 8 variants"; "none" where there are none.
        seed: of everything random; None where nothing is.
        partition: of the layers into regions (`str(Partition)`); "" where there are none.
        left_out: reason to number of examples left out.
        counts: how many examples remained at each step, in order; for the provenance.
    """

    definition: str
    n: str
    correction: str = "none"
    seed: int | None = None
    partition: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All of it in one line."""
        parts = [self.definition, f"n: {self.n}"]
        parts += [f"partition: {self.partition}"] if self.partition else []
        parts += [f"correction: {self.correction}"]
        parts += [f"seed: {self.seed}"] if self.seed is not None else []
        left_out = ", ".join(f"{reason} ({count})" for reason, count in self.left_out.items())
        return "; ".join([*parts, f"left out: {left_out or 'nothing'}"])

    def columns(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with definition, partition, seed and correction as columns, where it has none of that name."""
        own = {"definition": self.definition, "partition": self.partition, "seed": self.seed}
        own |= {"correction": self.correction}
        return table.assign(**{name: value for name, value in own.items() if name not in table})

    def caption(self, figure: Figure) -> Figure:
        """The figure with its caption and the account in small print below; it needs layout="constrained"."""
        width = int(figure.get_size_inches()[0] * 21)
        told = caption_of(figure)
        lines = [*textwrap.wrap(told, width), *textwrap.wrap(self.text, width)]
        figure.set_figheight(figure.get_figheight() + 0.125 * (len(lines) + 1))
        figure.supxlabel("\n".join(line.replace("$", r"\$") for line in lines), x=0.01, ha="left", fontsize=6)
        return figure


@dataclass(frozen=True)
class Digest:
    """A small table that stands on the page alone, where the files hold all that it is taken from.

    Attributes:
        heading: above it.
        table: text, numbers, and `Interval`s of one cell, which are written out and drawn, all on one scale.
        note: in small print below it.
    """

    heading: str
    table: pd.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The outcome of one experiment.

    Attributes:
        name: its command, e.g. "compare".
        title: a heading.
        finding: the outcome in two or three plain sentences, with n, interval and control; its line breaks are kept. It
            opens the page.
        account: what it rests on.
        tables, figures: by file name without suffix. Tables get the account as columns; figures (`Picture`) are printed
            with their caption and the account.
        dataset: values per example, if they are kept.
        cells: the dataset's values per cell, tidy, written beside it under its name, as they are.
        lines: file name without suffix to rows that are written as JSON lines, which the page does not show.
        digests: what the page shows besides, between figures and tables.
        details: further findings, in the same form; below the figures.
    """

    name: str
    title: str
    finding: str
    account: Account
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    dataset: xr.Dataset | None = None
    cells: pd.DataFrame | None = None
    lines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    digests: Sequence[Digest] = ()
    details: str = ""


def told(sentences: Sequence[str], first: int = 3) -> tuple[str, str]:
    """What opens the page and what stands below the figures: the first sentences, and the others."""
    return " ".join(sentences[:first]), " ".join(sentences[first:])


def save_sections(sections: Sequence[Section], folder: Path, made: Mapping[str, Any]) -> None:
    """Write every section's tables (CSV), figures (PNG) and dataset (NetCDF), and report.html of all.

    Args:
        sections: in the order of the page.
        folder: use the one of `interp.results.publishing`.
        made: what `interp.results.provenance` returns.
    """
    shown = []
    for section in sections:
        for name, table in section.tables.items():
            write_csv(section.account.columns(table), folder / f"{name}.csv")
        for name, rows in section.lines.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        if section.cells is not None:
            write_csv(section.cells, folder / f"{section.name}.csv")
        if section.dataset is not None:
            dataset = section.dataset.copy()
            dataset.attrs |= {"provenance": json.dumps(made), "account": section.account.text}
            save_dataset(dataset, folder / f"{section.name}.nc")
        pictures = {name: _picture(section, name, folder) for name in section.figures}
        tables = [_table(f"{name}.csv", table) for name, table in section.tables.items()]
        digests = [_table(one.heading, one.table) | {"note": one.note} for one in section.digests]
        shown.append({"section": section, "pictures": pictures, "tables": tables, "digests": digests})
    (folder / "report.html").write_text(_page(shown, made), encoding="utf-8")


def _picture(section: Section, name: str, folder: Path) -> dict[str, Any]:
    """The figure as a file, with caption and account, and as the page holds it, where these are text."""
    figure, bare = section.figures[name], io.BytesIO()
    figure.savefig(bare, dpi=150, format="png")
    section.account.caption(figure).savefig(folder / f"{name}.png", dpi=150)
    width = round(110 * figure.get_figwidth())  # on the page, in CSS pixels
    sentence = figure.sentence if isinstance(figure, Picture) else ""
    png = "" if sentence else base64.b64encode(bare.getvalue()).decode()
    return {"width": width, "png": png, "caption": caption_of(figure), "sentence": sentence}


def _page(shown: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> str:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template, style = (
        (files("interp.results") / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css")
    )
    names = [Path(model["name_or_path"]).name for model in made["checkpoints"].values()]
    about = {
        "style": style.replace("@MIXED", MIXED),
        "title": " · ".join(dict.fromkeys(names)),
        "settings": _settings(made),
    }
    return environment.from_string(template).render(shown=shown, made=made, **about)


def _settings(made: Mapping[str, Any]) -> dict[str, str]:
    """As a command line would show them; what was not set is left out."""
    return {
        name.rstrip("_"): " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in made["settings"].items()
        if value is not None
    }


def _table(heading: str, table: pd.DataFrame) -> dict[str, Any]:
    """The first rows, as the page shows them."""
    some = table.head(SHOWN)
    scale = Scale.of(cell for column in some for cell in some[column] if isinstance(cell, Interval))
    rows = [[_cell(value, scale) for value in row] for row in some.itertuples(index=False)]
    columns = [(str(column), _is_numeric(some[column])) for column in some]
    more = max(0, len(table) - SHOWN)
    return {"name": heading, "columns": columns, "rows": rows, "more": more, "zero": scale.place(0.0)}


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) or any(isinstance(cell, Interval) for cell in column)


def _cell(value: Any, scale: Scale) -> dict[str, Any]:
    """Text, and where it is an interval how it is drawn."""
    if isinstance(value, Interval):
        text = interval_text(value.value, value.low, value.high)
        return {"text": text, "mark": scale.mark(value)}
    if isinstance(value, float):
        return {"text": "–" if pd.isna(value) else f"{value:.4g}".replace("-", "−"), "mark": None}
    return {"text": "–" if value is None or value is pd.NA else str(value), "mark": None}
