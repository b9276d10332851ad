"""Every tiny model builds, runs, is the same each time, and sees its image."""

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.architectures import ARCHITECTURES, UNBUILDABLE, TinyModel, build

SIX = ("qwen3_vl", "gemma3", "llava+gpt_oss", "mllama", "glm4v_moe", "nemotron_h")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "layers", "decoder_layers")


def logits(tiny: TinyModel, **changed: Tensor) -> Tensor:
    """What the model says, without words that it rules out."""
    with torch.no_grad():
        words = tiny.model(**tiny.inputs | changed).logits.float()
    return words[..., words.amin(dim=(0, 1)) > -1e4]


def repainted(pixels: Tensor) -> Tensor:
    """Other pixels, at the same places; another protein."""
    if not pixels.is_floating_point():
        return pixels.flip(-1)
    pixels = pixels.clone()
    pixels[..., -4:] += 1
    return pixels


def check(name: str) -> None:
    tiny = build(name)
    assert not tiny.model.training
    text = tiny.model.config.get_text_config(decoder=True)
    assert max(getattr(text, layers, 0) or 0 for layers in LAYERS) >= 3 or name == "pi0"
    before = logits(tiny)
    assert before.isfinite().all()
    assert 0.1 < before.std() < 10
    assert torch.equal(before, logits(tiny))
    assert torch.equal(before, logits(build(name)))
    assert not torch.equal(before, logits(build(name, seed=1)))
    pixels = ARCHITECTURES[name].pixels
    if pixels is not None:
        moved = logits(tiny, **{pixels: repainted(tiny.inputs[pixels])})
        assert (moved - before)[:, -1].abs().max() > 0.01
    if tiny.image_mask is not None:
        assert tiny.image_mask.shape == tiny.inputs["input_ids"].shape
        assert tiny.image_mask.any()


def test_every_architecture_of_transformers_has_an_entry_or_a_reason() -> None:
    missing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - ARCHITECTURES.keys() - UNBUILDABLE.keys()
    assert not missing
    assert not ARCHITECTURES.keys() & UNBUILDABLE.keys()


def test_building_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    build("llama")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SIX)
def test_some_build_and_see_their_image(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - set(SIX)))
def test_every_one_builds_and_sees_its_image(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_one_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    assert logits(build(name, dtype=dtype)).isfinite().all()
