"""A run that was killed while it saved goes on from the last complete checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.triple import checkpoints
from experiments.triple.model import ModelSize, build_model, build_tokenizer
from experiments.triple.packing import Packer
from experiments.triple.resuming import last_complete, train_from_last
from experiments.triple.rl import RL, build_trainer
from experiments.triple.supervised import Schedule, fresh_rows, train, turns_loss
from interp.questions.tasks import PERCEPTION

TINY = ModelSize(
    layers=2, hidden=32, heads=2, kv_heads=1, mlp=32, vision_layers=1, vision_hidden=16, vision_heads=2
)


def short(name: str) -> Callable[[Path], Any]:
    """Cut a file to half its length."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: _half(folder / name)])


def _half(file: Path) -> int:
    return file.stat().st_size // 2


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "model.safetensors is cut short": short("model.safetensors"),
    "no weights": without("model.safetensors"),
    "optimizer.pt is cut short": short("optimizer.pt"),
    "optimizer.pt is missing": without("optimizer.pt"),
    "scheduler.pt is missing": without("scheduler.pt"),
    "rng_state*.pth is missing": without("rng_state.pth"),
    "rng_state.pth is cut short": short("rng_state.pth"),
    "trainer_state.json is missing": without("trainer_state.json"),
    "trainer_state.json is cut short": short("trainer_state.json"),
    "trainer_state.json is of step 1": lambda folder: shutil.copy(
        folder.with_name("checkpoint-1") / "trainer_state.json", folder
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Path], Any]:
    """A trainer of two steps from the same IN, rewarded so that there is something to learn."""
    folder = tmp_path_factory.mktemp("models") / "in"
    checkpoints.save(build_model(build_tokenizer(), TINY, seed=0).eval(), folder)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(reply)) % 5) for reply in completions]

    def make(out: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("experiments.triple.rl.exact_answer", reward)
            model, processor = checkpoints.load(folder)
            return build_trainer(model, processor, RL(2, prompts=2, samples=3, save_every=1), 0, out)

    return make


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory) -> tuple[Path, Any]:
    """The folder of a run that was never killed, and its trainer."""
    out = tmp_path_factory.mktemp("run")
    trainer = made(out)
    train_from_last(trainer, out)
    return out, trainer


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_checkpoint_that_is_incomplete_is_passed_over(
    fault: str, finished: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    args = finished[1].args
    assert last_complete(out, args) == out / "checkpoint-2" and not capsys.readouterr().err
    DAMAGE[fault](out / "checkpoint-2")
    assert last_complete(out, args) == out / "checkpoint-1"
    said = capsys.readouterr().err
    assert said == f"{out}: checkpoint-2 is incomplete ({fault}); going on from checkpoint-1.\n"
    shutil.rmtree(out / "checkpoint-1")
    assert last_complete(out, args) is None
    assert capsys.readouterr().err.endswith("no other is complete, so training starts afresh.\n")


def test_a_shard_that_is_missing_is_named(finished: tuple[Path, Any], tmp_path: Path, capsys) -> None:
    last = tmp_path / "checkpoint-2"
    shutil.copytree(finished[0] / "checkpoint-2", last)
    (last / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert last_complete(tmp_path, finished[1].args) is None
    assert "(model-2.safetensors is missing)" in capsys.readouterr().err
    assert last_complete(tmp_path / "nowhere", finished[1].args) is None and not capsys.readouterr().err


@pytest.mark.parametrize("kept", [1, 0])
def test_training_ends_with_the_weights_of_a_run_that_was_not_killed(
    kept: int, finished: tuple[Path, Any], made, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    short("model.safetensors")(out / "checkpoint-2")
    if not kept:
        without("trainer_state.json")(out / "checkpoint-1")
    trainer = made(out)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    train_from_last(trainer, out)
    assert ("going on from checkpoint-1" if kept else "starts afresh") in capsys.readouterr().err
    whole = dict(finished[1].model.named_parameters())
    assert all(torch.equal(p, whole[name]) for name, p in trainer.model.named_parameters())
    assert max(float((whole[name].detach() - p).abs().max()) for name, p in start.items()) > 1e-5
    assert last_complete(out, trainer.args) == out / "checkpoint-2"


def test_a_stage_whose_file_is_cut_short_starts_afresh(tmp_path: Path, capsys) -> None:
    tokenizer, file = build_tokenizer(), tmp_path / "stage.safetensors"
    loss = turns_loss(Packer(tokenizer, TINY.patch), fresh_rows(PERCEPTION, 2, 2, chains=False))
    schedule = Schedule(steps=2, batch=2, lr=1e-3, warmup=1)
    ends = []
    for _ in range(2):
        model = build_model(tokenizer, TINY, seed=0)
        assert train(model, loss, schedule, (0, 9), file, "stage") == 2
        ends.append(dict(model.named_parameters()))
        file.write_bytes(file.read_bytes()[: _half(file)])
    assert "stage.safetensors is cut short" in (said := capsys.readouterr().err) and "starts afresh" in said
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
