"""Logit lens: bit for bit the model's output at the last layer, by hand at the others; post-heads; both models."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from transformers import (
    GemmaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from hooks import FrankenlensError, HookedVLM
from interp.decision import null_changes
from interp.lens import answer_layers, compare_lenses, logit_lens, streams
from interp.lens.compare import first_and_lasting
from interp.lens.head import freeze, head_of
from interp.pair.pair import Pair
from interp.prompts import collate
from tests.families import EACH_KIND, TinyVLM, redraw, tiny
from tests.interp.lens.lens_models import bare, family, opened, prompts_of, rms_lens


@torch.no_grad()
@pytest.mark.parametrize("name", EACH_KIND)
def test_the_last_layer_is_the_models_output_bit_for_bit(name) -> None:
    """torch.equal, for single rows and for a padded batch in the model's own shape."""
    made, vlm, prompts = family(name)
    batch = collate(prompts)
    _, cache = vlm.run_with_cache(batch.inputs, "blocks.2.hook_resid_post")
    streams_ = streams.read_streams(vlm, streams.Tokens(tuple(prompts), torch.tensor([0]), torch.tensor([0])))
    assert torch.equal(streams_.head(cache["resid_post", 2]), made.model(**batch.inputs).logits)
    for prompt in prompts:
        logits = made.model(**prompt.inputs).logits[0]
        found = logit_lens(vlm, [prompt], where="all", top_k=logits.shape[-1], progress=False).isel(layer=-1)
        own = torch.empty_like(logits)
        ids = torch.from_numpy(found["token_id"].to_numpy())
        own.scatter_(1, ids, torch.from_numpy(found["logit"].to_numpy()).float())
        assert torch.equal(own, logits)
        assert (found["kl"] == 0).all()


@pytest.mark.parametrize("name", EACH_KIND)
def test_every_layer_by_hand_image_tokens_and_padding_included(name) -> None:
    """Layers of a batch against plain hooks on single rows, norm and unembedding written out."""
    made, vlm, prompts = family(name)
    found = logit_lens(vlm, prompts, where="all", top_k=3, batch_size=2, progress=False)
    for row, prompt in enumerate(prompts):
        logits, seen = bare(made.model, prompt)
        one = found.isel(token=found["row"].to_numpy() == row)
        assert one.sizes["token"] == len(prompt) and one.sizes["layer"] == 4 == len(seen)
        final = logits.double().log_softmax(-1)
        atol = 1e-5 * max(1.0, float(logits.abs().max()))
        for layer, resid in enumerate(seen):
            expected = rms_lens(made.model, resid)
            best, logp = expected.topk(3), expected.log_softmax(-1)
            likely = logp.gather(-1, best.indices).exp()
            np.testing.assert_allclose(one["logit"][layer], best.values.numpy(), atol=atol)
            kl = (final.exp() * (final - logp)).sum(-1)
            np.testing.assert_allclose(one["kl"][layer], kl, atol=1e-4)
            np.testing.assert_allclose(one["probability"][layer], likely, atol=1e-5)
            entropy = -(logp.exp() * logp).sum(-1)
            np.testing.assert_allclose(one["entropy"][layer], entropy, atol=1e-4)
        assert one["kl"][:3].mean("token").min() > 1e-2
        assert one["final_id"].to_numpy().tolist() == logits.argmax(-1).tolist()


def test_chunks_roles_positions_and_targets(monkeypatch) -> None:
    made, vlm, prompts = family("qwen3_vl")
    whole = logit_lens(vlm, prompts, where="image", top_k=2, targets=[5, 9], progress=False)
    monkeypatch.setattr(streams, "CHUNK", 3 * made.model.lm_head.weight.shape[0])
    small = logit_lens(vlm, prompts, where="image", top_k=2, targets=[5, 9], batch_size=1, progress=False)
    xr.testing.assert_allclose(whole, small, atol=1e-5)
    places = [prompt.positions("image").tolist() for prompt in prompts]
    xr.testing.assert_allclose(
        whole, logit_lens(vlm, prompts, where=places, top_k=2, targets=[5, 9], progress=False), atol=1e-5
    )
    assert set(whole["role"].to_numpy()) == {"image"}
    assert whole["position"].to_numpy().tolist() == [at for some in places for at in some]
    logits, _ = bare(made.model, prompts[1])
    logp = logits.log_softmax(-1)[prompts[1].positions("image")]
    mine = whole.isel(layer=-1, token=whole["row"].to_numpy() == 1)
    np.testing.assert_allclose(mine["target_logp"], logp[:, 9], atol=1e-5)
    assert mine["target_rank"].to_numpy().tolist() == (logp > logp[:, 9:10]).sum(1).tolist()
    some = logit_lens(vlm, prompts, layers=[-1, 1], where=[0, -2], progress=False)
    assert some["layer"].to_numpy().tolist() == [1, 3]
    assert some["position"].to_numpy().tolist() == [at for p in prompts for at in (0, len(p) - 2)]


