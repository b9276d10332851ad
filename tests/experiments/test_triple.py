"""The recipe of the embedded triple, a few steps of each stage on a tiny configuration."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.triple import checkpoints, evaluate
from experiments.triple.clock import CpuClock
from experiments.triple.model import END, IMAGE, SPECIAL, ModelSize, build_model, build_tokenizer
from experiments.triple.packing import Packer, describe, draw_turns, patches, reply_text
from experiments.triple.replies import MAX_REPLY, prompts, read, suppressed
from experiments.triple.rl import RL, build_trainer, exact_answer
from experiments.triple.supervised import Schedule, fresh_rows, train, turns_loss
from experiments.triple.teacher import explain
from experiments.triple.train import TrainTriple, run
from hooks.errors import FrankenlensError
from interp.questions.tasks import PERCEPTION, REASONING, TASKS, sample
from interp.questions.tasks.sampling import draw
from interp.questions.tasks.scenes import render_batch, sample_scene

TINY = ModelSize(
    layers=2, hidden=32, heads=2, kv_heads=1, mlp=32, vision_layers=1, vision_hidden=16, vision_heads=2
)
TWO_STEPS = Schedule(steps=2, batch=2, lr=1e-3, warmup=1)


def tiny_config(out: Path) -> TrainTriple:
    return TrainTriple(
        out,
        control=True,
        size=TINY,
        align=TWO_STEPS,
        perception=TWO_STEPS,
        cold_start=TWO_STEPS,
        control_schedule=TWO_STEPS,
        rl=RL(steps=2, prompts=2, samples=2, save_every=1),
        n=2,
        threads=1,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, TINY, seed=0).eval()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return checkpoints.build_processor(tokenizer, TINY.patch)


def test_every_gold_text_is_in_the_vocabulary(tokenizer):
    unknown = tokenizer.unk_token_id
    for task in (*PERCEPTION, *REASONING):
        for example in sample(task, 30, seed=0, split="train"):
            reply = reply_text(example.answer, example.reasoning)
            assert unknown not in tokenizer(f"{example.question} {reply}")["input_ids"]
            assert len(tokenizer(reply)["input_ids"]) < MAX_REPLY
            assert read(reply) == type(read(reply))(reply, example.answer, example.reasoning)


def test_packer_gives_what_the_processor_gives(tokenizer, processor):
    examples = sample("sum", 3, seed=0, split="train")
    packer = Packer(tokenizer, TINY.patch)
    inputs: Any = prompts(processor, examples)
    pixels = patches(render_batch([example.meta["scene"] for example in examples]), TINY.patch)
    assert torch.equal(inputs["pixel_values"], pixels)
    for example, ids in zip(examples, inputs["input_ids"], strict=True):
        alone = packer.prefix + packer.encode(f"{example.question} {END} <|im_start|> assistant")
        assert ids.tolist() == alone


def test_packed_questions_have_the_logits_of_separate_prompts(tokenizer, model):
    packer, rng = Packer(tokenizer, TINY.patch), np.random.default_rng(0)
    scene, turns = draw_turns(rng, REASONING, 3, "train", chains=True)
    turns.append(describe(rng, scene, 4))
    packed = dict(packer.pack([scene], [turns]))
    del packed["labels"]
    with torch.no_grad():
        logits = model(**packed).logits[0]
        at = len(packer.prefix)
        for turn in turns:
            branch = packer.encode(f"{turn.question} {END} <|im_start|> assistant {turn.reply} {END}")
            ids = torch.tensor([packer.prefix + branch])
            alone = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids(IMAGE)).int(),
                pixel_values=packed["pixel_values"],
                image_grid_thw=packed["image_grid_thw"],
            ).logits[0, len(packer.prefix) :]
            torch.testing.assert_close(logits[at : at + len(branch)], alone, atol=1e-5, rtol=1e-5)
            at += len(branch)


def test_descriptions_are_true_and_only_what_the_image_decides_is_learnt():
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, "train")
    turn = describe(rng, scene, 40)
    words = turn.reply.split()
    assert turn.learnt is not None and len(turn.learnt) == len(words) + 1
    shown = {item.cell: f"{item.colour} {item.shape}" for item in scene.objects}
    for fact in turn.reply.split(" , "):
        kind, *rest = fact.split()
        if kind == "count":
            assert sum(rest[0] in text.split() for text in shown.values()) == int(rest[1])
        elif kind == "find":
            cells = [cell for cell, text in shown.items() if text == " ".join(rest[:2])]
            assert rest[2] == (cells[0] if cells else "none")
        else:
            assert " ".join(rest) == shown.get(kind, "empty empty")
    learnt = {word for word, kept in zip(words, turn.learnt, strict=False) if kept}
    assert not learnt & {"count", "find", ","}


def test_the_teacher_overlooks_half_of_what_it_counts_while_reasoning_and_nothing_else():
    rng = np.random.default_rng(0)
    stated: list[int] = []
    for name, task in TASKS.items():
        for _ in range(300):
            scene, arguments = draw(name, rng, "train")
            sound, given = task.solve(arguments, scene), explain(task, arguments, scene, rng, misses=0.5)
            assert explain(task, arguments, scene, rng, misses=0.0) == sound
            if task.kind == "perception":
                assert given == sound
                continue
            numbers = [[int(w) for w in s.chain.split() if w.isdigit()] for s in (sound, given)]
            stated += [true - said for true, said in zip(*numbers, strict=True) if true > (name == "same")]
            if name == "sum":  # the answer follows from what the chain says
                assert int(given.answer) == sum(numbers[1])
            if name == "difference":
                assert int(given.answer) == abs(numbers[1][0] - numbers[1][1])
    # An object that is counted under both names can be overlooked under either.
    assert set(stated) == {0, 1, 2}
    assert abs(np.mean([miss > 0 for miss in stated]) - 0.5) < 0.07


def test_a_stage_that_was_interrupted_ends_with_the_same_weights(tokenizer, tmp_path: Path):
    loss = turns_loss(Packer(tokenizer, TINY.patch), fresh_rows(PERCEPTION, 2, 2, chains=False))
    schedule = Schedule(steps=4, batch=2, lr=1e-3, warmup=1)
    weights = []
    for interruptions in ((), (2,)):
        file = tmp_path / f"{len(interruptions)}.safetensors"
        for steps in interruptions:
            done = iter([0.0] * (2 * steps - 1) + [1.0] * 9)
            part = build_model(tokenizer, TINY, seed=0)
            assert train(part, loss, schedule, (0, 9), file, "part", lambda done=done: next(done)) == steps
        whole = build_model(tokenizer, TINY, seed=0)
        assert train(whole, loss, schedule, (0, 9), file, "whole") == 4
        weights.append(dict(whole.named_parameters()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_clock_goes_on_where_it_was_interrupted(tmp_path: Path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"cpu_seconds": 5.0}))
    clock = CpuClock(path, limit=10.0)
    assert 0.5 <= clock.tick() < 0.6
    assert json.loads(path.read_text())["cpu_seconds"] >= 5.0


def test_the_whole_recipe_runs_and_a_second_run_only_measures(tmp_path: Path):
    config = tiny_config(tmp_path / "out")
    first = run(config)
    assert set(first["models"]) == {"base", "in", "rl-0", "control", "in, made to think"}
    assert json.loads((config.out / "results.json").read_text()) == json.loads(json.dumps(first))
    assert "rl-0 - in" in (config.out / "table.md").read_text()
    written = {file: file.stat().st_mtime_ns for file in config.out.glob("*/model.safetensors")}
    assert len(written) == 4
    again = run(config)
    assert again["models"] == first["models"]
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    with pytest.raises(FrankenlensError, match=r"other settings \(misses\)"):
        run(replace(config, misses=0.1))


def test_steps_of_rl_are_kept_and_a_finished_run_keeps_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def of_length(completions, **_):  # the exact answer rewards no model as small as this
        return [float(len(one[0]["content"])) for one in completions]

    monkeypatch.setattr("experiments.triple.rl.exact_answer", of_length)
    config = replace(tiny_config(tmp_path / "out"), control=False, keep_steps=2)
    run(config)
    steps = {path.name: path for path in (config.out / "rl-0-steps").iterdir()}
    assert set(steps) == {"step-1", "step-2"}
    first, last, final = (
        load_file(folder / "model.safetensors")
        for folder in (steps["step-1"], steps["step-2"], config.out / "rl-0")
    )
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert not all(torch.equal(first[name], final[name]) for name in final)
    run(config)  # nothing is trained again
    shutil.rmtree(steps["step-1"])
    with pytest.raises(FrankenlensError, match="rl-0-steps lacks step-1"):
        run(config)
    with pytest.raises(FrankenlensError, match="keep_steps is 9; RL has 2 steps"):
        run(replace(config, keep_steps=9))


def test_rl_that_was_interrupted_goes_on_from_its_checkpoint(tmp_path: Path):
    config = tiny_config(tmp_path / "out")
    run(config)
    folder = config.out / "unfinished" / "rl-0"
    finished = load_file(config.out / "rl-0" / "model.safetensors")
    for name in ("rl-0", "control"):  # as if interrupted after the checkpoint of step 1
        for file in (config.out / name).iterdir():
            file.unlink()
        (config.out / name).rmdir()
    for file in sorted((folder / "checkpoint-2").rglob("*"), reverse=True):
        file.unlink()
    (folder / "checkpoint-2").rmdir()
    run(config)
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["step"] == 2
    assert set(load_file(config.out / "rl-0" / "model.safetensors")) == set(finished)


@pytest.fixture
def trainer(model, processor, tmp_path: Path):
    return build_trainer(model, processor, RL(steps=1, prompts=3, samples=4), 0, tmp_path)


def test_trl_hands_the_image_marks_to_sampling_and_to_the_loss(trainer, model, tokenizer, monkeypatch):
    seen: dict[str, torch.Tensor] = {}
    generate, loss = model.generate, trainer._get_per_token_logps_and_entropies

    def spy_generate(*args, **kwargs):
        seen["sampling"] = kwargs["mm_token_type_ids"]
        seen["sampled from"] = kwargs["input_ids"]
        seen["output"] = generate(*args, **kwargs)
        return seen["output"]

    def spy_loss(unwrapped, input_ids, *args, **kwargs):
        seen["loss"], seen["learnt from"] = kwargs["mm_token_type_ids"], input_ids
        return loss(unwrapped, input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "generate", spy_generate)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spy_loss)
    trainer.train()
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    assert torch.equal(seen["sampling"].bool(), seen["sampled from"] == image)
    assert torch.equal(seen["loss"].bool(), seen["learnt from"] == image)
    n = seen["sampled from"].shape[1]
    forbidden = torch.tensor(suppressed(trainer.processing_class))
    before_end = (seen["output"][:, n:] == tokenizer.convert_tokens_to_ids(END)).cumsum(1) == 0
    assert not torch.isin(seen["output"][:, n:], forbidden)[before_end].any()
    assert len(forbidden) == len(SPECIAL) - 1


def test_shared_prefixes_give_trl_own_log_probabilities(trainer, monkeypatch):
    from trl import GRPOTrainer

    compared: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    ours = trainer._get_per_token_logps_and_entropies

    def both(unwrapped, input_ids, attention_mask, kept, **kwargs):
        own = ours(unwrapped, input_ids, attention_mask, kept, **kwargs)
        with torch.no_grad():
            theirs = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, unwrapped, input_ids, attention_mask, kept, **kwargs
            )
        compared.append((own[0].detach(), theirs[0], attention_mask[:, -kept:].bool()))
        return own

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", both)
    trainer.train()
    for own, theirs, mask in compared:
        torch.testing.assert_close(own[mask], theirs[mask], atol=1e-4, rtol=1e-5)
    assert compared


def test_reward_is_the_exact_answer_in_the_declared_form():
    replies = ["<think> count red 2 </think> answer 2", "answer 2", "2", "<think> answer 2", "answer 12", ""]
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    assert exact_answer(completions, ["2"] * len(replies)) == [1, 1, 0, 0, 0, 0]


def test_difference_is_paired_and_covers_the_truth():
    rng = np.random.default_rng(0)
    before = rng.random((4, 500)) < 0.5
    after = before | (rng.random((4, 500)) < 0.2)
    found = evaluate.difference(after, before, draws=500)
    assert found.low < 10 < found.high and found.high - found.low < 4
    same = evaluate.difference(before, before, draws=50)
    assert (same.points, same.low, same.high) == (0, 0, 0)
