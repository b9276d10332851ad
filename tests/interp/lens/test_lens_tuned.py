"""Tuned lens: nearer to the output than the logit lens on prompts it never saw; saved, reloaded, refused elsewhere."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

from hooks import FrankenlensError
from interp.lens import TunedLens, logit_lens, train_tuned_lens
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.questions.tasks import REASONING, chain, sample
from tests.families import TinyVLM
from tests.interp.lens.lens_models import family, opened


def _read(pair: Pair, n: int, seed: int, split) -> list[Prompt]:
    """Questions of every reasoning task with their gold chains."""
    examples = [example for task in REASONING for example in sample(task, n, seed, split)]
    return [pair.builder.build(e, f"<think> {chain(e)} </think> answer {e.answer}") for e in examples]


@pytest.fixture(scope="module")
def trained(pair) -> dict[str, TunedLens]:
    prompts = _read(pair, 24, 0, "map")
    return {
        name: train_tuned_lens(vlm, prompts, steps=60, tokens_a_step=256, progress=False)
        for name, vlm in (("in", pair.in_), ("rl", pair.rl))
    }


@pytest.mark.slow
def test_lower_kl_than_the_logit_lens_at_every_layer_but_the_last_on_held_out_prompts(pair, trained) -> None:
    """Another split and seed; each model; the mean over tokens, and at most prompts alone."""
    prompts = _read(pair, 8, 1, "test")
    plain = logit_lens(pair, prompts, where="all", progress=False)
    tuned = logit_lens(pair, prompts, where="all", tuned=trained, progress=False)
    before, after = plain["kl"].mean("token"), tuned["kl"].mean("token")
    assert (after[:, :-1] < before[:, :-1]).all()
    assert (after[:, :-1] < 0.7 * before[:, :-1]).all()
    assert (after[:, -1] == 0).all() and (before[:, -1] == 0).all()
    by_prompt = [kl["kl"][:, :-1].groupby("row").mean() for kl in (plain, tuned)]
    assert float((by_prompt[1] < by_prompt[0]).mean()) > 0.95
    assert tuned.attrs["lens"] == "tuned lens"


def test_saved_and_reloaded_it_says_the_same(pair, trained, tmp_path) -> None:
    trained["rl"].save(tmp_path / "rl.safetensors")
    again = TunedLens.load(tmp_path / "rl.safetensors", pair.rl)
    assert torch.equal(again.weight, trained["rl"].weight) and torch.equal(again.bias, trained["rl"].bias)
    assert again.made == trained["rl"].made and again.made["loss"][-1] < 0.5 * again.made["loss"][0]
    prompts = _read(pair, 1, 2, "test")
    xr.testing.assert_equal(
        logit_lens(pair.rl, prompts, tuned=again, progress=False),
        logit_lens(pair.rl, prompts, tuned=trained["rl"], progress=False),
    )
    with pytest.raises(FrankenlensError, match="this tuned lens was trained on .* with weights"):
        TunedLens.load(tmp_path / "rl.safetensors", pair.in_)
    with pytest.raises(FrankenlensError, match="this tuned lens was trained on"):
        logit_lens(pair.in_, prompts, tuned=trained["rl"], progress=False)
    with pytest.raises(FrankenlensError, match="for a pair give tuned="):
        logit_lens(pair, prompts, tuned=trained["rl"], progress=False)


def test_what_is_no_tuned_lens_is_refused(pair, tmp_path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(FrankenlensError, match="is no tuned lens"):
        TunedLens.load(tmp_path / "other.safetensors", pair.in_)
    for name, said in (
        ("text", "cannot be read as safetensors"),
        ("missing", "no such file: .*TunedLens.save"),
    ):
        with pytest.raises(FrankenlensError, match=said):
            TunedLens.load(tmp_path / f"{name}.safetensors", pair.in_)


def test_before_training_it_is_the_logit_lens_and_its_first_gradient_is_autograds() -> None:
    """One step of Adam moves every entry by the learning rate against the sign of the loss's gradient."""
    made, vlm, prompts = family("llava")
    lens = train_tuned_lens(
        vlm, prompts[:1], layers=[1], steps=1, tokens_a_step=10_000, learning_rate=1e-3, progress=False
    )
    loss = lens.made["loss"][0]
    plain = logit_lens(vlm, prompts[:1], layers=[1], where="all", progress=False)
    tokens = torch.randint(len(prompts[0]), (len(prompts[0]),), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(loss, plain["kl"][0].to_numpy()[tokens].mean(), rtol=1e-5)
    _, cache = vlm.run_with_cache(prompts[0].inputs, ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"])
    bias = torch.zeros(32, requires_grad=True)
    norm, unembed = made.model.model.language_model.norm, made.model.lm_head
    final = unembed(norm(cache["resid_post", 2][0, tokens])).log_softmax(-1).detach()
    own = unembed(norm(cache["resid_pre", 1][0, tokens] + bias)).log_softmax(-1)
    (gradient,) = torch.autograd.grad((final.exp() * (final - own)).sum(-1).mean(), bias)
    torch.testing.assert_close(lens.bias[0], -1e-3 * gradient.sign(), atol=1e-5, rtol=0)
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_the_same_seed_trains_the_same_lens_and_the_model_is_untouched() -> None:
    made, vlm, prompts = family("qwen3_vl")
    state = {name: value.clone() for name, value in made.model.state_dict().items()}
    settings = {"steps": 5, "tokens_a_step": 16, "max_tokens": 20, "progress": False}
    first, second = (train_tuned_lens(vlm, prompts, seed=3, **settings) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.made["n_tokens"] == 20
    assert not torch.equal(first.weight, train_tuned_lens(vlm, prompts, seed=4, **settings).weight)
    assert all(torch.equal(state[name], value) for name, value in made.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in made.model.parameters())


def test_layers_it_was_not_trained_on_and_nothing_to_train() -> None:
    made, vlm, prompts = family("llava")
    lens = train_tuned_lens(vlm, prompts, layers=[1], steps=2, progress=False)
    logit_lens(vlm, prompts, layers=[1, 3], tuned=lens, progress=False)
    with pytest.raises(FrankenlensError, match=r"trained on layers \[1\], not on layer 0"):
        logit_lens(vlm, prompts, tuned=lens, progress=False)
    wrong: tuple[dict[str, Any], ...] = ({"layers": [3]}, {"steps": 0})
    for given in wrong:
        with pytest.raises(FrankenlensError, match="nothing to train"):
            train_tuned_lens(vlm, prompts, **given, progress=False)
    copy = TinyVLM("llava", deepcopy(made.model), made.processor)
    with torch.no_grad():
        copy.model.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(FrankenlensError, match="this tuned lens was trained on"):
        lens.require(opened(copy))
