"""Openings and runs that cannot be: one sentence that names the fix, never a traceback of what lies below."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
import torch
from torch import Tensor
from transformers import ProcessorMixin

from hooks import FrankenlensError, HookedVLM
from tests.architectures import build


class Odd(ProcessorMixin):
    """A processor that makes no prompt."""

    image_processor = object()

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.chat_template = "a template" if isinstance(error, jinja2.TemplateError) else None

    def __call__(self, **given: Any) -> dict[str, Tensor]:
        raise self.error

    def apply_chat_template(self, *given: Any, **named: Any) -> str:
        raise self.error


@pytest.mark.parametrize(
    "error", [AttributeError("no image_token"), jinja2.TemplateError("roles must alternate"), KeyError("|X|")]
)
def test_a_processor_that_makes_no_prompt_is_refused(error: Exception) -> None:
    with pytest.raises(FrankenlensError, match=r"Odd: \w+Error: .*inputs=") as caught:
        HookedVLM(build("llama").model, Odd(error))
    assert str(error.args[0]) in str(caught.value)


def test_a_model_without_embeddings_is_refused_without_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").model

    def none(self: Any) -> None:
        raise NotImplementedError("nowhere")

    monkeypatch.setattr(type(model), "get_input_embeddings", none)
    with pytest.raises(FrankenlensError, match=r"LlamaForCausalLM: NotImplementedError: nowhere .*inputs="):
        HookedVLM(model)


def test_weights_made_in_inference_mode_are_refused_by_name() -> None:
    with torch.inference_mode():
        given = build("llama")
    with pytest.raises(FrankenlensError, match="made under torch.inference_mode.*check=False"):
        HookedVLM(given.model, inputs=given.inputs)
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    with torch.no_grad():
        _, cache = vlm.run_with_cache(given.inputs, ["blocks.0.hook_attn_out"])
    assert cache["attn_out", 0].abs().max() > 0


@torch.no_grad()
def test_embeddings_that_a_model_makes_of_ids_while_it_generates() -> None:
    """BLIP-2's language model is handed embeddings once and ids then, without the whole model being called."""
    given = build("blip-2")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    kwargs: Any = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    shown: dict[str, list[list[int]]] = {"hook_embed": [], "blocks.0.hook_resid_pre": []}

    def look(activation: Tensor, hook: Any) -> None:
        shown[hook.name].append(hook.positions.tolist())

    with pytest.raises(FrankenlensError, match=r"hook_embed: .*at=\"prompt\".*hook_resid_pre"):
        vlm.generate(given.inputs, [("hook_embed", look)], **kwargs)
    shown["hook_embed"].clear()
    n = given.inputs["input_ids"].shape[1]
    vlm.generate(given.inputs, [("hook_embed", look)], at="prompt", **kwargs)
    vlm.generate(given.inputs, [("blocks.0.hook_resid_pre", look)], at="generated", **kwargs)
    assert shown["hook_embed"] == [list(range(n))]
    assert shown["blocks.0.hook_resid_pre"] == [[n], [n + 1]]


@torch.no_grad()
def test_an_edit_in_place_does_not_reach_the_callers_own_tensor() -> None:
    given = build("llama")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    embeds = given.model.get_input_embeddings()(given.inputs["input_ids"])
    before = embeds.clone()
    ours = {"inputs_embeds": embeds, "attention_mask": given.inputs["attention_mask"]}

    def silence(activation: Tensor, hook: Any) -> None:
        activation.zero_()

    changed = vlm.run_with_hooks(ours, [("blocks.0.hook_resid_pre", silence)]).logits
    assert torch.equal(embeds, before)
    plain = vlm.run_with_hooks(
        ours, [("blocks.0.hook_resid_pre", lambda a, hook: torch.zeros_like(a))]
    ).logits
    assert torch.equal(changed, plain)
    assert (changed - given.model(**ours).logits).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_of_everything_has_no_experts_one_by_one() -> None:
    given = build("qwen3_moe")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    _, cache = vlm.run_with_cache(given.inputs)
    experts = {name for name, point in vlm.hook_points.items() if point.place == "expert_out"}
    assert experts and set(cache) == set(vlm.hook_points) - experts
