"""Fine-grained metrics against a recount by hand, with Hugging Face's own generation, and with what is left out."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.fine_grained import (
    ask,
    described_by_model,
    fine_grained,
    fine_grained_table,
    in_words,
    metrics_of,
    questions,
    with_descriptions,
)
from interp.fine_grained.replies import Reply
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions import on_demand
from interp.questions.examples import Example
from interp.questions.grading import Grade
from interp.questions.tasks import sample
from interp.questions.tasks.description import describe_scene
from interp.statistics import mcnemar, wilson_interval
from tests.families import tiny

WORDS = "{description} , {question}"


@pytest.fixture(scope="module")
def rl():
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    yield vlm, PromptBuilder(vlm.processor)
    vlm.close()


def scenes(n: int = 12) -> list[Example]:
    drawn = [example for task in ("sum", "colour_at") for example in sample(task, n // 2, 3, "map")]
    return with_descriptions(drawn, describe_scene)


def by_hand(vlm: HookedVLM, builder: PromptBuilder, example: Example) -> bool:
    """Right or wrong by Hugging Face's processor, template and generation, read with plain string methods."""
    processor: Any = vlm.processor
    model: Any = vlm.model
    content = [{"type": "image"} for _ in example.images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": example.question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = {"images": [list(example.images)]} if example.images else {}
    inputs = processor(text=[text], **images, return_tensors="pt")
    ids = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, suppress_tokens=list(builder.suppressed_ids)
    )
    reply = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    whole = reply.rstrip().endswith("<|im_end|>")
    return whole and reply.rpartition("</think>")[2].replace("<|im_end|>", "").split()[:2] == [
        "answer",
        example.answer,
    ]


def test_metrics_are_a_recount_of_single_generations(rl):
    vlm, builder = rl
    examples = scenes()
    examples += [in_words(example, WORDS) for example in examples[:4]]
    found = fine_grained(vlm, builder, examples, template=WORDS, max_new_tokens=24, progress=False)
    image, black, described = [], [], []
    for example in examples[:12]:
        dark = (Image.new("RGB", (56, 56)),)
        told = f"{describe_scene(example)} , {example.question}"
        asked = (example, replace(example, images=dark), replace(example, images=dark, question=told))
        for kept, one in zip((image, black, described), asked, strict=True):
            kept.append(by_hand(vlm, builder, one))
    text = [by_hand(vlm, builder, example) for example in examples[12:]]
    image, black, described = map(np.array, (image, black, described))
    assert image.any() and not image.all()
    value = found["value"]
    assert np.array_equal(value.sel(metric="vis")[:12], image & ~black)
    assert np.array_equal(value.sel(metric="v2r")[:12], image & described)
    assert np.array_equal(value.sel(metric="rea")[12:], text)
    assert np.isnan(value.sel(metric="rea")[:12]).all() and np.isnan(value.sel(metric="vis")[12:]).all()


def test_the_model_is_as_it_was(rl):
    vlm, builder = rl
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    settings = vlm.model.generation_config
    fine_grained(vlm, builder, scenes(2), template=WORDS, max_new_tokens=8, progress=False)
    after = vlm.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert vlm.model.generation_config is settings


@pytest.fixture
def scripted(monkeypatch):
    """A model that says what a table says: by variant and example."""

    def given(answers: dict[str, list[str | None]]):
        order = iter(answers.values())

        def replies(vlm, prompts, *_):
            row_of = next(order)
            return {
                row: Reply("", row_of[row], "cut off after 9 tokens" if row_of[row] == "…" else "")
                for row in prompts
            }

        monkeypatch.setattr("interp.fine_grained.measure.replies", replies)

    return given


def eight(**meta) -> list[Example]:
    return [replace(e, id=f"e{i}", answer="1", meta={**e.meta, **meta}) for i, e in enumerate(scenes(8))]


