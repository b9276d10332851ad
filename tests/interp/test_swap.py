"""Vision-token swap against running the source image, the image itself, and the KV cache of a long generation."""

import copy

import pytest
import torch
from PIL import Image

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.examples import Example
from interp.generation import greedy_batch, plain_greedy
from interp.localization import (
    OUTCOMES,
    Swap,
    outcome,
    outcome_shares,
    singles,
    suffixes,
    swap_hooks,
    vision_swap,
    windows,
)
from interp.localization.swap import _states
from interp.prompts import PromptBuilder, collate
from interp.roles import TraceFormat
from interp.tasks import counterfactual_pairs, grade
from tests.families import FAMILIES, QWEN, tiny

FREE = TraceFormat(reasoning=None, answer=None)  # whatever is written is the answer


@pytest.fixture(params=FAMILIES)
def given(request: pytest.FixtureRequest):
    family = tiny(request.param)
    vlm = HookedVLM(family.model, family.processor, inputs=family.inputs())
    builder = PromptBuilder(family.processor, FREE)
    images = family.images(4, sizes=[(32, 40)] if family.family in QWEN else [(16, 32)], seed=3)
    questions = ("how many red", "what shape in row 2")
    pairs = [
        (
            Example(f"e{i}", (images[2 * i],), questions[i], "5", "count"),
            Example(f"s{i}", (images[2 * i + 1],), questions[i], "6", "count"),
        )
        for i in range(2)
    ]
    return vlm, builder, pairs


def _batches(builder, pairs):
    return [collate([builder.build(pair[side]) for pair in pairs], "left") for side in (0, 1)]


def _logits(vlm, batch, hooks=()):
    with torch.no_grad():
        return vlm.run_with_hooks(batch.inputs, hooks, use_cache=False).logits


@pytest.mark.parametrize("what", ["kv", "residual"])
def test_all_layers_of_the_swap_are_the_source_image(given, what) -> None:
    vlm, builder, pairs = given
    batch, source = _batches(builder, pairs)
    swap = Swap(0, vlm.n_layers - 1, what)
    expected, own = _logits(vlm, source), _logits(vlm, batch)
    got = _logits(vlm, batch, swap_hooks(vlm, swap, batch, *_states(vlm, batch, source, [swap])))
    text = batch.mask("all") & ~batch.mask("image")
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))
    assert (got - expected)[text].abs().max() <= allowed
    last = torch.arange(len(pairs)), batch.last
    assert (own - expected)[last].abs().max() > 100 * allowed


def test_keys_and_values_of_a_window_are_its_residual_put_back_after_it(given) -> None:
    vlm, builder, pairs = given
    batch, source = _batches(builder, pairs)
    for first, last in ((0, 0), (1, 1), (0, 1), (1, vlm.n_layers - 1)):
        swaps = [Swap(first, last, what) for what in ("kv", "residual")]
        states = _states(vlm, batch, source, swaps)
        kv, residual = (_logits(vlm, batch, swap_hooks(vlm, swap, batch, *states)) for swap in swaps)
        text = batch.mask("all") & ~batch.mask("image")
        assert (kv - residual)[text].abs().max() <= 1e-5 * max(1.0, float(kv.abs().max()))
        assert (kv - _logits(vlm, batch))[text].abs().max() > 1e-3 * kv.abs().max()


@torch.no_grad()
def test_a_swap_during_a_generation_of_50_tokens_leaves_the_rest_of_the_cache_alone(given) -> None:
    """The released code appends the source's visual block again at every token."""
    vlm, builder, pairs = given
    batch, source = _batches(builder, pairs)
    swap = Swap(1, 1)
    hooks = swap_hooks(vlm, swap, batch, *_states(vlm, batch, source, [swap]))

    def run(fwd_hooks, inputs):
        with plain_greedy(vlm.model, [], builder.pad_id):
            return vlm.generate(
                inputs,
                fwd_hooks,
                max_new_tokens=50,
                min_new_tokens=50,
                return_dict_in_generate=True,
                use_cache=True,
            )

    swapped, clean, other = run(hooks, batch.inputs), run((), batch.inputs), run((), source.inputs)
    width = batch.roles.shape[1]
    image, text = batch.mask("image"), batch.mask("all") & ~batch.mask("image")
    for layer in range(vlm.n_layers):
        for part in ("keys", "values"):
            new, old, theirs = (
                getattr(run.past_key_values.layers[layer], part).transpose(1, 2)
                for run in (swapped, clean, other)
            )
            assert new.shape == old.shape
            assert new.shape[1] == width + 49
            here = new[:, :width], (theirs if layer == 1 else old)[:, :width]
            assert torch.equal(here[0][image], here[1][image])
            if layer <= 1:
                assert torch.equal(new[:, :width][text], old[:, :width][text])


