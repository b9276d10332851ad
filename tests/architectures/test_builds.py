"""Every tiny model builds, runs, is the same each time, and sees its image."""

import pytest
import torch

from tests.architectures import ARCHITECTURES, TinyModel, build

SIX = ("qwen3_vl", "gemma3", "llava+gpt_oss", "mllama", "glm4v_moe", "nemotron_h")


def logits(tiny: TinyModel, **changed: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tiny.model(**tiny.inputs | changed).logits


def check(name: str) -> None:
    tiny = build(name)
    assert not tiny.model.training
    before = logits(tiny)
    assert before.isfinite().all()
    assert 0.05 < before.std() < 10
    again = build(name)
    assert torch.equal(before, logits(again))
    assert not torch.equal(before, logits(build(name, seed=1)))
    pixels = ARCHITECTURES[name].pixels
    if pixels is not None:
        moved = logits(tiny, **{pixels: tiny.inputs[pixels].flip(-1)})
        assert (moved - before)[:, -1].abs().max() > 1e-3
    if tiny.image_mask is not None:
        assert tiny.image_mask.shape == tiny.inputs["input_ids"].shape


@pytest.mark.parametrize("name", SIX)
def test_some_build_and_see_their_image(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - set(SIX)))
def test_every_one_builds_and_sees_its_image(name: str) -> None:
    check(name)
