"""Attention mass against Hugging Face's own attention matrices, row by row, and the shift of known shifts."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.attention.shift import attention_mass, attention_shift, shift, summing
from interp.decision import null_changes
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.tasks import sample
from interp.statistics import adjust, mean_test
from tests.families import EACH_KIND, tiny

EXAMPLES = [example for task in ("sum", "colour_at") for example in sample(task, 6, 5, "test")]


@torch.no_grad()
def _by_hand(vlm: HookedVLM, prompt) -> np.ndarray:
    """[layer head], from the eager matrices of a single row."""
    before = str(vlm.model.config._attn_implementation)
    vlm.model.set_attn_implementation("eager")
    try:
        attentions = vlm.model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    finally:
        vlm.model.set_attn_implementation(before)
    image, reasoning = prompt.positions("image"), prompt.positions("reasoning")
    mass = [[[float(head[i][image].sum()) for i in reasoning] for head in layer[0]] for layer in attentions]
    return np.array(mass).mean(-1)


def test_mass_is_that_of_the_eager_matrices_one_row_at_a_time(pair) -> None:
    prompts = [pair.builder.build(example) for example in EXAMPLES]
    written = {name: greedy(pair.models[name], prompts, 16) for name in ("in", "rl")}
    found = attention_shift(pair, EXAMPLES, max_new_tokens=16, batch_size=5, progress=False)
    for model in ("in", "rl"):
        for trace in ("in", "rl"):
            for row, prompt in enumerate(prompts):
                whole = prompt.with_tokens(written[trace][row])
                if not len(whole.positions("reasoning")):
                    continue
                got = found["mass"].sel(model=model, trace=trace).isel(example=row)
                expected = _by_hand(pair.models[model], whole)
                np.testing.assert_allclose(got, expected, atol=1e-5)
                assert found["n_target"].sel(trace=trace)[row] == len(whole.positions("reasoning"))
                assert found["n_source"].sel(trace=trace)[row] == 16
    spread = found["mass"].max() - found["mass"].min()
    assert spread > 100 * 1e-5


def test_mass_of_a_left_out_row_is_nan_with_the_reason(pair) -> None:
    found = attention_shift(pair, EXAMPLES[:3], max_new_tokens=2, progress=False)
    assert found["mass"].isnull().all()
    assert all("does not parse" in why for why in found["why"].to_numpy().ravel().tolist())
    with pytest.raises(FrankenlensError, match="at least one example"):
        attention_shift(pair, [])
    with pytest.raises(FrankenlensError, match="no role 'pictures'"):
        attention_shift(pair, EXAMPLES, source="pictures")


FORMAT = TraceFormat(reasoning=("<think>", "</think>"), answer=("answer", None))


@torch.no_grad()
@pytest.mark.parametrize("family", EACH_KIND)
def test_mass_of_every_family_with_two_images_and_padding_on_either_side(family) -> None:
    """Grouped query heads, two images of different size, rows of different length; eager matrices row by row."""
    made = tiny(family)
    vlm = HookedVLM(made.model, made.processor, inputs=made.inputs())
    builder = PromptBuilder(made.processor, FORMAT)
    images = made.images(6, seed=4)
    traces = ("<think> red 3 </think> answer 3", "<think> red 3 + blue 2 + 4 </think> answer 9", "answer 3")
    prompts = [
        builder.build(
            Example(str(i), tuple(images[2 * i : 2 * i + 2]), "how many red " * (i + 1), "3"), trace
        )
        for i, trace in enumerate(traces)
    ]
    assert vlm.anatomy.text.blocks[0].n_kv_heads < vlm.n_heads or family == "llava"
    found = attention_mass(vlm, prompts, "reasoning", "image", batch_size=3)
    assert np.isnan(found[:, :, 2]).all()
    seen: dict[int, torch.Tensor] = {}
    batch = collate(prompts[:2], "left")
    hook = summing(batch.mask("reasoning"), batch.mask("image"), seen)
    vlm.run_with_hooks(
        batch.inputs, [(f"blocks.{layer}.attn.hook_pattern", hook) for layer in range(vlm.n_layers)]
    )
    for row, prompt in enumerate(prompts[:2]):
        expected = _by_hand(vlm, prompt)
        np.testing.assert_allclose(found[:, :, row], expected, atol=1e-5)
        np.testing.assert_allclose([seen[layer][row] for layer in range(vlm.n_layers)], expected, atol=1e-5)
        assert expected.max() - expected.min() > 1e-3
        first = prompt.positions("image")[0]
        assert prompt.positions("question")[0] > first


def test_models_that_learnt_nothing_stand_on_the_same_traces_and_leave_the_pair_as_it_was(pair) -> None:
    before = pair.provenance()
    nulls = null_changes(pair, seed=3)
    found = attention_shift(pair, EXAMPLES, nulls=nulls, max_new_tokens=16, progress=False)
    assert pair.provenance() == before
    assert found["model"].to_numpy().tolist() == ["in", "rl", "bf16", "random"]
    plain = attention_shift(pair, EXAMPLES, max_new_tokens=16, progress=False)
    assert plain["mass"].equals(found["mass"].sel(model=["in", "rl"]))
    same = shift(found, "in", models=("in", "in"))
    assert (same["difference"] == 0).all() and same["p"].isna().all()  # where nothing varies there is no test
    rounded = shift(found, "rl", models=("rl", "bf16"))
    assert 0 < rounded["difference"].abs().max() < 1e-2
    copy = deepcopy(pair.rl.model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.copy_(parameter.bfloat16().float())
        prompts = [pair.builder.build(example) for example in EXAMPLES]
        written = greedy(pair.rl, prompts, 16)
        whole = prompts[0].with_tokens(written[0])
        expected = _by_hand(HookedVLM(copy, pair.rl.processor), whole)
    got = found["mass"].sel(model="bf16", trace="rl").isel(example=0)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(FrankenlensError, match="none of"):
        shift(found, "own", models=("in", "random"))
    with pytest.raises(FrankenlensError, match="none of"):
        shift(plain, "in", models=("in", "random"))


def test_a_trace_without_reasoning_is_left_out_with_the_reason() -> None:
    """The base model answers at once."""
    base = Pair.from_pretrained(
        embedded.path("base"), embedded.path("base"), trace_format=TraceFormat(None, ("answer", None))
    )
    found = attention_shift(base, EXAMPLES[6:], max_new_tokens=16, progress=False)
    assert set(found["why"].to_numpy().ravel()) == {"the trace has no reasoning tokens"}
    assert found["mass"].isnull().all()
    table = shift(found)
    assert table["difference"].isna().all() and set(table["n"]) == {0} and set(table["left_out"]) == {6}


def test_all_attention_goes_somewhere(pair) -> None:
    prompts = [pair.builder.build(e, "<think> red 3 </think> answer 3") for e in EXAMPLES]
    roles = ("image", "question", "template", "reasoning")
    parts = [attention_mass(pair.in_, prompts, "reasoning", role) for role in roles]
    np.testing.assert_allclose(sum(parts), 1.0, atol=1e-5)
    assert collate(prompts).mask("answer").any()
    nothing = attention_mass(pair.in_, [pair.builder.build(EXAMPLES[0])], "answer", "image")
    assert np.isnan(nothing).all()


def test_shift_of_planted_differences() -> None:
    rng = np.random.default_rng(0)
    mass = rng.uniform(0.1, 0.2, (2, 2, 3, 2, 40))
    mass[1, 1, 2] += 0.05  # RL, on its own traces, in layer 2
    mass[:, :, 0, :, 4] = np.nan
    n_source = np.full((2, 40), 16)
    dims = ("model", "trace", "layer", "head", "example")
    found = xr.Dataset(
        {"mass": (dims, mass), "n_source": (("trace", "example"), n_source)},
        coords={"model": ["in", "rl"], "trace": ["in", "rl"], "layer": range(3), "head": range(2)},
    )
    own = shift(found)
    before, after = mass[0, 0].mean(1), mass[1, 1].mean(1)
    np.testing.assert_allclose(own["difference"], np.nanmean(after - before, axis=-1))
    assert own["n"].tolist() == [39, 40, 40] and own["left_out"].tolist() == [1, 0, 0]
    np.testing.assert_allclose(own["after"], np.nanmean(after, axis=-1))
    assert (own["before_low"] < own["before"]).all() and (own["before"] < own["before_high"]).all()
    assert own["p"].tolist() == [mean_test(a - b) for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(own["p_corrected"], adjust(own["p"].to_numpy()))
    assert own["p_corrected"][2] < 0.01 < own["p_corrected"][0]
    shared = shift(found, "in")
    np.testing.assert_allclose(shared["difference"], np.nanmean(mass[1, 0].mean(1) - before, axis=-1))
    heads = shift(found, "rl", per="head", measure="mean")
    assert (heads["layer"].tolist(), heads["head"].tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1] * 3)
    expected = np.nanmean(mass[1, 1] - mass[0, 1], axis=-1).ravel() / 16
    np.testing.assert_allclose(heads["difference"], expected)
    wrongs: list[dict[str, Any]] = [{"traces": "base"}, {"per": "block"}, {"measure": "max"}]
    for wrong in wrongs:
        with pytest.raises(FrankenlensError, match="none of"):
            shift(found, **wrong)