def test_deepstack_belongs_to_what_the_next_block_reads() -> None:
    _, vlm, prompts = family("qwen3_vl")
    _, cache = vlm.run_with_cache(prompts[0].inputs, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    image = prompts[0].positions("image")
    assert (cache["resid_post", 0] - cache["resid_pre", 1])[0, image].abs().max() > 0.1
    found = streams.read_streams(
        vlm, streams.Tokens((prompts[0],), torch.zeros(len(image), dtype=torch.long), image)
    )
    assert torch.equal(found.values[1], cache["resid_pre", 1][0, image])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"where": "decsion"}, "no role 'decsion'"),
        ({"where": [3, 99_999]}, r"prompt 0 \('e0'\) has \d+ tokens, so no position 99999"),
        ({"where": [[3], [-9999]]}, r"prompt 1 \('e1'\) has \d+ tokens, so no position -9999"),
        ({"where": [[3]]}, "1 lists of positions for 2 prompts"),
        ({"where": [[3], []]}, r"prompt 1 \('e1'\) is given no position"),
        ({"layers": [4]}, "there is no layer 4: 0 is the stream before the first block, 3"),
        ({"layers": []}, "layers is empty"),
        ({"top_k": 0}, "top_k is 0"),
        ({"targets": [1]}, "1 targets for 2 prompts"),
    ],
)
def test_what_is_not_there_is_one_error_that_names_the_row(given, match) -> None:
    _, vlm, prompts = family("llava")
    with pytest.raises(FrankenlensError, match=match):
        logit_lens(vlm, prompts, **{"where": "decision", "progress": False, **given})


def test_a_role_that_is_empty_in_one_prompt_names_that_prompt() -> None:
    made = tiny("llava")
    prompts = prompts_of(made, ("<think> red 3 </think> answer 3", "answer 3"))
    with pytest.raises(FrankenlensError, match=r"prompt 1 \('e1'\) has no 'reasoning' token"):
        logit_lens(opened(made), prompts, where="reasoning", progress=False)
    with pytest.raises(FrankenlensError, match="at least one prompt"):
        logit_lens(opened(made), [], progress=False)


