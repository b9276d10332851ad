"""The freezing experiment: a few steps of each arm, killed and continued, and on questions of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from torch import Tensor

from experiments import embedded
from experiments.commands.freeze import COMMAND, FreezeConfig, check
from experiments.retraining.arms import plan_arms, random_layers
from experiments.retraining.recipe import read_trl
from experiments.triple import checkpoints, evaluate
from experiments.triple.clock import CpuClock
from experiments.triple.model import ModelSize, build_model, build_tokenizer
from hooks import FrankenlensError
from interp.questions.tasks import Split, sample
from interp.regions import thirds

SIZE = ModelSize(
    layers=3, hidden=32, heads=2, kv_heads=1, mlp=32, vision_layers=1, vision_hidden=16, vision_heads=2
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model of the triple's kind and vocabulary, untrained."""
    folder = tmp_path_factory.mktemp("models") / "in"
    checkpoints.save(build_model(build_tokenizer(), SIZE, seed=0).eval(), folder)
    return folder


@pytest.fixture
def config(small: Path, tmp_path: Path, monkeypatch) -> FreezeConfig:
    """Two steps of three arms on it, rewarded so that there is something to learn."""

    def reward(completions, **_):
        return [float(len(str(reply)) % 5) for reply in completions]

    monkeypatch.setattr("experiments.triple.rl.exact_answer", reward)
    return FreezeConfig(
        in_=str(small), rl=str(small), regions=("Early",), random=0, reruns=0, also=("blocks.1.attn.head.1,vision",),
        steps=3, prompts=2, samples=4, save_every=1, n=2, out=tmp_path / "out",
    )  # fmt: skip


def killed_at(arm: str, step: int):
    """A clock's tick that ends the process, so to speak, at a step of an arm."""
    ticks = count(1)

    def tick(clock: CpuClock) -> float:
        if arm in str(clock.path) and next(ticks) == step:
            raise KeyboardInterrupt
        return 0.0

    return tick


def tensors(folder: Path):
    return load_file(folder / "model.safetensors")


def change(folder: Path, start: Path, name: str) -> Tensor:
    """How far each row of a weight is from where it started."""
    return (tensors(folder)[name] - tensors(start)[name]).abs().sum(1)


def test_arms_are_trained_measured_kept_and_continued(config: FreezeConfig, small: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CpuClock, "tick", killed_at("Early", 3))
        with pytest.raises(KeyboardInterrupt):
            COMMAND.run(config)
    arms, unfinished = config.out / "arms", config.out / "unfinished"
    assert [folder.name for folder in arms.iterdir()] == ["unfrozen-seed0"]
    assert (unfinished / "Early-seed0" / "checkpoint-2").is_dir() and not (config.out / "freeze.csv").exists()
    written = (arms / "unfrozen-seed0" / "model.safetensors").stat().st_mtime_ns

    [section] = COMMAND.run(config)
    assert "no share of it is given. Changes in points: Early" in section.finding
    assert (arms / "unfrozen-seed0" / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((unfinished / "Early-seed0" / "log.json").read_text())[-1]["step"] == 3
    assert not list(unfinished.glob("*/checkpoint-*"))
    layer, query = "model.layers.{}.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    early, unit = arms / "Early-seed0", arms / "blocks.1.attn.head.1-vision-seed0"
    assert not change(early, small, layer.format(0)).any() and change(early, small, layer.format(1)).all()
    assert change(arms / "unfrozen-seed0", small, layer.format(0)).all()
    assert not change(unit, small, "visual.blocks.0.attn.qkv.weight").any()
    assert (
        change(unit, small, query)[:16].all() and not change(unit, small, query)[16:].any()
    )  # 2 heads of 16

    table = pd.read_csv(config.out / "freeze.csv")
    assert set(table["arm"]) == {"IN", "unfrozen", "Early", "blocks.1.attn.head.1,vision"}
    assert {"freeze_tasks.csv", "freeze.png", "report.html"} <= {file.name for file in config.out.iterdir()}
    report = pd.read_csv(unfinished / "Early-seed0" / "freezing.csv")
    assert report.loc[report["frozen"], "identical"].all()

    whole = replace(config, also=(), out=config.out.with_name("whole"))
    COMMAND.run(whole)  # never killed
    ends = tensors(whole.out / "arms" / "Early-seed0")
    assert all(weight.equal(ends[name]) for name, weight in tensors(early).items())
    other = whole.out / "unfinished" / "region-0-seed0" / "arm.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"addresses": ["blocks.2"], "seed": 0}))
    with pytest.raises(FrankenlensError, match=r"region.0-seed0.*other settings \(addresses\)"):
        COMMAND.run(replace(whole, partition="1/2", regions=("region 0",)))
    with pytest.raises(FrankenlensError, match=r"holds a run with other settings \(rl\)"):
        COMMAND.run(replace(config, lr=1e-3))


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Path]:
    """Two JSONL files of synthetic scenes: to train on, and to measure on."""
    files = {}
    splits: tuple[Split, ...] = ("train", "test")
    for name in splits:
        rows = []
        for task in ("sum", "same"):
            for i, example in enumerate(sample(task, 6, evaluate.TEST_SEED, name)):
                image = f"{name}-{task}-{i}.png"
                example.images[0].save(tmp_path / image)
                rows.append(
                    {"question": example.question, "answer": example.answer, "image": image, "task": task}
                )
        rows.append({"question": "lost ?", "answer": "1", "image": "nowhere.png", "task": "sum"})
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.mark.slow
def test_own_questions_by_trl_alone(questions: dict[str, Path], tmp_path: Path) -> None:
    trl = tmp_path / "trl.yaml"
    trl.write_text("gradient_checkpointing: false\nlr_scheduler_type: constant\nweight_decay: 0.1\n")
    config = FreezeConfig(
        in_=str(embedded.path("in")), rl=str(embedded.path("rl")), data=questions["test"], train=questions["train"],
        regions=("Late",), random=0, reruns=0, also=("blocks.0.attn.kv_head.1",), steps=2, prompts=4, samples=4,
        lr=1e-4, max_new_tokens=16, n=5, trl=trl, out=tmp_path / "out",
    )  # fmt: skip
    [section] = COMMAND.run(config)
    late, unit = config.out / "arms" / "Late-seed0", config.out / "arms" / "blocks.0.attn.kv_head.1-seed0"
    start, layer = embedded.path("in"), "model.layers.{}.mlp.up_proj.weight"
    assert not change(late, start, layer.format(8)).any() and change(late, start, layer.format(0)).all()
    keys = change(unit, start, "model.layers.0.self_attn.k_proj.weight")
    assert keys[:32].all() and not keys[32:].any()  # 2 kv heads of 32
    _, hits = evaluate.measure(embedded.path("in"), 5)  # by another prompt builder and reader
    expected = hits[[evaluate.TASK_NAMES.index(task) for task in ("sum", "same")]]
    measured = json.loads((config.out / "measured" / "in.json").read_text())["record"]["right"]
    assert measured == expected.astype(float).ravel().tolist()
    table = pd.read_csv(config.out / "freeze.csv")
    assert set(table["group"]) == {"all", "sum", "same"} and set(table.query("group == 'all'")["n"]) == {10}
    left_out = dict(section.account.left_out)
    assert left_out.pop("test questions beyond the first 5 of a task (--n)") == 2
    assert [reason.partition(":")[0] for reason in left_out] == ["training row 13", "test row 13"]


