"""Peak memory of maps in processes of their own, against the plan."""

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
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory_of_a_map(kind: str) -> None:
    root = Path(__file__).parents[3]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.interp.plan.measured",
        kind,
        *"256 5 8 500".split(),
    ]
    environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": str(root)}
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.25), found