class _Planted(LlavaForConditionalGeneration):
    """A head that divides, caps or does something unheard of after the unembedding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        config: Any = self.config.text_config
        if getattr(config, "logits_scaling", None):
            output.logits = output.logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            output.logits = output.logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None):
            cap = config.final_logit_softcapping
            output.logits = torch.tanh(output.logits / cap) * cap
        if getattr(config, "unheard_of", None):
            output.logits = output.logits + 1
        return output


@torch.no_grad()
@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"logits_scaling": 3.0}, "divided by 3"),
        ({"logit_scale": 0.3}, "multiplied by 0.3"),
        ({"final_logit_softcapping": 1.5}, "soft-capped at 1.5"),
        ({"logits_scaling": 3.0, "final_logit_softcapping": 0.7}, "divided by 3, soft-capped at 0.7"),
    ],
)
def test_scaled_and_capped_heads(planted, said) -> None:
    made = tiny("llava")
    plain = logit_lens(opened(made), prompts_of(made), where="all", progress=False)
    model = _Planted(made.model.config)
    model.load_state_dict(made.model.state_dict())
    for name, value in planted.items():
        setattr(model.config.text_config, name, value)
    made = TinyVLM("llava", model.eval(), made.processor)
    vlm, prompts = opened(made), prompts_of(made)
    for prompt in prompts:
        found = logit_lens(vlm, [prompt], where="all", progress=False)
        best = model(**prompt.inputs).logits[0].topk(5).values
        assert torch.equal(torch.from_numpy(found["logit"].to_numpy()[-1]).float(), best)
        assert found.attrs["logits"] == said
    found = logit_lens(vlm, prompts, where="all", progress=False)
    divisor, factor = planted.get("logits_scaling", 1), planted.get("logit_scale", 1)
    expected = plain["logit"].isel(rank=0) / divisor * factor
    cap = planted.get("final_logit_softcapping")
    expected = expected if cap is None else cap * np.tanh(expected / cap)
    np.testing.assert_allclose(found["logit"].isel(rank=0), expected, atol=1e-5)
    assert abs(found["logit"] - plain["logit"]).max() > 1e-2


def test_a_head_that_is_not_known_is_refused() -> None:
    made = tiny("llava")
    model = _Planted(made.model.config)
    model.load_state_dict(made.model.state_dict())
    model.config.text_config.unheard_of = True  # type: ignore[attr-defined]
    made = TinyVLM("llava", model.eval(), made.processor)
    with pytest.raises(FrankenlensError, match="no linear layer's output is the logits"):
        logit_lens(opened(made), prompts_of(made), progress=False)


@torch.no_grad()
def test_paligemmas_own_soft_cap_and_gemmas_gain_of_one_plus_weight() -> None:
    """Hugging Face's own code, not a planted head."""
    text: dict[str, Any] = dict(
        model_type="gemma",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    vision: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text).to_dict(),
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False).to_dict(),
        image_token_index=59,
        projection_dim=32,
        hidden_size=32,
    )
    setattr(config.text_config, "final_logit_softcapping", 3.0)  # noqa: B010
    model: Any = PaliGemmaForConditionalGeneration(config)
    redraw(model, 0)
    model.eval()
    inputs = {
        "input_ids": torch.tensor([[59] * 4 + [3, 7, 9]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    vlm = HookedVLM(model, inputs=inputs)
    raw: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: raw.append(output.clone()))
    output, cache = vlm.run_with_cache(inputs, "blocks.1.hook_resid_post")
    handle.remove()
    head = head_of(vlm, raw[0], output.logits)
    resid = cache["resid_post", 1]
    assert torch.equal(head(resid), model(**inputs).logits) and str(head.after) == "soft-capped at 3"
    assert (raw[0] - output.logits).abs().max() > 1e-2
    norm = freeze(head.norm, resid[0])
    torch.testing.assert_close(norm.gain, 1 + model.model.language_model.norm.weight.double())


def test_a_hook_that_moves_the_final_norm_between_check_and_model_is_noticed(monkeypatch) -> None:
    """A final norm that works otherwise when it is called by itself: the check at call time refuses."""
    made, vlm, prompts = family("llava")
    norm = made.model.model.language_model.norm
    calls = []

    def drift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * (1 + 1e-3 * (len(calls) - 1))

    handle = norm.register_forward_hook(drift)
    with pytest.raises(FrankenlensError, match="are off the model's own logits by"):
        logit_lens(vlm, prompts, progress=False)
    handle.remove()
    logit_lens(vlm, prompts, progress=False)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """IN, and IN with its last two blocks and its unembedding moved."""
    made = tiny("qwen2_5_vl")
    other = deepcopy(made.model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in other.named_parameters():
            if "language_model.layers.2" in name or "lm_head" in name:
                weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return Pair(opened(made), opened(TinyVLM("qwen2_5_vl", other, made.processor)))


def test_the_pair_side_by_side_is_each_model_alone(pair) -> None:
    prompts = prompts_of(TinyVLM("qwen2_5_vl", pair.in_.model, pair.processor))
    both = logit_lens(pair, prompts, where="all", progress=False)
    for name, vlm in (("in", pair.in_), ("rl", pair.rl)):
        xr.testing.assert_equal(
            both.sel(model=name, drop=True), logit_lens(vlm, prompts, where="all", progress=False)
        )


def test_kl_and_overlap_by_hand_and_models_that_learnt_nothing(pair) -> None:
    """Against norm, unembedding, sets and sums written out on the bare models' streams."""
    prompts = prompts_of(TinyVLM("qwen2_5_vl", pair.in_.model, pair.processor))
    before = pair.provenance()
    found = compare_lenses(pair, prompts, top_k=5, nulls=null_changes(pair, 3), progress=False)
    assert pair.provenance() == before
    assert found["comparison"].to_numpy().tolist() == ["rl", "bf16", "random"]
    for row, prompt in enumerate(prompts):
        sides = [bare(vlm.model, prompt)[1] for vlm in (pair.in_, pair.rl)]
        one = found.sel(comparison="rl").isel(token=found["row"].to_numpy() == row)
        for layer in range(4):
            old, new = (
                rms_lens(vlm.model, s[layer]) for vlm, s in zip((pair.in_, pair.rl), sides, strict=True)
            )
            p, q = new.log_softmax(-1), old.log_softmax(-1)
            np.testing.assert_allclose(one["kl"][layer], (p.exp() * (p - q)).sum(-1), atol=1e-4)
            np.testing.assert_allclose(one["kl_reverse"][layer], (q.exp() * (q - p)).sum(-1), atol=1e-4)
            tops = [
                set(map(int, a)) & set(map(int, b))
                for a, b in zip(old.topk(5)[1], new.topk(5)[1], strict=True)
            ]
            np.testing.assert_allclose(one["overlap"][layer], [len(top) / 5 for top in tops])
            assert (one["same_top"][layer].to_numpy() == (old.argmax(-1) == new.argmax(-1)).numpy()).all()
    assert float(found["kl"].sel(comparison="rl").mean()) > 1e-2
    bf16 = float(found["kl"].sel(comparison="bf16").mean())
    assert 0 < bf16 < 0.1 * float(found["kl"].sel(comparison="rl").mean())


def test_identical_models_are_nowhere_apart(pair) -> None:
    same = Pair(pair.in_, opened(TinyVLM("qwen2_5_vl", deepcopy(pair.in_.model), pair.processor)))
    prompts = prompts_of(TinyVLM("qwen2_5_vl", pair.in_.model, pair.processor))
    found = compare_lenses(same, prompts, progress=False)
    assert (found["kl"] == 0).all() and (found["overlap"] == 1).all() and found["same_top"].all()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=0, max_size=8))
def test_first_and_lasting_layer(rows) -> None:
    """By a search from below, for any order of right and wrong layers; the last one is always right."""
    top = np.array([*rows, [True] * 3])
    appears, stays = first_and_lasting(top)
    for at in range(3):
        column = top[:, at].tolist()
        assert appears[at] == column.index(True)
        assert stays[at] == next(layer for layer in range(len(column)) if all(column[layer:]))


def test_answer_layers_are_those_of_the_argmax(pair) -> None:
    prompts = prompts_of(TinyVLM("qwen2_5_vl", pair.in_.model, pair.processor))
    found = answer_layers(logit_lens(pair, prompts, where="all", top_k=1, progress=False))
    for name, vlm in (("in", pair.in_), ("rl", pair.rl)):
        for row, prompt in enumerate(prompts):
            logits, seen = bare(vlm.model, prompt)
            tops = torch.stack([rms_lens(vlm.model, resid).argmax(-1) for resid in seen])
            right = (tops == logits.argmax(-1)).numpy()
            right[-1] = True
            one = found.sel(model=name).isel(token=found["row"].to_numpy() == row)
            appears, stays = first_and_lasting(right)
            assert one["appears"].to_numpy().tolist() == appears.tolist()
            assert one["stays"].to_numpy().tolist() == stays.tolist()
    assert len(np.unique(found["stays"])) > 1
    with pytest.raises(FrankenlensError, match="needs the last layer, 3"):
        answer_layers(logit_lens(pair.in_, prompts, layers=[0, 1], progress=False))


def test_the_model_is_left_as_it_was() -> None:
    made, vlm, prompts = family("qwen3_vl")
    state = {name: value.clone() for name, value in made.model.state_dict().items()}
    config = made.model.config.to_json_string()
    logit_lens(vlm, prompts, where="all", progress=False)
    assert all(torch.equal(state[name], value) for name, value in made.model.state_dict().items())
    assert made.model.config.to_json_string() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())


