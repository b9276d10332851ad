"""Two Ray workers on this machine against this process: the same numbers, to the bit, whoever dies meanwhile."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import frankenlens as fl
from hooks.errors import FrankenlensError
from hooks.shared import shared
from interp.cluster import Cluster
from interp.cluster.cluster import WorkerLost
from interp.cluster.coordinator import MOST_LOST

pytest.importorskip("ray")

RUNNING: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of this machine alone; it tells nobody of itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield Cluster()
    ray.shutdown()


def opened() -> fl.Pair:
    """The pair that ships; workers find this function by its name."""
    return fl.Pair.from_pretrained(fl.embedded.path("in"), fl.embedded.path("rl"))


def methods(pair: fl.Pair) -> dict[str, Any]:
    """What several methods find, each in more than one part."""
    examples = fl.tasks.sample("sum", 10, seed=0, split="map")
    found: dict[str, Any] = {"process": os.getpid()}
    decisions = fl.find_decisions(pair, examples, "first", **RUNNING)
    found["decisions"] = decisions.rl_values, [trace.ids for trace in decisions.rl_traces]
    found["map"] = fl.component_map(pair, decisions, ["rl_to_in"], ["attn_out"], batch_size=2, progress=False)
    found["2x2"] = fl.two_by_two(pair, decisions, batch_size=2)
    zeros = [
        fl.Intervention(f"blocks.{i}.attn.hook_z", kind, index=0) for i in (2, 5) for kind in ("zero", "mean")
    ]
    asked = {"batch_size": 2, "progress": False}
    found["sweep"] = fl.sweep(pair.rl, decisions.prompts, zeros, decisions.metric, **asked)
    cuts = [fl.Knockout("image", "question", layer) for layer in (1, 4)]
    found["knockout"] = fl.knockout_effects(pair.in_, decisions.prompts, cuts, decisions.metric, **asked)
    found["lens"] = fl.logit_lens(pair, decisions.prompts, where="decision", batch_size=1, progress=False)
    ready = fl.questions(pair.builder, examples[:6], metrics=("vis",))
    found["metrics"] = fl.ask(pair.in_, ready, **RUNNING)
    answers = {"accuracy": fl.answers(pair.builder, examples[:6], **RUNNING)}
    found["transfer"] = fl.transfer(pair.in_, pair.rl, fl.parts(pair.in_), answers, progress=False)
    prompts = [pair.builder.build(example) for example in examples[:6]]
    moved = fl.Moved("blocks.3.mlp")
    found["lockstep"] = fl.lockstep(pair.rl, pair.in_, prompts, moved, progress=False, **RUNNING)
    found["lockstep"] = [(one.tokens, one.donor_choices, one.n_moved) for one in found["lockstep"]]
    return found


@pytest.fixture(scope="module")
def both(cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this process finds, and two workers."""
    with_pair = opened()
    try:
        here = methods(with_pair)
    finally:
        with_pair.close()
    return here, cluster.run(opened, methods, progress=False)


NAMES = ("decisions", "map", "2x2", "sweep", "knockout", "lens", "metrics", "transfer", "lockstep")


@pytest.mark.slow  # in a process of its own (make clusters): beside nnsight, Ray's workers cannot import beartype
@pytest.mark.parametrize("name", NAMES)
def test_two_workers_find_what_one_process_finds(name: str, both: tuple[dict, dict]) -> None:
    here, there = both
    assert there["process"] != here["process"]
    assert _bits(here[name]) == _bits(there[name])


def _bits(found: Any) -> Any:
    """Every number as it lies in memory."""
    if hasattr(found, "to_dataset") or hasattr(found, "data_vars"):
        whole = found.to_dataset(name="it") if hasattr(found, "to_dataset") else found
        return {
            name: (one.dims, str(one.dtype), _bits(one.to_numpy())) for name, one in whole.variables.items()
        }
    if isinstance(found, np.ndarray):
        return found.tolist() if found.dtype == object else found.tobytes()
    if isinstance(found, (list, tuple)):
        return [_bits(one) for one in found]
    return found


def _nothing() -> Any:
    return SimpleNamespace(close=lambda: None)


def _dying(log: Path, always: bool, _: Any) -> list[int]:
    """Six steps, of which the fourth kills its worker, the first time or always."""

    def step(i: int) -> int:
        with log.open("a") as file:
            file.write(f"{i}\n")
        if i == 3:
            try:
                os.close(os.open(log.with_suffix(".killed"), os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                if always:
                    os.kill(os.getpid(), signal.SIGKILL)
        return i * i

    return [found for _, found in shared("steps", range(6), step)]


def _times(log: Path) -> Counter[int]:
    """How often each step was done."""
    return Counter(map(int, log.read_text().split()))


@pytest.mark.slow  # as above
def test_a_killed_worker_costs_the_part_that_it_was_at(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cluster.run(_nothing, partial(_dying, tmp_path / "log", False), progress=False)
    assert found == [i * i for i in range(6)]
    assert _times(tmp_path / "log") == {**dict.fromkeys(range(6), 1), 3: 2}
    assert "a worker has ended, and another takes its place" in capsys.readouterr().err


@pytest.mark.slow
def test_a_part_that_kills_every_worker_is_named(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(
        WorkerLost, match=r"3 workers have ended at the same part, part 4 of 6 of 'steps' \(3\)"
    ):
        cluster.run(_nothing, partial(_dying, tmp_path / "log", True), progress=False)
    assert _times(tmp_path / "log")[3] == MOST_LOST


def _fails(_: Any) -> None:
    def refuse(i: int) -> int:
        raise FrankenlensError(f"step {i} is refused")

    list(shared("steps", range(1), refuse))


@pytest.mark.slow
def test_an_error_is_the_one_of_one_process(cluster: Cluster) -> None:
    with pytest.raises(FrankenlensError, match=r"^step 0 is refused$"):
        cluster.run(_nothing, _fails, progress=False)


def test_open_models_are_not_sent(cluster: Cluster, pair: fl.Pair) -> None:
    with pytest.raises(FrankenlensError, match="not pickled"):
        cluster.run(lambda: pair, methods)


def test_too_many_gpus_are_refused(cluster: Cluster) -> None:
    with pytest.raises(
        FrankenlensError, match=r"no machine of the cluster has .*64 GPUs \(--gpus-per-model\)"
    ):
        Cluster(gpus_per_model=64).run(_nothing, _fails)


def test_threads_are_those_of_this_process(cluster: Cluster) -> None:
    assert cluster.each == {"num_cpus": torch.get_num_threads(), "memory": 0}


@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": -2}, {"gpus_per_model": -1}, {"memory": -1}])
def test_no_worker_at_all_is_refused_and_not_waited_for(given: dict[str, Any]) -> None:
    with pytest.raises(FrankenlensError, match=f"{next(iter(given))}=.*: give at least"):
        Cluster(**given)
