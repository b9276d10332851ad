"""Points whose tensor the model lays out in its own way are shown as their axes say, read and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hooks import HookedVLM
from tests.architectures import build

ODD = {
    "llama4": "experts are given the tokens in a row",
    "blip-2": "the language model's MLP is given the tokens in a row",
    "deepseek_v3": "values have an axis of one before the tokens",
    "gemma3n": "parallel streams are the first axis",
}
SLOW = ("blip-2", "gemma3n")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ODD])
@torch.no_grad()
def test_a_token_is_where_the_axes_say(name: str) -> None:
    given = build(name)
    vlm, inputs = HookedVLM(given.model, inputs=given.inputs), given.inputs
    n = inputs["input_ids"].shape[1]
    odd = [point for point in vlm.hook_points.values() if point.relaid or point.moved]
    assert odd
    bare = given.model(**inputs).logits
    largest = max(1.0, bare[bare > torch.finfo(bare.dtype).min].abs().max().item())
    moved = []
    for point in odd:
        if point.place not in ("output", "input") or point.inplace or point.key is not None:
            continue
        seen: list[Tensor] = []
        token = n - 1

        def row(tensor: Tensor, point: Any = point) -> Tensor:
            """The last token of what the model has: behind the streams, or the last of all rows."""
            if point.moved:
                return tensor[:, :, -1]
            behind = len(point.axes) - 2
            return tensor.reshape(n, *tensor.shape[tensor.ndim - behind :])[-1]

        def plain(module: Any, args: tuple, output: Any = None, point: Any = point, seen: list = seen) -> Any:
            whole = args[0] if output is None else output
            own = whole[0] if isinstance(whole, tuple) else whole
            shown = own if point.split is None else point.split.of(own)
            seen[:] = [row(shown).clone()]
            some = point.split
            if some is None or some.whole:
                row(shown).zero_()
            else:  # its entries among those of others, in place
                part = own.unflatten(-1, (some.groups, -1)).narrow(-1, some.start, some.length)
                part.select(own.ndim - 2, -1).zero_()
            return None

        with torch.no_grad():
            _, cache = vlm.run_with_cache(inputs, point.name)
            module = given.model.get_submodule(point.module)
            register = (
                module.register_forward_hook if point.place == "output" else module.register_forward_pre_hook
            )
            handle = register(plain)
            expected = given.model(**inputs).logits
            handle.remove()

            def zero(activation: Tensor, hook: Any, token: int = token) -> None:
                activation[:, token] = 0

            ours = vlm.run_with_hooks(inputs, [(point.name, zero)]).logits
        own = cache[point.name][0, token]
        assert cache[point.name].shape[:2] == (1, n)
        assert torch.equal(own.flatten(), (seen[0].movedim(0, -2) if point.moved else seen[0]).flatten())
        assert (ours - expected).abs().max().item() <= 1e-5 * largest, point.name
        moved.append((expected - bare).abs().max().item())
    assert moved and max(moved) > 1e-3 * largest


def test_rows_that_are_not_the_prompts_tokens_are_no_embedding_of_them() -> None:
    given = build("chameleon")  # the embedding is called a second time, for the image's tokens
    vlm = HookedVLM(given.model, inputs=given.inputs)
    assert "its tensor is" in vlm.absent["hook_embed"]


class TokensFirst(LlamaDecoderLayer):
    """Its MLP works on [pos batch d_model]: with one prompt that looks like tokens behind an axis of one."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        given = self.post_attention_layernorm(hidden_states).transpose(0, 1).contiguous()
        return hidden_states + self.mlp(given).transpose(0, 1)


def test_tokens_that_two_prompts_would_scramble_are_absent() -> None:
    given = build("llama")
    given.model.model.layers[1].__class__ = TokensFirst
    vlm = HookedVLM(given.model, inputs=given.inputs)
    for leaf in ("hook_mlp_out", "mlp.hook_post"):
        assert "tokens of two prompts" in vlm.absent[f"blocks.1.{leaf}"]
        assert f"blocks.0.{leaf}" in vlm.hook_points


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ODD])
@torch.no_grad()
def test_each_row_of_two_prompts_is_what_it_is_alone(name: str) -> None:
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    odd = [point.name for point in vlm.hook_points.values() if point.relaid or point.moved]
    ids = given.inputs["input_ids"]
    other = {**given.inputs, "input_ids": torch.cat([ids[:, :-4], ids[:, -4:].flip(1)], dim=1)}
    both = {key: torch.cat([value, other[key]]) for key, value in given.inputs.items()}
    _, together = vlm.run_with_cache(both, odd)
    moved = 0.0
    for row, alone in enumerate((given.inputs, other)):
        _, cache = vlm.run_with_cache(alone, odd)
        for point in odd:
            size = cache[point].abs().max().clamp(min=1)
            error = (together[point].chunk(2)[row] - cache[point]).abs().max()
            assert error <= 1e-4 * size, point
            moved = max(moved, float((together[point].chunk(2)[1 - row] - cache[point]).abs().max() / size))
    assert moved > 1e-2


@torch.no_grad()
def test_keys_that_are_made_again_of_a_cache_are_shown_while_it_generates() -> None:
    """DeepSeek's values are assembled of latents: at each step of all tokens so far."""
    given = build("deepseek_v3")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    ids = given.inputs["input_ids"]
    seen: list[tuple[int, ...]] = []
    kwargs: Any = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    name = "blocks.0.attn.hook_v"
    hooked = vlm.generate(given.inputs, [(name, lambda a, hook: seen.append(tuple(a.shape)))], **kwargs)
    model: Any = given.model
    assert torch.equal(hooked, model.generate(**given.inputs, **kwargs))
    assert [shape[1] for shape in seen] == [ids.shape[1] + step for step in range(3)]
