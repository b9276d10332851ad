"""Every hook point of every family, read through HookedVLM, equals the plain-PyTorch reference."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.families import FAMILIES, TinyVLM, tiny
from tests.hooks.reference import of_one_block, reference, tolerance


@dataclass(frozen=True)
class Case:
    bare: TinyVLM
    vlm: HookedVLM = field(repr=False)

    def reference(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return reference(self.bare.model, self.bare.family, inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    opened = tiny(request.param)
    return Case(tiny(request.param), HookedVLM(opened.model, opened.processor))


def is_text_row(name: str) -> bool:
    """Whether a point has one row per text token, padding included."""
    return name in ("hook_embed", "ln_final.hook_normalized") or (
        name.startswith("blocks.") and not name.endswith("hook_deepstack")
    )


def real_rows(name: str, value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The rows that belong to real tokens (queries, for scores and patterns)."""
    if not is_text_row(name):
        return value
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        value = value.movedim(2, 1)
    return value[inputs["attention_mask"].bool()]


def differences(cache, expected: dict[str, Tensor], inputs: dict[str, Tensor]) -> list[str]:
    """One line for every point of `cache` that is not what the reference says."""
    lines = []
    for name in cache:
        if cache[name].shape != expected[name].shape:
            lines.append(f"{name}: shape {tuple(cache[name].shape)}, expected {tuple(expected[name].shape)}")
            continue
        ours, theirs = (real_rows(name, x, inputs) for x in (cache[name], expected[name]))
        if not torch.equal(ours.isneginf(), theirs.isneginf()):
            lines.append(f"{name}: -inf at other places")
            continue
        ours, theirs = ours[theirs.isfinite()], theirs[theirs.isfinite()]
        error = (ours - theirs).abs().max().item()
        if not error <= tolerance(theirs):
            lines.append(f"{name}: differs by {error:.3g}, tolerance {tolerance(theirs):.3g}")
    return lines


def test_points_listed_are_those_of_the_reference(case):
    expected = case.reference(case.bare.inputs())
    listed, dead = set(case.vlm.hook_points), set(case.vlm.absent)
    assert not listed & dead
    assert set(expected) - listed - dead == set()
    assert listed - set(expected) == set()


def test_only_the_unread_last_block_of_llava_is_dead(case):
    expected = case.reference(case.bare.inputs())
    unread = (
        {n for n in expected if n.startswith("vision.blocks.3.")} if case.bare.family == "llava" else set()
    )
    assert set(case.vlm.absent) & set(expected) == unread


@pytest.mark.parametrize("padding_side", ("right", "left"))
def test_every_point_equals_the_reference(case, padding_side):
    inputs = case.bare.inputs(batch=2, padding_side=padding_side)
    _, cache = case.vlm.run_with_cache(inputs)
    assert set(cache) == set(case.vlm.hook_points)
    assert differences(cache, case.reference(inputs), inputs) == []


def test_every_point_equals_the_reference_with_two_images_in_a_prompt(case):
    inputs = case.bare.inputs(n_images=2, batch=2)
    _, cache = case.vlm.run_with_cache(inputs)
    assert differences(cache, case.reference(inputs), inputs) == []


def test_single_unpadded_prompt(case):
    """Without padding no mask reaches the attention function; causality is its own affair."""
    inputs = case.bare.inputs()
    _, cache = case.vlm.run_with_cache(inputs)
    assert differences(cache, case.reference(inputs), inputs) == []


def test_one_point_read_alone_equals_the_reference(case):
    """What is computed for one point does not lean on another point being read as well."""
    inputs = case.bare.inputs(batch=2)
    expected = case.reference(inputs)
    lines = []
    for name in of_one_block(case.vlm.hook_points):
        _, cache = case.vlm.run_with_cache(inputs, names_filter=name)
        assert set(cache) == {name}
        lines += differences(cache, expected, inputs)
    assert lines == []


@pytest.mark.parametrize("family", ("smolvlm", "idefics3"))
def test_masked_patches_of_a_tile(family):
    """Patches without a real pixel are no keys of the vision tower."""
    bare, opened = tiny(family), tiny(family)
    vlm = HookedVLM(opened.model, opened.processor)
    inputs = bare.inputs(batch=2)
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][1, 2:, 8:] = 0
    expected = reference(bare.model, family, inputs)
    assert expected["vision.blocks.0.attn.hook_attn_scores"].isneginf().any()
    _, cache = vlm.run_with_cache(inputs)
    assert differences(cache, expected, inputs) == []


def test_cache_of_some_points(case):
    inputs = case.bare.inputs()
    names = ["blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_pattern", "projector.hook_out"]
    expected = case.reference(inputs)
    plain = case.vlm(inputs).logits
    for chosen in (names, lambda name: name in names):
        output, cache = case.vlm.run_with_cache(inputs, names_filter=chosen)
        assert set(cache) == set(names)
        assert differences(cache, expected, inputs) == []
        assert (output.logits - plain).abs().max() <= tolerance(plain)


def test_wrong_name_names_the_nearest_valid_ones(case):
    with pytest.raises((KeyError, ValueError)) as error:
        case.vlm.run_with_cache(case.bare.inputs(), names_filter="blocks.1.hook_resid_pots")
    assert "blocks.1.hook_resid_post" in str(error.value)


def test_cache_within_an_edit_holds_the_edited_value(case):
    """As in TransformerLens: what is cached is what the rest of the model sees."""
    inputs = case.bare.inputs()
    expected = case.reference(inputs)
    for name in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern", "vision.blocks.0.attn.hook_v"):
        with case.vlm.hooks(fwd_hooks=[(name, lambda a, hook: a * 2)]):
            _, cache = case.vlm.run_with_cache(inputs, names_filter=name)
        assert differences(cache, {name: expected[name] * 2}, inputs) == []


def test_cached_values_are_those_of_the_forward_not_views_that_later_edits_change(case):
    inputs = case.bare.inputs()
    name = "blocks.1.hook_resid_post"
    _, cache = case.vlm.run_with_cache(inputs, names_filter=name)
    before = cache[name].clone()
    case.vlm.run_with_hooks(inputs, fwd_hooks=[(name, lambda a, hook: a.mul_(2))])
    assert torch.equal(before, cache[name])