def test_an_image_swapped_with_itself_changes_no_answer(given) -> None:
    vlm, builder, pairs = given
    same = [(target, copy.copy(target)) for target, _ in pairs]
    swaps = [*singles(vlm.n_layers), *suffixes(vlm.n_layers, "residual"), *windows(vlm.n_layers, 2)]
    found = vision_swap(vlm, builder, same, swaps, max_new_tokens=6, progress=False)
    assert (found["text"] == found["clean"].sel(side="target")).all()
    assert found["outcome"].isnull().all()  # nothing could be seen, and the variable why says so
    assert (found["why"] != "").all()


def test_outcomes_and_shares_of_the_embedded_model() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    builder = PromptBuilder(vlm.processor)
    pairs = counterfactual_pairs("colour_at", 24, seed=1)
    swaps = [Swap(0, vlm.n_layers - 1), Swap(vlm.n_layers - 1, vlm.n_layers - 1)]
    found = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=16, batch_size=9, progress=False)
    counted = (found["why"] == "").to_numpy()
    assert counted.sum() >= 20
    assert (found["text"].isel(swap=0) == found["clean"].sel(side="source")).all()
    assert (found["outcome"].isel(swap=0)[counted] == OUTCOMES.index("source")).all()
    assert (found["outcome"].isel(swap=1)[counted] == OUTCOMES.index("unchanged")).mean() > 0.5
    table = outcome_shares(found).query("swap == @found.swap.values[0]").set_index("outcome")
    assert table.loc["source", "value"] == table.loc["changed", "value"] == 1.0
    assert table.loc["broke", "value"] == 0.0
    assert set(table["n"]) == {counted.sum()}
    assert set(table["left_out"]) == {24 - counted.sum()}


def test_what_an_outcome_is() -> None:
    target, source = Example("t", (), "q", "three"), Example("s", (), "q", "five")
    cases = {
        "3": "unchanged",
        "three": "unchanged",
        "5": "source",
        "five": "source",
        "seven": "broke",
        None: "broke",
    }
    for answer, expected in cases.items():
        assert outcome(answer, "3", "5", target, source, grade) == expected
    # the model is wrong on the target and says the source's answer there: its own answer is no change
    assert outcome("five", "five", "seven", target, source, grade) == "unchanged"


def test_images_of_different_size_are_left_out_or_resampled() -> None:
    family = tiny("qwen2_5_vl")
    vlm = HookedVLM(family.model, family.processor, inputs=family.inputs())
    builder = PromptBuilder(family.processor, FREE)
    small, large = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (48, 16), "blue")
    pairs = [(Example("a", (small,), "how many red", "5"), Example("b", (large,), "how many red", "6"))]
    swaps = [Swap(0, vlm.n_layers - 1)]
    left_out = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=4, progress=False)
    assert "differ in size" in str(left_out["why"].item())
    assert left_out["outcome"].isnull().all()
    resized = [(pairs[0][0], Example("b", (large.resize(small.size),), "how many red", "6"))]
    got, expected = (
        vision_swap(vlm, builder, some, swaps, resize=resize, max_new_tokens=4, progress=False)
        for some, resize in ((pairs, True), (resized, False))
    )
    assert (got["text"] == expected["text"]).all()
    assert (got["clean"] == expected["clean"]).all()


def test_refusals(given) -> None:
    vlm, builder, pairs = given
    with pytest.raises(FrankenlensError, match="layers 0-"):
        vision_swap(vlm, builder, pairs, [Swap(0, 99)])
    with pytest.raises(FrankenlensError, match="at least one pair"):
        vision_swap(vlm, builder, [], singles(2))
    for first, last, what in ((3, 2, "kv"), (0, 1, "q")):
        with pytest.raises(FrankenlensError, match="upwards"):
            Swap(first, last, what)
    other = [(pairs[0][0], Example("x", pairs[0][1].images, "another question", "5"))]
    found = vision_swap(vlm, builder, other, singles(1), max_new_tokens=2, progress=False)
    assert "questions differ" in str(found["why"].item())


def test_a_batch_padded_on_the_right_is_refused(given) -> None:
    vlm, builder, pairs = given
    batch = collate([builder.build(target) for target, _ in pairs])
    with pytest.raises(FrankenlensError, match="left padding"):
        greedy_batch(vlm, batch)
