"""A sweep that is killed loses nothing: finished parts are on disk, sound, and not computed again."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError
from interp.metrics import LogitDifference
from interp.results.lock import locked
from interp.results.store import Store
from interp.sweep import Intervention, sweep
from interp.sweep import engine as engine
from tests.interp.sweep.test_sweep import duo


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch):
    """A sweep of 3 batches x 12 interventions in shards of 3."""
    monkeypatch.setattr(engine, "SHARD", 3)
    pair = duo("qwen2_5_vl")
    wanted = [Intervention(f"blocks.{i}.attn.hook_z", "zero", "image", h) for i in range(3) for h in range(4)]

    def run(out: Path | None):
        return sweep(
            pair.recipient, pair.prompts, wanted, pair.metrics, batch_size=1, out=out, progress=False
        )

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }


def test_shards_change_no_number(job, tmp_path: Path) -> None:
    assert job(tmp_path / "a").equals(job(None))
    assert len(contents(tmp_path / "a")) == 2 + 3 * (1 + 4)  # what it is of, its batches, and their parts


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed_byte_for_byte(job, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begun = time.perf_counter()
        whole = job(tmp_path / "whole")
        took = time.perf_counter() - begun
        rng, cut_short = random.Random(0), 0
        for trial in range(20):
            folder = tmp_path / str(trial)
            child = os.fork()
            if child == 0:
                try:
                    job(folder)
                finally:
                    os._exit(0)
            time.sleep(rng.uniform(0.02, 1.0) * took)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            cut_short += not folder.is_dir() or contents(folder) != contents(tmp_path / "whole")
            assert job(folder).equals(whole)
            assert contents(folder) == contents(tmp_path / "whole")
        assert cut_short >= 10
    finally:
        torch.set_num_threads(threads)


def test_what_is_there_is_not_computed_again(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job(tmp_path / "a")

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(engine, "BatchSweep", never)
    assert job(tmp_path / "a").equals(whole)
    next((tmp_path / "a").glob("00001-0002*")).unlink()
    with pytest.raises(AssertionError, match="computed again"):
        job(tmp_path / "a")


def test_a_damaged_shard_is_made_again_and_said_so(job, tmp_path: Path) -> None:
    whole = job(tmp_path / "a")
    before = contents(tmp_path / "a")
    for name, spoil in (
        ("00000-0001", lambda b: b[:-3]),
        ("00002-0000", lambda b: b[:-120] + bytes([b[-120] ^ 1]) + b[-119:]),
    ):
        path = tmp_path / "a" / f"{name}.part"
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.warns(UserWarning, match=f"{name}.part is damaged and is made again"):
            assert job(tmp_path / "a").equals(whole)
        assert contents(tmp_path / "a") == before


def test_a_second_process_on_one_folder_is_refused_by_name(job, tmp_path: Path) -> None:
    with locked(tmp_path / "shared"):
        child = os.fork()
        if child == 0:
            try:
                job(tmp_path / "shared")
            except FrankenlensError as error:
                os._exit(0 if f"process {os.getppid()} on" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert job(tmp_path / "shared").equals(job(None))  # the same thread has it already
    assert not (tmp_path / "shared" / ".lock").exists()


def test_a_folder_serves_one_sweep(job, tmp_path: Path) -> None:
    job(tmp_path / "a")
    pair = duo("qwen2_5_vl")
    other = [Intervention("blocks.0.attn.hook_z", "zero", "image", 0)]
    with pytest.raises(FrankenlensError, match=r"holds another run \(other interventions\)"):
        sweep(pair.recipient, pair.prompts, other, pair.metrics, out=tmp_path / "a", progress=False)
    with pytest.raises(FrankenlensError, match=r"holds another run \(other recipient, donor|other donor"):
        sweep(
            pair.donor,
            pair.prompts,
            [Intervention(f"blocks.{i}.attn.hook_z", "zero", "image", h) for i in range(3) for h in range(4)],
            pair.metrics,
            out=tmp_path / "a",
            progress=False,
        )


def test_other_prompts_are_another_sweep(tmp_path: Path) -> None:
    pair = duo("qwen2_5_vl")
    metric = LogitDifference(torch.tensor([30]), torch.tensor([40]))
    wanted = [Intervention("blocks.0.hook_mlp_out", "zero")]
    sweep(pair.recipient, pair.prompts[:1], wanted, metric, out=tmp_path, progress=False)
    with pytest.raises(FrankenlensError, match="is of other prompts or settings"):
        sweep(pair.recipient, pair.prompts[1:2], wanted, metric, out=tmp_path, progress=False)


def test_values_of_every_shape_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path, {"a": 1})
    rng = np.random.default_rng(0)
    for shape in ((2, 3), (0, 4), (1,)):
        values = rng.normal(size=shape)
        values.flat[:1] = np.nan
        store.save("x", values, "of")
        np.testing.assert_array_equal(store.load("x", "of"), values)
    assert store.load("y", "of") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FrankenlensError, match="cannot write to"):
        Store(blocked / "x", {})


def test_a_sweep_goes_on_in_the_batches_that_it_was_begun_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory is free today: parts, and means over them, are those that are there."""
    pair = duo("qwen2_vl")
    wanted = [
        Intervention("blocks.1.attn.hook_z", "zero", index=0),
        Intervention("blocks.1.hook_mlp_out", "mean"),
    ]
    settings: Any = {"batch_size": 16, "progress": False}
    whole = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, out=tmp_path / "a", **settings)
    kept = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.part")}
    first = sorted(path for path in kept if path.name.startswith("00000"))
    assert len(first) >= 2
    first[0].unlink()
    ran: list[int] = []
    own = engine._parts

    def fewer(prompts: Any, batch_size: int) -> Any:
        ran.append(batch_size)
        return own(prompts, 2)

    monkeypatch.setattr(engine, "_parts", fewer)
    again = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, out=tmp_path / "a", **settings)
    assert ran
    np.testing.assert_array_equal(again["value"], whole["value"])
    np.testing.assert_array_equal(again["clean"], whole["clean"])
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.part")} == kept
    other = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, out=tmp_path / "b", **settings)
    assert len(list((tmp_path / "b").rglob("*.part"))) > len(kept)
    size = max(1.0, float(np.nanmax(np.abs(whole["value"]))))
    np.testing.assert_allclose(other["value"], whole["value"], rtol=0, atol=1e-5 * size)
