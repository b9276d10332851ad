"""What opening costs in time, measured in a process without the runtime type checks of the tests."""

import json
import subprocess
import sys

import pytest


def measured(what: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.hooks.cost", what], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    print({arm: round(value, 4) for arm, value in found.items()})
    return found


@pytest.mark.slow
def test_on_prompts_of_264_tokens() -> None:
    found = measured("long")
    assert found["opened"] <= 1.02
    assert found["twelve reads"] <= 1.05


@pytest.mark.slow
def test_on_the_embedded_model_where_a_forward_takes_hardly_longer_than_the_copies() -> None:
    found = measured("embedded")
    assert found["opened"] <= 1.02
    assert found["twelve reads"] <= 1.02 * found["plain hooks"]