@torch.no_grad()
def test_the_kl_of_models_close_to_one_another_is_scipys_and_never_negative() -> None:
    """Where KL is 1e-9, float32 gives either sign."""
    made = tiny("qwen2_5_vl")
    near = deepcopy(made.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in near.parameters():
        parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    in_, rl = (HookedVLM(model, made.processor, check=False) for model in (made.model, near))
    prompts = prompts_of(made)
    found = compare_lenses(Pair(in_, rl), prompts, where="all", progress=False)
    own = logit_lens(in_, prompts, where="all", progress=False)
    assert float(found["kl"].min()) >= 0 and float(found["kl_reverse"].min()) >= 0
    assert float(own["kl"].min()) >= 0 and float(own["entropy"].min()) >= 0
    last = found.sel(comparison="rl").isel(layer=-1)
    one, other = (
        np.concatenate([model(**p.inputs).logits[0].double().log_softmax(-1).exp().numpy() for p in prompts])
        for model in (made.model, near)
    )
    np.testing.assert_allclose(last["kl"], rel_entr(other, one).sum(-1), rtol=0.02, atol=1e-16)
    naive = []
    for p in prompts:
        old, new = (model(**p.inputs).logits[0].log_softmax(-1) for model in (made.model, near))
        naive.append((new.exp() * (new - old)).sum(-1))
    assert float(torch.cat(naive).min()) < 0 < float(last["kl"].max())
