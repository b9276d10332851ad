"""Prompts do not hold the pixels of their images: they are made again, the same, or refused."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooks.errors import FrankenlensError
from interp.prompts import PromptBuilder, collate, pixels
from interp.questions import on_demand
from interp.questions.examples import Example
from tests.families import tiny_processor

SIDE = 64


def examples(n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(n)]
    return [Example(str(i), (image,), f"what is {'the ' * i}star", "5") for i, image in enumerate(images)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Every pixel counts as large, and two prompts' are kept."""
    gc.collect()
    monkeypatch.setattr(pixels, "LARGE", 1024)
    builder = PromptBuilder(tiny_processor("qwen2_vl"))
    of_one = builder.build(examples(1)[0]).inputs["pixel_values"].nbytes
    monkeypatch.setattr(on_demand, "KEPT", 2 * of_one)
    return of_one


def test_pixels_that_were_let_go_are_made_again_the_same(small: int) -> None:
    builder = PromptBuilder(tiny_processor("qwen2_vl"))
    given = examples(6)
    prompts = [builder.build(example, "1 2") for example in given]
    assert pixels._MADE._bytes <= 2 * small < 6 * small
    for example, prompt in zip(given, prompts, strict=True):
        (image,) = example.images
        expected = builder.processor(text=[prompt.prompt_text], images=[[image]], return_tensors="pt")
        assert torch.equal(prompt.inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(prompt.with_tokens([1, 2]).inputs["pixel_values"], expected["pixel_values"])
        assert list(dict(prompt.inputs)) == list(prompt.inputs) and len(prompt.inputs) == len(
            dict(prompt.inputs)
        )
        assert pixels._MADE._bytes <= 2 * small
    batch = collate(prompts)
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([p.inputs["pixel_values"] for p in prompts]))
    sent = pickle.loads(pickle.dumps(prompts[0].inputs))
    assert torch.equal(sent["pixel_values"], prompts[0].inputs["pixel_values"])
    twin = copy.deepcopy(prompts[1].inputs)
    assert torch.equal(twin["pixel_values"], prompts[1].inputs["pixel_values"])
    del prompts, prompt, twin, sent, batch
    gc.collect()
    assert pixels._MADE._bytes == 0


def test_a_processor_that_makes_something_else_the_second_time_is_refused(small: int) -> None:
    processor: Any = tiny_processor("qwen2_vl")
    builder = PromptBuilder(processor)
    first, *others = [builder.build(example) for example in examples(4)]
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    try:
        with pytest.raises(FrankenlensError, match="does not make the same of the images of example '0'"):
            first.inputs["pixel_values"]
    finally:
        del others


def test_tensors_of_tokens_and_what_is_tiny_are_held() -> None:
    builder = PromptBuilder(tiny_processor("qwen2_vl"))
    (example,) = examples(1)
    prompt = builder.build(example)
    assert isinstance(prompt.inputs, pixels.Inputs) and prompt.inputs._made is not None
    assert prompt.inputs._made.names == ("pixel_values",)  # of 64 x 64 pixels; the grid is three numbers
    assert "input_ids" in prompt.inputs and "nothing" not in prompt.inputs
    with pytest.raises(KeyError):
        prompt.inputs["nothing"]
    other = replace(example, question="which is the star")
    assert len(builder.build(other).inputs) == len(prompt.inputs)


def test_tokens_are_kept_however_many_there_are() -> None:
    """A trace behind a prompt of 140,000 tokens is read, not the prompt without it."""
    ids = torch.arange(140_000)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = pixels.Inputs.of(given, lambda: given, "a long text")
    longer = inputs.with_tokens({"input_ids": torch.cat([ids, ids[:, :3]], dim=1)})
    assert longer["input_ids"].shape == (1, 140_003) and longer["input_ids"][0, -3:].tolist() == [0, 1, 2]


def test_what_is_kept_of_thousands_of_small_images_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = PromptBuilder(tiny_processor("qwen2_vl"))
    monkeypatch.setattr("interp.questions.on_demand.KEPT", 1 << 20)
    prompts = [builder.build(example) for example in examples(40)]
    one = prompts[0].inputs["pixel_values"]
    assert 40 * one.nbytes > 3 << 20
    assert pixels._MADE._bytes <= (1 << 20) + one.nbytes
    for prompt in (prompts[0], prompts[39], prompts[0]):
        again = builder.build(prompt.example).inputs["pixel_values"]
        assert torch.equal(prompt.inputs["pixel_values"], again)
