"""Peak memory of maps, knockouts, lenses and texts in processes of their own, against the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interp.plan.kinds import KINDS

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""Tensors are given back to the kernel when they are freed, as on a GPU; else glibc keeps as much again."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *(("map", kind) for kind in KINDS),
        *((what, kind) for what in ("knockout", "lens", "greedy") for kind in ("llava", "qwen3_vl")),
    ],
)
def test_peak_memory(what: str, kind: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-W", "ignore", "-m", "tests.interp.plan.measured", what, kind]
    environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": str(root)}
    command += "256 5 8 500".split()
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.25), found
