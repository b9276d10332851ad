"""The tiny models show what a test must be able to see, and the reference agrees with the models it describes."""

import pytest
import torch
from torch import Tensor, nn

from tests.families import CLASSES, FAMILIES, QWEN, tiny
from tests.hooks.reference import Taps, parts, reference, tolerance, vision_allowed


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_image_moves_the_logits_of_the_last_token(family):
    vlm = tiny(family)
    inputs = vlm.inputs()
    other = vlm.inputs(seed=1)
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    clean, changed = logits(vlm.model, inputs), logits(vlm.model, other)
    assert clean.abs().max() < 100
    assert (clean - changed)[:, -1].abs().max() > 100 * tolerance(clean)


@pytest.mark.parametrize("family", QWEN)
def test_positions_of_the_image_move_the_logits(family):
    vlm = tiny(family)
    inputs = vlm.inputs()
    flat = inputs | {"mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}
    clean = logits(vlm.model, inputs)
    assert (clean - logits(vlm.model, flat))[:, -1].abs().max() > 100 * tolerance(clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_parameters_and_none_is_left_at_its_default(family):
    one, same, other = (dict(tiny(family, seed).model.named_parameters()) for seed in (3, 3, 4))
    for name, parameter in one.items():
        assert torch.equal(parameter, same[name]), name
        assert not torch.equal(parameter, other[name]), name
        assert parameter.unique().numel() > 1, name


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_agree_with_the_unpadded_prompt(family):
    vlm = tiny(family)
    batches = {side: vlm.inputs(batch=2, padding_side=side) for side in ("left", "right")}
    lengths = batches["left"]["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    rows = {side: logits(vlm.model, b)[b["attention_mask"].bool()] for side, b in batches.items()}
    torch.testing.assert_close(rows["left"], rows["right"], atol=tolerance(rows["left"]), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_processor_can_be_saved(family, tmp_path):
    vlm = tiny(family)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    model = CLASSES[family].from_pretrained(tmp_path).eval()
    processor = type(vlm.processor).from_pretrained(tmp_path)
    inputs = vlm.inputs()
    again = processor(
        images=vlm.images(1), text=[vlm.prompt("what color is the star in row 2 ?")], return_tensors="pt"
    )
    for name, value in inputs.items():
        assert torch.equal(value, again[name]), name
    assert torch.equal(logits(model, inputs), logits(vlm.model, inputs))


def test_qwen2_5_vl_has_several_windows_and_one_full_block():
    vlm = tiny("qwen2_5_vl")
    inputs = vlm.inputs()
    windowed, full = (vision_allowed(vlm.model, "qwen2_5_vl", inputs, layer) for layer in (0, 1))
    sizes = windowed.unique(dim=0).sum(1)
    assert len(sizes) >= 4 and len(set(sizes.tolist())) > 1
    assert full.all()


@pytest.mark.parametrize("family", ("smolvlm", "idefics3"))
def test_images_are_split_into_tiles(family):
    pixels = tiny(family).inputs(batch=2)["pixel_values"]
    assert pixels.flatten(2).any(-1).sum(1).tolist() == [3, 5]


@pytest.mark.parametrize("padding_side", ("right", "left"))
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_agrees_with_what_the_model_computes(family, padding_side):
    """z is what the output projection was given, the middle residual what the second norm was given, and so on."""
    vlm = tiny(family)
    inputs = vlm.inputs(batch=2, padding_side=padding_side)
    where = parts(vlm.model, family)
    points = reference(vlm.model, family, inputs)
    towers = {"": where.text, "vision.": where.vision}
    real = inputs["attention_mask"].bool()
    with Taps(*(m for t in towers.values() for b in t for m in (b.out, b.norm_mlp, b.block))) as taps:
        logits(vlm.model, inputs)
    for prefix, blocks in towers.items():
        for i, block in enumerate(blocks):
            name = f"{prefix}blocks.{i}."
            bias = block.out.bias if block.out.bias is not None else 0
            claims = {
                "z": (points[name + "attn.hook_z"].flatten(-2), taps.args[block.out][0]),
                "result": (points[name + "attn.hook_result"].sum(-2) + bias, points[name + "hook_attn_out"]),
                "resid_mid": (points[name + "hook_resid_mid"], taps.hidden(block.norm_mlp)),
                "resid_post": (points[name + "hook_resid_post"], taps.out[block.block]),
            }
            if i + 1 < len(blocks):
                post = points[name + "hook_resid_post"].clone()
                if f"{name}hook_deepstack" in points:
                    at_image = inputs["input_ids"] == vlm.model.config.image_token_id
                    post[at_image] += points[f"{name}hook_deepstack"]
                claims["next"] = (post, points[f"{prefix}blocks.{i + 1}.hook_resid_pre"])
            for claim, (ours, theirs) in claims.items():
                if not prefix:
                    ours, theirs = ours[real], theirs[real]
                error = (ours - theirs).abs().max().item()
                assert error <= tolerance(theirs), f"{name}{claim}: {error}"