def test_the_table_is_counted_by_hand_with_controls(rl, scripted):
    vlm, builder = rl
    asked = questions(builder, eight(), template=WORDS)
    scripted(
        {
            "image": ["1", "1", "1", "1", "1", "0", "0", None],
            "black": ["0", "0", "0", "…", "1", "1", "0", "0"],
            "described": ["1", "1", "0", "0", "1", "1", "0", "0"],
            "text": [None] * 8,
        }
    )
    found = ask(vlm, asked, progress=False)
    assert found["value"].sel(metric="vis").to_numpy().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert found["value"].sel(metric="v2r").to_numpy().tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    table = fine_grained_table(found)
    every = table[table["task"] == "all"].set_index("measure")
    vis, v2r = every.loc["vis"], every.loc["v2r"]
    wilson = wilson_interval(4, 8)
    assert (vis["value"], vis["low"], vis["high"], vis["n"]) == (
        0.5,
        float(wilson.low),
        float(wilson.high),
        8,
    )
    assert (vis["control"], v2r["value"], v2r["control"]) == (1 / 8, 3 / 8, 1 / 8)
    image, black = np.array([1, 1, 1, 1, 1, 0, 0, 0]), np.array([0, 0, 0, 0, 1, 1, 0, 0])
    assert vis["p"] == mcnemar(image, black).p
    assert (vis["no_answer"], every.loc["accuracy, image"]["no_answer"], vis["left_out"]) == (2, 1, 0)
    assert "rea" not in every.index and "accuracy, text" not in every.index
    assert found["note"].sel(variant="black").to_numpy()[3] == "cut off after 9 tokens"


def test_what_cannot_be_asked_or_graded_is_left_out_with_its_reason_and_never_wrong(rl, scripted):
    vlm, builder = rl

    def describe(example: Example) -> str:
        if example.id == "e0":
            raise RuntimeError("no connection")
        return "a dragon" if example.id == "e1" else describe_scene(example)

    def judge(answer: str | None, example: Example) -> Grade:
        return Grade(None, "", "timeout") if answer == "slow" else Grade(answer == example.answer)

    asked = questions(builder, eight(), describe=describe, template=WORDS)
    scripted(
        {
            "image": ["1"] * 8,
            "black": ["0", "0", "slow", *["0"] * 5],
            "described": ["1"] * 8,
            "text": [None] * 8,
        }
    )
    found = ask(vlm, asked, judge=judge, progress=False)
    assert found["left_out"].sel(metric="vis").to_numpy()[:3].tolist() == ["", "", "black: timeout"]
    reasons = found["left_out"].sel(metric="v2r").to_numpy().tolist()
    assert reasons[0] == "described: no description: RuntimeError: no connection"
    assert reasons[1].startswith("described: the tokenizer does not know 'dragon'") and set(reasons[2:]) == {
        ""
    }
    table = fine_grained_table(found)
    every = table[table["task"] == "all"].set_index("measure")
    assert every["n"][["vis", "v2r"]].tolist() == [7, 6]
    assert every["left_out"][["vis", "v2r"]].tolist() == [1, 2]
    assert (every["value"][["vis", "v2r"]] == 1).all()


def test_only_what_a_metric_needs_is_asked(rl):
    vlm, builder = rl
    found = fine_grained(
        vlm, builder, scenes(2), template=WORDS, metrics=["vis"], max_new_tokens=4, progress=False
    )
    assert found["variant"].to_numpy().tolist() == ["image", "black"]
    assert found["metric"].to_numpy().tolist() == ["vis"]
    assert (found["note"] != "").all() and (found["right"] == 0).all()  # cut off after 4 tokens
    alone = fine_grained(
        vlm, builder, scenes(2), template=WORDS, metrics=["v2r"], max_new_tokens=4, progress=False
    )
    assert fine_grained_table(alone)["control"].isna().all()  # without the black image there is no control


def test_as_metrics_of_the_transfer_experiment(rl):
    vlm, builder = rl
    examples = scenes(6)
    examples += [in_words(example, WORDS) for example in examples[:2]]
    found = fine_grained(vlm, builder, examples, template=WORDS, max_new_tokens=24, progress=False)
    metrics = metrics_of(builder, examples, template=WORDS, max_new_tokens=24)
    assert list(metrics) == ["M_vis", "M_v2r", "M_rea"]
    for name, metric in metrics.items():
        outcome, some = metric(vlm), slice(6, 8) if name == "M_rea" else slice(0, 6)
        assert outcome.examples == tuple(example.id for example in examples[some])
        assert outcome.right == tuple(found["value"].sel(metric=name[2:])[some].to_numpy().tolist())


