"""Attention mass against Hugging Face's own attention matrices, row by row, and the shift of known shifts."""

import numpy as np
import pytest
import torch
import xarray as xr

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.attention_shift import attention_mass, attention_shift, shift
from interp.generation import greedy
from interp.pair import Pair
from interp.prompts import collate
from interp.statistics import adjust, sign_flip
from interp.tasks import sample


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))


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
    mass = rng.uniform(0.1, 0.2, (2, 2, 3, 2, 30))
    mass[1, 1, 2] += 0.05  # RL, on its own traces, in layer 2
    mass[:, :, 0, :, 4] = np.nan
    n_source = np.full((2, 30), 16)
    dims = ("model", "trace", "layer", "head", "example")
    found = xr.Dataset(
        {"mass": (dims, mass), "n_source": (("trace", "example"), n_source)},
        coords={"model": ["in", "rl"], "trace": ["in", "rl"], "layer": range(3), "head": range(2)},
    )
    own = shift(found, resamples=300)
    before, after = mass[0, 0].mean(1), mass[1, 1].mean(1)
    np.testing.assert_allclose(own["difference"], np.nanmean(after - before, axis=-1))
    assert own["n"].tolist() == [29, 30, 30]
    assert own["p"].tolist() == [sign_flip(a, b) for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(own["p_corrected"], adjust(own["p"].to_numpy()))
    assert own["p_corrected"][2] < 0.01 < own["p_corrected"][0]
    shared = shift(found, "in", resamples=300)
    np.testing.assert_allclose(shared["difference"], np.nanmean(mass[1, 0].mean(1) - before, axis=-1))
    heads = shift(found, "rl", per="head", measure="mean", resamples=300)
    assert (heads["layer"].tolist(), heads["head"].tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1] * 3)
    expected = np.nanmean(mass[1, 1] - mass[0, 1], axis=-1).ravel() / 16
    np.testing.assert_allclose(heads["difference"], expected)
    for wrong in ({"traces": "base"}, {"per": "block"}, {"measure": "max"}):
        with pytest.raises(FrankenlensError, match="none of"):
            shift(found, **wrong)
