"""Prompts of tensors and roles by hand: they sweep, map and lens without a processor; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import frankenlens as fl
from hooks.processors import image_token_of
from tests.architectures import TinyModel, build

NAMES = ["qwen3", pytest.param("llava", id="llava"), *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "gemma3", "mllama")
)]  # fmt: skip


def opened(name: str) -> tuple[TinyModel, fl.HookedVLM, list[fl.Prompt]]:
    """A tiny model that knows no processor, opened on its tensors, and two prompts, one longer than the other."""
    made = build(name)
    vlm = fl.HookedVLM(made.model, inputs=made.inputs)
    token = image_token_of(made.model)
    shorter = {
        key: value[:, :-3] if value.shape[:2] == made.inputs["input_ids"].shape else value
        for key, value in made.inputs.items()
    }
    given = [made.inputs, made.inputs if name == "mllama" else shorter]
    return (
        made,
        vlm,
        [fl.Prompt.from_inputs(one, image_token_id=token, name=f"p{n}") for n, one in enumerate(given)],
    )


@torch.no_grad()
def plain(made: TinyModel, prompt: fl.Prompt, layer: int, column: int | None = None) -> torch.Tensor:
    """Next-token logits of the bare model; what a block gives out at one token set to 0."""

    def zero(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first.clone()
        first[:, column] = 0
        return (first, *output[1:]) if isinstance(output, tuple) else first

    name = next(
        n for n, m in made.model.named_modules() if n.endswith(f"layers.{layer}") and "vision" not in n
    )
    handle = None if column is None else made.model.get_submodule(name).register_forward_hook(zero)
    logits = made.model(**prompt.inputs, use_cache=False).logits[0, -1]
    if handle is not None:
        handle.remove()
    return logits.double()


@pytest.mark.filterwarnings("ignore:.*cannot be taken up at a stored token")
@pytest.mark.parametrize("name", NAMES)
def test_they_sweep_map_and_lens(name: str) -> None:
    made, vlm, prompts = opened(name)
    metric = fl.LogitDifference(a=torch.tensor([3, 4]), b=torch.tensor([7, 8]))
    zeroed = fl.Intervention("blocks.0.hook_resid_post", "zero", "decision")
    found = fl.sweep(vlm, prompts, [zeroed], metric, progress=False)
    for row, prompt in enumerate(prompts):
        logits = [plain(made, prompt, 0, column) for column in (None, len(prompt) - 1)]
        clean, cut = (float(x[metric.a[row]] - x[metric.b[row]]) for x in logits)
        allowed = 1e-5 * max(1.0, float(logits[0].abs().max()))
        own = float(found.value.to_numpy().reshape(-1, 2)[0, row])
        assert abs(own - cut) < allowed
        assert abs(cut - clean) > 100 * allowed
    effects = fl.patch(
        vlm, prompts[:1], prompts[:1], metric.select([0]), points=("resid_pre", "mlp_out"), progress=False
    )
    assert float(np.nanmax(abs(effects["effect"].to_numpy()))) == 0
    assert ("image" in effects["role"].to_numpy()) == (made.image_mask is not None or name == "mllama")
    lens = fl.logit_lens(vlm, prompts, where="decision", top_k=1, progress=False)
    for row, prompt in enumerate(prompts):
        assert int(lens["token_id"].to_numpy()[-1, row, 0]) == int(plain(made, prompt, 0).argmax())


def test_two_models_make_a_pair_without_a_processor() -> None:
    made, vlm, prompts = opened("qwen3")
    other = build("qwen3", seed=1).model
    donor = fl.HookedVLM(other, inputs=made.inputs)
    metric = fl.LogitDifference(a=torch.tensor([3]), b=torch.tensor([7]))
    effects = fl.patch(
        vlm,
        prompts[:1],
        prompts[:1],
        metric,
        points=("resid_pre",),
        roles=["all"],
        progress=False,
        donor=donor,
    )
    last = effects["effect"].sel(component="blocks.2.hook_resid_pre").to_numpy().ravel()[0]
    assert abs(last) > 1e-2  # IN's last block on RL's stream
    logits = [plain(TinyModel(model, {}, None), prompts[0], 0) for model in (made.model, other)]
    ends = [float(effects[name].to_numpy().ravel()[0]) for name in ("recipient", "donor")]
    assert ends == pytest.approx([float(x[3] - x[7]) for x in logits], abs=1e-4)


IDS = torch.tensor([[5, 190, 190, 6]])
PIXELS = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "arguments", "words"),
    [
        ({"input_ids": IDS.expand(2, 4)}, {}, r"must be \[1, pos\], one prompt; got \(2, 4\)"),
        ({"input_ids": IDS[0]}, {}, r"got \(4,\)"),
        ({}, {}, "has no input_ids"),
        ({"input_ids": [[1, 2]]}, {}, "got list"),
        ({"input_ids": IDS}, {"roles": ["question"] * 3}, "3 roles for 4 tokens"),
        ({"input_ids": IDS}, {"roles": ["question"] * 3 + ["thought"]}, "token 3 has no role 'thought'"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 5)},
            {},
            r"attention_mask is \[1, 5\] and input_ids \[1, 4\]",
        ),
        ({"input_ids": IDS, "image_sizes": [(4, 4)]}, {}, "image_sizes is a list; give tensors"),
        (
            {"input_ids": IDS, "pixel_values": PIXELS},
            {},
            "no token is told to stand for it: give image_token_id",
        ),
        ({"input_ids": IDS, "pixel_values": PIXELS}, {"image_token_id": 9}, "no token is 9"),
        (
            {"input_ids": IDS},
            {"image_token_id": 190, "roles": ["question"] * 4},
            r"token 1 is the image's placeholder \(190\) and has the role 'question'",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_error(inputs: Any, arguments: Any, words: str) -> None:
    with pytest.raises(fl.FrankenlensError, match=words):
        fl.Prompt.from_inputs(inputs, **arguments)


def test_a_prompt_of_tensors_says_that_it_cannot_be_continued() -> None:
    prompt = fl.Prompt.from_inputs({"input_ids": IDS}, image_token_id=190)
    assert prompt.roles == ("question", "image", "image", "question")
    with pytest.raises(fl.FrankenlensError, match="no chat template to build, continue or read it with"):
        prompt.with_tokens([3])
