"""Work that was cut off goes on with the parts that it has, though there is memory for other batches now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hooks import FrankenlensError
from interp.decision import DecisionSet, find_decisions
from interp.map import component_map
from interp.map.batch import Batch
from interp.pair import generation
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.tasks import sample
from interp.results.store import Store


class Cut(Exception):
    """Somebody ends it."""


def test_traces_are_written_on_in_other_batches(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [pair.builder.build(e) for e in sample("sum", 5, seed=0, split="map")]
    expected = [greedy(pair.rl, [prompt], 6)[0] for prompt in prompts]
    own, ran, most = generation.greedy_batch, [], 2

    def counted(vlm, batch, *rest):
        if len(ran) == most:
            raise Cut
        ran.append(len(batch))
        return own(vlm, batch, *rest)

    monkeypatch.setattr(generation, "greedy_batch", counted)
    store = Store(tmp_path / "a", {})
    with pytest.raises(Cut):
        greedy(pair.rl, prompts, 6, batch_size=2, keep=store)
    most = 9
    assert greedy(pair.rl, prompts, 6, batch_size=3, keep=store) == expected
    assert ran == [2, 2, 1]  # the last alone was left
    assert greedy(pair.rl, prompts, 6, batch_size=1, keep=store) == expected
    assert ran == [2, 2, 1]
    with pytest.raises(FrankenlensError, match="other prompts or settings"):
        greedy(pair.rl, prompts[1:], 6, batch_size=2, keep=store)


def test_a_map_goes_on_in_other_batches(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_decisions(pair, sample("sum", 12, seed=0, split="map"), "first", max_new_tokens=16)
    assert len(found.decisions) >= 5

    def mapped(decisions: DecisionSet, batch_size: int, keep: Store | None = None) -> xr.Dataset:
        settings = {"n_random": 1, "further": (), "progress": False, "keep": keep}
        return component_map(pair, decisions, ["rl_to_in"], ["mlp_out"], ["all"], batch_size, **settings)

    expected = mapped(found, 16)
    own, ran, most = Batch.run, [], 2

    def counted(job: Batch) -> dict[str, np.ndarray]:
        if len(ran) == most:
            raise Cut
        ran.append(len(job.partner))
        return own(job)

    monkeypatch.setattr(Batch, "run", counted)
    store = Store(tmp_path / "a", {})
    with pytest.raises(Cut):
        mapped(found, 2, store)
    most = 99
    again = mapped(found, 4, store)
    assert ran[:2] == [2, 2] and sum(ran) == len(found.decisions)
    largest = float(np.abs(expected["effect"]).max())
    assert largest > 0.1
    np.testing.assert_allclose(again["effect"], expected["effect"], rtol=0, atol=1e-5 * max(1, largest))
    xr.testing.assert_identical(mapped(found, 3, store), again)
