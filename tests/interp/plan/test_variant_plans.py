"""Variants that write together: what is planned against what is counted, and what is held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp.plan.runs import Runs
from interp.plan.structure import without_weights
from interp.plan.variants import proof, written_together
from interp.transfer.outcomes import Texts
from interp.transfer.prefixes import sharing
from interp.transfer.writing import Writing
from tests.interp.plan.kinds import KINDS, models, prompts
from tests.interp.plan.measured_variants import mixtures
from tests.interp.plan.test_map_plans import counted
from tests.interp.plan.test_memory_plans import GIVEN_BACK


@pytest.mark.parametrize(
    "kind", ["qwen3_vl", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "qwen3_vl")]
)
def test_flops_of_variants_that_write_together(kind: str) -> None:
    recipient, donor = models(kind)
    asked, runs = prompts(kind, recipient, 4, 40), mixtures(recipient)
    assert len(sharing(recipient, runs)) == len(runs) == 7
    texts = Texts(tuple(asked), 4, 2)
    run = counted(lambda: Writing(recipient, donor, runs).written(texts))
    own = Runs(without_weights(recipient), 2)
    planned = written_together(own, "together", runs, asked, 4)
    alone = own.written("alone", asked, [4] * 4).times(len(runs))
    assert planned.flops + proof(own, runs).flops == pytest.approx(run, rel=0.02)
    assert planned.flops < 0.8 * alone.flops
    assert planned.runs == alone.runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory_of_variants_that_write_together(kind: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-W", "ignore", "-m", "tests.interp.plan.measured_variants", kind]
    environment = {**os.environ, **GIVEN_BACK, "PYTHONPATH": str(root)}
    told = subprocess.run(
        [*command, *"256 6 8 500".split()],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(told.stdout.splitlines()[-1])
    print(found, file=sys.__stdout__)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.25), found
