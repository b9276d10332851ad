"""Vision-token swap against running the source image, the image itself, and the KV cache of a long generation."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp import knockout, localization, regions
from interp.knockout import Knockout
from interp.localization import (
    OUTCOMES,
    Swap,
    layer_contributions,
    outcome,
    outcome_shares,
    singles,
    suffixes,
    swap_hooks,
    vision_swap,
    windows,
)
from interp.localization import swap as swap_module
from interp.localization.swap import _states
from interp.pair.generation import greedy_batch, plain_greedy
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.tasks import counterfactual_pairs
from tests.families import EACH_KIND, QWEN, tiny

FREE = TraceFormat(reasoning=None, answer=None)  # whatever is written is the answer


@pytest.fixture(params=EACH_KIND)
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


@pytest.mark.parametrize("what", ["kv", "resid"])
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
        swaps = [Swap(first, last, what) for what in ("kv", "resid")]
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
    n = vlm.n_layers
    swaps = [*singles(n), *suffixes(n), *suffixes(n, "resid"), *windows(n, 2), *windows(n, 2, "resid")]
    found = vision_swap(vlm, builder, same, swaps, max_new_tokens=6, progress=False)
    assert (found["text"] == found["clean"].sel(side="target")).all()
    rate = outcome_shares(found, "all").query("outcome == 'changed'")
    counted = int((found["why"] == "").sum())  # the tiny SmolVLM ends its turn at once: no answer to compare
    assert set(rate["n"]) == {counted} and (counted == 0 or (rate["value"] == 0).all())
    batch, source = _batches(builder, pairs)
    clean = _logits(vlm, batch)
    text = batch.mask("all") & ~batch.mask("image")
    for swap in swaps:
        own, other = (
            _logits(vlm, batch, swap_hooks(vlm, swap, batch, *_states(vlm, batch, one, [swap])))
            for one in (batch, source)
        )
        assert torch.equal(own, clean)
        assert (other - clean)[text].abs().max() > 1e-3
    none = outcome_shares(
        found
    )  # where no two answers differ, the source's cannot be told from the model's own
    assert none["value"].isna().all() and (none["left_out"] == len(pairs)).all()


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("what", ["kv", "resid"])
def test_swap_from_a_layer_on_is_the_source_put_in_once_with_its_deepstack_states(given, layer, what) -> None:
    """Against plain PyTorch hooks; from layer 0 on it is running the source image."""
    vlm, builder, pairs = given
    batch, source = _batches(builder, pairs)
    if layer and (batch.mask("image").long().diff(dim=1) > 0).sum(1).max() > 1:
        return  # tokens between the tiles of an image have seen the target's first tile below the swap
    swap = Swap(layer, vlm.n_layers - 1, what)
    got = _logits(vlm, batch, swap_hooks(vlm, swap, batch, *_states(vlm, batch, source, [swap])))
    block = vlm.model.get_submodule(vlm.anatomy.text.blocks[layer].path)
    mergers = [
        vlm.model.get_submodule(path) for at, path in sorted(vlm.anatomy.deepstack.items()) if at >= layer
    ]
    image, kept = batch.mask("image"), {}

    def run(inputs, on_block, on_merger):
        handles = [block.register_forward_pre_hook(on_block, with_kwargs=True)]
        handles += [merger.register_forward_hook(on_merger) for merger in mergers]
        output = vlm.model(**inputs, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return output

    def keep_block(module, args, kwargs):
        kept["block"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def keep_merger(module, args, output):
        kept[module] = output.clone()

    def put_block(module, args, kwargs):
        own = args[0] if args else kwargs["hidden_states"]
        new = torch.where(image[..., None], kept["block"], own)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    theirs = run(source.inputs, keep_block, keep_merger)
    expected = run(batch.inputs, put_block, lambda module, args, output: kept[module])
    text = batch.mask("all") & ~image
    allowed = 1e-5 * max(1.0, float(expected.abs().max()))
    assert (got - expected)[text].abs().max() <= allowed
    if layer == 0:
        assert (got - theirs)[text].abs().max() <= allowed
    if mergers:
        without = run(batch.inputs, put_block, lambda module, args, output: None)
        assert (got - without)[text].abs().max() > 100 * allowed
    assert (got - _logits(vlm, batch))[text].abs().max() > 100 * allowed


@torch.no_grad()
def test_behind_a_window_the_images_states_are_the_targets_own(given) -> None:
    vlm, builder, pairs = given
    batch, source = _batches(builder, pairs)
    image = batch.mask("image")
    name = "blocks.2.hook_resid_pre"
    clean, theirs = (
        vlm.run_with_cache(one.inputs, name, use_cache=False)[1][name] for one in (batch, source)
    )
    for what in ("kv", "resid"):
        swap, seen = Swap(0, 1, what), {}
        hooks = swap_hooks(vlm, swap, batch, *_states(vlm, batch, source, [swap]))
        _logits(vlm, batch, [*hooks, (name, lambda value, hook, seen=seen: seen.update(after=value.clone()))])
        assert torch.equal(seen["after"][image], clean[image])
        assert (seen["after"] - clean)[
            batch.last.new_tensor(range(len(pairs))), batch.last
        ].abs().max() > 1e-3
    assert (clean - theirs)[image].abs().max() > 1e-3


def test_outcomes_and_shares_of_the_embedded_model() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    builder = PromptBuilder(vlm.processor)
    pairs = counterfactual_pairs("colour_at", 24, seed=1)
    swaps = [Swap(0, vlm.n_layers - 1), Swap(vlm.n_layers - 1, vlm.n_layers - 1)]
    found = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=16, batch_size=9, progress=False)
    counted = (found["why"] == "").to_numpy()
    assert counted.sum() >= 20
    np.testing.assert_array_equal(found["differs"], (found["clean"][0] != found["clean"][1]) & counted)
    counted = found["differs"].to_numpy()
    assert counted.sum() >= 20
    assert (found["text"].isel(swap=0) == found["clean"].sel(side="source")).all()
    assert (found["outcome"].isel(swap=0)[counted] == OUTCOMES.index("source")).all()
    assert (found["outcome"].isel(swap=1)[counted] == OUTCOMES.index("unchanged")).mean() > 0.5
    table = outcome_shares(found).query("swap == @found.swap.values[0]").set_index("outcome")
    assert table.loc["source", "value"] == table.loc["changed", "value"] == 1.0
    assert table.loc["broke", "value"] == 0.0
    assert set(table["n"]) == {counted.sum()}
    assert set(table["left_out"]) == {24 - counted.sum()}


NUMERALS = {"three": "3", "five": "5"}


def _by_value(answer: str | None, example: Example) -> bool:
    return answer is not None and NUMERALS.get(answer, answer) == example.answer


@pytest.mark.parametrize(
    ("clean", "on_source", "answers"),
    [
        ("3", "5", {"3": "unchanged", "three": "unchanged", "5": "source", "five": "source", "7": "broke"}),
        # wrong on the target, and that way it happens to say the source's answer: its own answer is no change
        ("5", "7", {"5": "unchanged", "five": "unchanged", "7": "source", "3": "broke"}),
        # wrong on both: what it says of the source, and what is right for the source, are the source's
        ("8", "7", {"8": "unchanged", "7": "source", "5": "source", "3": "broke"}),
        ("3", "3", {"3": "unchanged", "5": "source", "7": "broke"}),
    ],
)
def test_the_models_own_answer_is_the_reference_of_an_outcome(clean, on_source, answers) -> None:
    target, source = Example("t", (), "q", "3"), Example("s", (), "q", "5")
    for answer, expected in [*answers.items(), (None, "broke")]:
        assert outcome(answer, clean, on_source, target, source, _by_value) == expected, answer


def test_an_answer_that_cannot_be_read_is_broken_after_a_swap_and_left_out_before(monkeypatch) -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    builder = PromptBuilder(vlm.processor)
    pairs = counterfactual_pairs("colour_at", 6, seed=1)
    found = vision_swap(vlm, builder, pairs, [Swap(0, 0)], max_new_tokens=2, progress=False)
    assert set(found["why"].to_numpy()) == {"the clean trace on the target image does not parse"}
    assert found["outcome"].isnull().all() and not found["differs"].any()
    table = outcome_shares(found, "all")
    assert table["value"].isna().all() and set(table["left_out"]) == {6} and set(table["n"]) == {0}

    def cut(vlm, batch, max_new_tokens, fwd_hooks=()):
        return [
            ids[: 2 if fwd_hooks else None] for ids in greedy_batch(vlm, batch, max_new_tokens, fwd_hooks)
        ]

    monkeypatch.setattr(swap_module, "greedy_batch", cut)
    found = vision_swap(vlm, builder, pairs, [Swap(0, 0)], max_new_tokens=16, progress=False)
    assert (found["why"] == "").all()
    assert (found["outcome"] == OUTCOMES.index("broke")).all()


def test_an_answer_that_cannot_be_graded_is_broken_after_a_swap_and_left_out_before(monkeypatch) -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    builder = PromptBuilder(vlm.processor)
    number = {"grader": "number"}
    pairs = [
        (replace(target, meta=number), replace(source, meta=number))
        for target, source in counterfactual_pairs("count", 9, seed=1)
    ]
    swaps = [Swap(0, 0), Swap(vlm.n_layers - 1, vlm.n_layers - 1)]
    found = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=16, progress=False)
    assert (found["why"] == "").all() and (found["fault"] == "").all()

    def doubtful(batch, written):
        answers = read(batch, written)
        doubt = calls.pop(0)
        return ["3 or 4" if doubt and row == 0 else answer for row, answer in enumerate(answers)]

    read, calls = swap_module._answers, [False, False, True, False]
    monkeypatch.setattr(swap_module, "_answers", doubtful)
    again = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=16, progress=False)
    doubted = again["fault"][0].to_numpy() != ""
    assert int(doubted.sum()) == 1 and "several numbers" in str(again["fault"].to_numpy()[0][doubted][0])
    assert (again["outcome"][0, doubted] == OUTCOMES.index("broke")).all()
    assert not again["outcome"].isnull().any()
    assert (again["outcome"][:, ~doubted] == found["outcome"][:, ~doubted]).all()
    assert outcome_shares(again, "all").query("swap == @again.swap.values[0]")["left_out"].tolist() == [0] * 4
    calls[:] = [True, False, False, False]  # the model's own answer on one target
    without = vision_swap(vlm, builder, pairs, swaps, max_new_tokens=16, progress=False)
    assert "cannot be compared" in without["why"].to_numpy()[doubted][0]
    assert without["outcome"][:, doubted].isnull().all()


def test_contributions_of_layers_are_differences_of_change_rates() -> None:
    outcomes = np.array([[1, 2, 1, 1], [1, 0, 0, 2], [0, 0, 0, np.nan]])
    found = xr.Dataset(
        {"outcome": (("swap", "example"), outcomes), "differs": ("example", [True, True, True, False])},
        coords={
            "swap": ["a", "b", "c"], "first": ("swap", [0, 1, 2]), "last": ("swap", [2, 2, 2]),
            "what": ("swap", ["kv"] * 3), "function": ("example", ["count"] * 4),
        },
    )  # fmt: skip
    table = layer_contributions(found)
    np.testing.assert_allclose(table["value"], [2 / 3, 1 / 3, 0])
    assert table["n"].tolist() == [3, 3, 3] and table["left_out"].tolist() == [1, 1, 1]
    assert layer_contributions(found, "all")["n"].tolist() == [4, 3, 3]
    rates = outcome_shares(found).query("outcome == 'changed'")["value"].to_numpy()
    np.testing.assert_allclose(table["value"], rates - np.append(rates[1:], 0))
    with pytest.raises(FrankenlensError, match="suffix"):
        layer_contributions(found.isel(swap=[0, 2]))
    with pytest.raises(FrankenlensError, match="none of"):
        layer_contributions(found, "some")


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
    target = pairs[0][0]
    for images in ((), (*target.images, *target.images)):
        other = [(target, Example("x", images, target.question, "5"))]
        found = vision_swap(vlm, builder, other, singles(1), max_new_tokens=2, progress=False)
        assert f"1 images and the source {len(images)}" in str(found["why"].item())


def test_a_batch_padded_on_the_right_is_refused(given) -> None:
    vlm, builder, pairs = given
    batch = collate([builder.build(target) for target, _ in pairs])
    with pytest.raises(FrankenlensError, match="left padding"):
        greedy_batch(vlm, batch)


def test_runs_of_layers_are_the_same_for_swaps_and_knockouts() -> None:
    cut = Knockout("image", "decision")
    expected = {
        "singles": [(0, 0), (1, 1), (2, 2), (3, 3)],
        "suffixes": [(0, 3), (1, 3), (2, 3), (3, 3)],
        "windows": [(0, 2), (1, 3)],
    }
    for name, spans in expected.items():
        width = (3,) if name == "windows" else ()
        assert getattr(regions, name)(4, *width) == spans
        assert [one.layers for one in getattr(knockout, name)(cut, 4, *width)] == spans
        assert [(one.first, one.last) for one in getattr(localization, name)(4, *width)] == spans
    for made in (regions.windows, localization.windows, regions.around, partial(knockout.windows, cut)):
        for width in (0, 5):
            with pytest.raises(
                FrankenlensError, match=f"windows of {width} layers: the tower has 4; give 1 to 4"
            ):
                made(4, width)