def test_random_layers_are_seeded_equally_many_and_no_region() -> None:
    partition = thirds(28)
    drawn = random_layers(partition, 6, seed=3)
    assert drawn[:2] == random_layers(partition, 2, seed=3) != random_layers(partition, 2, seed=4)
    assert [len(layers) for layers in drawn] == [10, 9, 9] * 2
    regions = [tuple(f"blocks.{i}" for i in range(a, b + 1)) for a, b in partition.regions.values()]
    assert len({*drawn, *regions}) == 9
    with pytest.raises(FrankenlensError, match="3 layers have no further choice of 1"):
        random_layers(thirds(3), 1, seed=0)
    many = [layer for layers in random_layers(partition, 300, 0) for layer in layers]
    counts = np.unique(many, return_counts=True)[1]
    assert counts.min() > 60 and counts.max() < 140  # each is expected 100 times


def test_every_seed_has_its_unfrozen_run_and_reruns_have_other_seeds() -> None:
    arms = plan_arms(thirds(9), ("Early",), 1, 1, ("projector",), seed=5, seeds=2)
    assert [arm.name for arm in arms[:5]] == [
        "unfrozen",
        "Early",
        "random 1",
        "projector",
        "unfrozen, other seed 1",
    ]
    assert [(arm.seed, arm.trained_with) for arm in arms[::5]] == [(5, 5), (6, 6)]
    assert (arms[4].seed, arms[4].trained_with) == (5, 1005)
    assert len({arm.folder for arm in arms}) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"also": ("blocks.99",)}, "blocks 0-2"),
        ({"also": ("blocks.0.attn.hed.1",)}, "is not an address"),
        ({"regions": ("Middle",)}, "no region 'Middle', only Early, Mid, Late"),
        ({"also": ("vision,projector,embed,ln_final,blocks.0-2",)}, "nothing is left to train"),
        ({"also": ("vision", "vision")}, "'vision' is asked for twice"),
        ({"samples": 1}, "at least 2"),
        ({"data": Path("a.jsonl")}, "--train .* and --data .* go together"),
        ({"partition": "4/4"}, "covers layers 0-7; the model has 3"),
        ({"paper": True}, "which has --n 100, not --n 2: leave out --n, or --paper"),
        ({"train_images": Path("x")}, "--train-images x needs --train"),
        ({"max_new_tokens": 64}, "--max-new-tokens 64 needs --train"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_trained(change, message, config: FreezeConfig) -> None:
    with pytest.raises(FrankenlensError, match=message):
        COMMAND.run(replace(config, **change))
    assert not (config.out / "arms").exists()


def test_arguments_of_trl(config: FreezeConfig, tmp_path: Path) -> None:
    file = tmp_path / "trl.json"
    for text, message in (
        ('{"deepspeeed": "zero3.json"}', "has no argument 'deepspeeed'. Did you mean 'deepspeed'"),
        ('{"learning_rate": 1}', "sets learning_rate; use --lr"),
        ("[1]", "must hold a mapping"),
        ('{"fsdp": "full_shard"}', r"--trl asks for fsdp.*blocks\.1\.attn\.head\.1"),
    ):
        file.write_text(text)
        with pytest.raises(FrankenlensError, match=message):
            check(replace(config, trl=file))
    file.write_text('{"deepspeed": "zero3.json", "bf16": true}')
    with pytest.raises(
        FrankenlensError, match=r"deepspeed is 'zero3\.json', .*shared-prefix loss.*--train and --data"
    ):
        check(replace(config, trl=file, also=("vision",)))
    own = {"data": tmp_path / "test.jsonl", "train": tmp_path / "train.jsonl"}
    check(replace(config, trl=file, also=("vision",), **own))  # by TRL's own trainer
    assert read_trl(file) == {"deepspeed": "zero3.json", "bf16": True}
