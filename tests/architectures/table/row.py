"""One row of the table: everything that is tried on one architecture."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import transformers

from hooks import FrankenlensError, HookedVLM
from tests.architectures import build
from tests.architectures.table import analyses, plain, points, sweeping
from tests.architectures.table.bench import Bench
from tests.architectures.table.cells import ABSENT, FAILS, REFUSED, YES, Cell, guarded, told

OPENING = ("opens", "logits identical")
ANALYSES: dict[str, Callable[[Bench], Cell]] = {
    "sweep": sweeping.sweep_cell,
    "map": sweeping.map_cell,
    "lens": analyses.lens_cell,
    "logit attribution": analyses.attribution_cell,
    "attribution patching": analyses.patching_cell,
    "paths": analyses.paths_cell,
    "knockout": analyses.knockout_cell,
    "attention mass": analyses.mass_cell,
    "grafts": analyses.graft_cell,
}
COLUMNS = (*OPENING, *points.KINDS, *ANALYSES)


def row(name: str) -> dict[str, Any]:
    """What works on an architecture, ready for JSON: cells by column, versions, seconds."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = _cells(name)
    return {
        "name": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "cells": {column: asdict(cells[column]) for column in COLUMNS},
    }


def _cells(name: str) -> dict[str, Cell]:
    tiny = build(name)
    bare = plain.logits_of(tiny.model, tiny.inputs)
    try:
        vlm = HookedVLM(tiny.model, inputs=tiny.inputs)
    except FrankenlensError as refusal:
        return _closed(Cell(REFUSED, told(refusal)))
    except Exception as fault:
        return _closed(Cell(FAILS, f"{type(fault).__name__}: {told(fault)}"))
    same = torch.equal(plain.logits_of(tiny.model, tiny.inputs), bare)
    cells: dict[str, Cell] = {}
    try:
        cells |= points.cells(vlm, points.prove(vlm, tiny.inputs, bare))
    except Exception as fault:
        cells |= dict.fromkeys(points.KINDS, Cell(FAILS, f"{type(fault).__name__}: {told(fault)}"))
    bench = Bench(name, tiny, vlm)
    for column, measure in ANALYSES.items():
        cells[column] = guarded(lambda measure=measure: measure(bench))
    vlm.close()
    same = same and torch.equal(plain.logits_of(tiny.model, tiny.inputs), bare)
    moved = Cell(FAILS, "the logits are not those of the bare model, bit for bit")
    n = len(vlm.hook_points)
    return {
        "opens": Cell(YES, "", 0.0, n),
        "logits identical": Cell(YES, "", 0.0, bare.numel()) if same else moved,
        **cells,
    }


def _closed(opens: Cell) -> dict[str, Cell]:
    return {"opens": opens} | {column: Cell(ABSENT, "not opened") for column in COLUMNS if column != "opens"}


def failed_row(name: str, why: str) -> dict[str, Any]:
    """The row of an architecture whose process did not end as it should."""
    cells = _closed(Cell(FAILS, why))
    return {
        "name": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": 0.0,
        "cells": {column: asdict(cells[column]) for column in COLUMNS},
    }
