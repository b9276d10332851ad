"""What an experiment hands over: figures, tables and one sentence on what they rest on; on disk, and on one page."""

from __future__ import annotations

import base64
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

from interp.results.files import save_dataset

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
    """

    definition: str
    n: str
    correction: str = "none"
    seed: int | None = None
    partition: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)

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
        """The figure with the account in small print below; the figure needs layout="constrained"."""
        width = int(figure.get_size_inches()[0] * 21)
        figure.supxlabel("\n".join(textwrap.wrap(self.text, width)), x=0.01, ha="left", fontsize=6)
        return figure


@dataclass(frozen=True)
class Section:
    """The outcome of one experiment.

    Attributes:
        name: its command, e.g. "compare".
        title: a heading.
        finding: the outcome in a sentence or two, with intervals.
        account: what it rests on.
        tables, figures: by file name without suffix; figures carry no caption yet.
        dataset: values per example, if they are kept.
    """

    name: str
    title: str
    finding: str
    account: Account
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    dataset: xr.Dataset | None = None


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
            section.account.columns(table).to_csv(folder / f"{name}.csv", index=False)
        pictures = {}
        for name, figure in section.figures.items():
            file = folder / f"{name}.png"
            section.account.caption(figure).savefig(file, dpi=150)
            width = round(110 * figure.get_figwidth())  # on the page, in CSS pixels
            pictures[name] = {"width": width, "png": base64.b64encode(file.read_bytes()).decode()}
        if section.dataset is not None:
            dataset = section.dataset.copy()
            dataset.attrs |= {"provenance": json.dumps(made), "account": section.account.text}
            save_dataset(dataset, folder / f"{section.name}.nc")
        tables = [_table(name, table) for name, table in section.tables.items()]
        shown.append({"section": section, "pictures": pictures, "tables": tables})
    (folder / "report.html").write_text(_page(shown, made), encoding="utf-8")


def _page(shown: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> str:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template, style = (
        (files("interp.results") / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css")
    )
    names = [Path(model["name_or_path"]).name for model in made["checkpoints"].values()]
    title = " · ".join(dict.fromkeys(names))
    return environment.from_string(template).render(shown=shown, made=made, style=style, title=title)


def _table(name: str, table: pd.DataFrame) -> dict[str, Any]:
    """The first rows as text."""
    rows = [[_cell(value) for value in row] for row in table.head(SHOWN).itertuples(index=False)]
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table]
    columns = list(zip(map(str, table.columns), numeric, strict=True))
    return {"name": name, "columns": columns, "rows": rows, "more": max(0, len(table) - SHOWN)}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}".replace("-", "−")
    return "–" if value is None or value is pd.NA else str(value)