def test_a_model_describes_the_images_itself_on_every_family_of_shapes():
    family = tiny("smolvlm")
    vlm = HookedVLM(family.model, family.processor, inputs=family.inputs())
    builder = PromptBuilder(family.processor, TraceFormat(reasoning=None, answer=None))
    sizes = [(32, 40), (16, 32), (32, 40)]
    images = [family.images(1, sizes=[size], seed=i)[0] for i, size in enumerate(sizes)]
    examples = [Example(f"e{i}", (image,), "how many red", "5") for i, image in enumerate(images)]
    examples.append(Example("t", (), "how many red", "5"))
    told = described_by_model(vlm, builder, examples, request="what shape", max_new_tokens=6, progress=False)
    assert [bool(e.meta.get("description") or e.meta.get("no_description")) for e in told] == [True] * 3 + [
        False
    ]
    for example in told[:3]:
        assert example.meta.get("described_by", "model") == "model"
    found = fine_grained(vlm, builder, examples, metrics=["vis", "rea"], max_new_tokens=4, progress=False)
    assert found["right"].sel(variant="text").notnull().to_numpy().tolist() == [False] * 3 + [True]
    vlm.close()


def test_mistakes_are_told_before_the_model_runs(rl):
    vlm, builder = rl
    plain = sample("sum", 2, 0, "map")
    with pytest.raises(FrankenlensError, match="at least one example"):
        fine_grained(vlm, builder, [])
    with pytest.raises(
        FrankenlensError, match="none of the 2 examples with images has a description.*'model'"
    ):
        fine_grained(vlm, builder, plain)
    with pytest.raises(FrankenlensError, match="give None, a function of an example, or 'model'"):
        fine_grained(vlm, builder, plain, describe="gpt")
    with pytest.raises(FrankenlensError, match="metrics are vis, v2r, rea, not v3r"):
        fine_grained(vlm, builder, plain, metrics=["v3r"])
    with pytest.raises(FrankenlensError, match="must have the places"):
        fine_grained(vlm, builder, plain, template="{question}")
    with pytest.raises(FrankenlensError, match="2 of 2 examples cannot be graded"):
        fine_grained(vlm, builder, [replace(e, meta={"grader": "box"}) for e in plain])
    with pytest.raises(FrankenlensError, match="the tokenizer does not know 'Describe'"):
        fine_grained(vlm, builder, plain, describe="model")
    with pytest.raises(
        FrankenlensError, match="none of 2 examples can be asked for rea: the problem has an image"
    ):
        fine_grained(vlm, builder, plain, metrics=["rea"])
    with pytest.raises(FrankenlensError, match="no description to stand for its image"):
        in_words(plain[0])
    with pytest.raises(FrankenlensError, match="no scene to describe"):
        describe_scene(Example("mine", (), "?", "1"))


def test_black_images_are_there_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of photos they would fill main memory; what is asked is the same."""
    room = import_module("interp.fine_grained.questions")
    monkeypatch.setattr(on_demand, "KEPT", 50_000)
    room._black.cache_clear()
    sizes = [(100 + i, 120) for i in range(12)]
    examples = [
        Example(str(i), (Image.new("RGB", size, "red"),), "what?", "5") for i, size in enumerate(sizes)
    ]
    builder = PromptBuilder(tiny("qwen2_vl").processor)
    asked = [room._asked(builder, example, "black", "") for example in examples]
    assert sum(3 * w * h for w, h in sizes) > 400_000
    assert on_demand._DECODED._bytes <= 50_000 + 3 * 111 * 120
    for example, size in zip(asked, sizes, strict=True):
        (image,) = example.images
        assert image.size == size and image.getextrema() == ((0, 0), (0, 0), (0, 0))
    room._black.cache_clear()
