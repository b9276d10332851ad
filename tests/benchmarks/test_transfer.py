"""Variants that write together (slow): the same texts in three quarters of the time."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_nine_runs_together_take_three_quarters_of_nine_passes() -> None:
    """In a process of its own, without the runtime type checks of the tests."""
    command = [sys.executable, "-m", "tests.benchmarks.transfer", "llava"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.__stdout__)
    assert 0.1 < found["vision of a pass"] < 0.25
    assert 0.3 < found["prefill (with vision) of a pass"] - found["vision of a pass"] < 0.5
    assert found["together of alone"] <= 0.75
