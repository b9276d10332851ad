"""One self-contained page about a component map: what was measured, the figure, the strongest components, controls."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, StrictUndefined

from interp.map.plots import DIRECTIONS, plot_map
from interp.map.summary import headline, now_and_before, strongest
from interp.statistics import Interval, bootstrap_mean, interval_text

_WIDTH = 90  # of the small interval plots, in pixels


def save_report(summary: xr.Dataset, path: Path, k: int = 10) -> None:
    """Write the page; use inside `interp.results.publishing`.

    Args:
        summary: what `interp.map.summary.summarise` returns, with the attributes `provenance`
            (`interp.results.provenance`) and, for a pair, `decisions` (`DecisionSet.summary`), both as JSON, and
            the variable `two_by_two` (`interp.decision.two_by_two`) where there is one.
        path: the file.
        k: how many components each direction's table lists.
    """
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["capfirst"] = lambda text: text[:1].upper() + text[1:]
    template, style = (
        (files("interp") / name).read_text(encoding="utf-8") for name in ("report.html.j2", "page.css")
    )
    page = environment.from_string(template).render(_content(summary, k), style=style)
    path.write_text(page, encoding="utf-8")


def _content(summary: xr.Dataset, k: int) -> dict[str, Any]:
    """Everything the template prints, as text and numbers."""
    provenance = json.loads(summary.attrs["provenance"])
    decisions = json.loads(summary.attrs["decisions"]) if "decisions" in summary.attrs else None
    directions = [str(name) for name in summary["direction"].to_numpy()]
    what, denominator = headline(summary)
    names = [model["name_or_path"] for part, model in provenance["checkpoints"].items() if part != "base"]
    return {
        "title": " → ".join(Path(name).name for name in names),
        "metric": summary.attrs["metric"],
        "units": summary.attrs["units"],
        "level": f"{100 * summary.attrs['confidence']:.0f} %",
        "refused": summary.attrs["refused"],
        "decisions": decisions,
        "provenance": provenance | {"settings": _settings(provenance["settings"])},
        "denominator": {"what": what, "text": _interval(denominator)},
        "nulls": [
            {"name": str(name), "text": _text(summary.sel(null=name), "null_denominator")}
            for name in (summary["null"].to_numpy() if "null" in summary.dims else ())
        ],
        "figure": "" if summary.attrs["refused"] else _png(summary),
        "tables": [_table(summary, direction, k) for direction in directions],
        "n_cells": int((summary["n"].sel(direction=directions[0]) > 0).sum()),
        "crossed": _crossed(summary["two_by_two"]) if "two_by_two" in summary else None,
        "dropped": _dropped(provenance, decisions),
    }


def _png(summary: xr.Dataset) -> str:
    """The figure as base64."""
    out = io.BytesIO()
    plot_map(summary).savefig(out, format="png", dpi=130)
    return base64.b64encode(out.getvalue()).decode()


def _table(summary: xr.Dataset, direction: str, k: int) -> dict[str, Any]:
    """The strongest components of a direction, with the coordinates of their small interval plots."""
    rows = strongest(summary, direction, k)
    refused = bool(summary.attrs["refused"])
    name = "effect_mean" if refused else "recovery"
    shown = [name] if refused else [name, "control_other_recovery"]
    ends = rows[[each + suffix for each in shown for suffix in ("", "_low", "_high")]].to_numpy(dtype=float)
    reach = (
        [min(0.0, *ends[np.isfinite(ends)]), max(0.0, *ends[np.isfinite(ends)])] if len(rows) else [0.0, 1.0]
    )

    def place(value: float) -> float:
        return round(4 + (_WIDTH - 8) * (value - reach[0]) / max(reach[1] - reach[0], 1e-12), 1)

    lines = []
    for record in rows.to_dict("records"):
        marks = (
            [] if refused else [_mark(record, "control_other_recovery", place, "control", "controldot", 10)]
        )
        marks.append(_mark(record, name, place, "bar", "dot", 7 if refused else 4))
        lines.append(
            {
                "component": record["component"],
                "role": record["role"],
                "value": _text(record, name),
                "control": f"{_text(record, 'control_other_recovery')} (n {int(record['control_other_n'])})",
                "control_self": f"{record['control_self']:.2g}" if "control_self" in record else "–",
                "n": int(record["n"]),
                "marks": [mark for mark in marks if mark],
            }
        )
    title = DIRECTIONS.get(direction, direction)
    return {"title": title, "zero": place(0.0), "rows": lines}


def _mark(record: Mapping[Any, Any], name: str, place, line: str, dot: str, y: int) -> dict[str, Any] | None:
    """One interval of a small plot; a value without an interval is a bare dot, no value is nothing."""
    value, low, high = (float(record[name + suffix]) for suffix in ("", "_low", "_high"))
    if not math.isfinite(value):
        return None
    ends = (low, high) if math.isfinite(low) and math.isfinite(high) else (value, value)
    return {
        "line": line,
        "dot": dot,
        "y": y,
        "value": place(value),
        "low": place(ends[0]),
        "high": place(ends[1]),
    }


def _crossed(two_by_two: xr.DataArray) -> dict[str, Any]:
    """The 2x2 of weights at the decision and keys and values of the prefix."""
    rows = []
    for weights in ("in", "rl"):
        values = (two_by_two.sel(weights=weights, prefix=prefix).to_numpy() for prefix in ("in", "rl"))
        rows.append(
            {"weights": weights.upper(), "cells": [_interval(bootstrap_mean(each)) for each in values]}
        )
    return {"rows": rows} | {name: _interval(found) for name, found in now_and_before(two_by_two).items()}


def _dropped(provenance: Mapping[str, Any], decisions: Mapping[str, Any] | None) -> dict[str, int]:
    """Reason to number: of rows, of prompts without a decision, of traces that do not parse."""
    dropped = dict(provenance["dropped"])
    if decisions is None:
        return dropped
    dropped |= {f"no decision: {reason}": n for reason, n in decisions["excluded"].items()}
    for model, reasons in decisions["unparsed"].items():
        dropped |= {f"{model.upper()}'s trace does not parse: {reason}": n for reason, n in reasons.items()}
    if decisions["n_unstable_positions"]:
        dropped["positions where RL is tied to rounding"] = decisions["n_unstable_positions"]
    return dropped


def _text(source: Mapping[Any, Any], name: str) -> str:
    return interval_text(source[name], source[name + "_low"], source[name + "_high"])


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a command line would show them; what was not set is left out."""
    return {
        name.rstrip("_"): " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in settings.items()
        if value is not None
    }


def _interval(found: Interval) -> str:
    return interval_text(found.value, found.low, found.high)
