"""What opening costs in time: medians of interleaved runs in one process."""

import statistics
import time

import pytest
import torch

from experiments import embedded
from hooks import HookedVLM
from hooks.selfcheck import check_inputs


@pytest.mark.slow
def test_nothing_attached_is_free_and_twelve_reads_are_cheap() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("in"))
    one = check_inputs(vlm.processor)
    inputs = {name: torch.cat([value] * 16) for name, value in one.items()}
    names = [f"blocks.{i}.hook_resid_{place}" for i in range(6) for place in ("pre", "post")]
    arms = {
        "bare": lambda: vlm.model(**inputs),
        "opened": lambda: vlm(inputs),
        "twelve reads": lambda: vlm.run_with_cache(inputs, names),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for _ in range(60):
            for arm, run in arms.items():
                start = time.perf_counter()
                run()
                times[arm].append(time.perf_counter() - start)
    medians = {arm: statistics.median(values[10:]) for arm, values in times.items()}
    print({arm: round(value / medians["bare"], 4) for arm, value in medians.items()})
    assert medians["opened"] <= 1.02 * medians["bare"]
    assert medians["twelve reads"] <= 1.05 * medians["bare"]
