"""Anatomy by observation, on tiny models of every architecture: what is claimed of a block is held against plain hooks.

The plain hooks are written here and know nothing of `hooks`: they look at the modules that the anatomy names, and the
equations are solved anew. The default suite runs a handful of architectures; `make test-slow` runs all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import find_anatomy
from tests.architectures import ARCHITECTURES, build
from tests.architectures.shrink import IMAGE

DEFAULT = (
    "qwen3_5",
    "gemma3",
    "gemma4",
    "llama4",
    "mllama",
    "internvl+gpt_oss",
    "gpt2",
    "llava+cohere2",
    "granite",
)
"""Mixers, post-norms, layer scales, experts, cross-attention, sinks, Conv1D, parallel branches, multipliers."""
NO_LANGUAGE = {
    "pi0": "its logits are velocities of a robot's arm, made by a second decoder",
    "diffusion_gemma": "its logits are of a canvas beside the prompt",
}
UNSOLVED = {
    "glm5_next": "several parallel streams",
    "qwen4_exp": "several parallel streams",
    "gemma3n": "several parallel streams",
    "muse_spark": "its attention's output is gated before it is added",
    "inkling2": "convolutions between what is written and the stream",
}
"""Decoders whose stream alone is proved."""
STREAMS_FIRST = ("gemma3n",)
"""Their blocks are given parallel streams as the first axis; ours stand behind the tokens."""
EVERY = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in NO_LANGUAGE
]


@contextmanager
def plain_hooks(model: Any, outputs: set[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What goes into modules and comes out of them, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def first(values: Any) -> Tensor:
        values = values if isinstance(values, (tuple, list)) else [values]
        return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1)

    def look(path: str):
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            seen[path] = first([*args, *kwargs.values()]).clone(), first(output).clone()

        return hook

    handles = [model.get_submodule(p).register_forward_hook(look(p), with_kwargs=True) for p in outputs]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scaled(model: Any, coefficient: float | str, output: Tensor) -> Tensor:
    """An output times its coefficient, read off the model's parameters here."""
    if not isinstance(coefficient, str):
        return output * coefficient
    path = coefficient.removeprefix("tanh(").rstrip(")")
    owner, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(owner), name).detach()
    return output * (value.tanh() if coefficient.startswith("tanh(") else value)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_an_architecture_is_what_it_is_seen_to_do(name: str) -> None:
    given = build(name)
    model, inputs = given.model, given.inputs
    bare = model(**inputs).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = {path: module.forward.__func__ for path, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    vlm = HookedVLM(model, inputs=inputs)
    assert torch.equal(model(**inputs).logits, bare)

    blocks = vlm.anatomy.text.blocks
    if name not in UNSOLVED:
        assert all(block.writers for block in blocks), str(vlm)
    wanted = {b.path for b in blocks} | {w.module for b in blocks for w in b.writers}
    with plain_hooks(model, wanted) as seen:
        model(**inputs)
    largest = max(1.0, bare[bare > torch.finfo(bare.dtype).min].abs().max().item())
    for layer, block in enumerate(blocks):
        pre, post = seen[block.path]
        _, cache = vlm.run_with_cache(
            inputs, [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_post"]
        )
        shown = [one.movedim(0, 2) if name in STREAMS_FIRST else one for one in (pre, post)]
        assert torch.equal(cache["resid_pre", layer], shown[0])
        assert torch.equal(cache["resid_post", layer], shown[1])
        if not block.writers or any(writer.rest for writer in block.writers):
            continue
        parts = [scaled(model, w.coefficient, seen[w.module][1].reshape(pre.shape)) for w in block.writers]
        total = scaled(model, block.gain, pre + torch.stack(parts).sum(0))
        error, size = (total - post).abs().max().item(), post.abs().max().item()
        assert error <= 1e-5 * max(1.0, size)
        for part in parts:  # each is a hundred times what rounding could be
            assert part.abs().max().item() > 1e-3 * max(1.0, size)

    # Writing: a stream doubled by our hook is a stream doubled by a plain one, and matters.
    middle = blocks[len(blocks) // 2]
    point = f"blocks.{len(blocks) // 2}.hook_resid_post"
    ours = vlm.run_with_hooks(inputs, [(point, lambda a, hook: a * 2)]).logits
    again = vlm.run_with_hooks(inputs, [(point, lambda a, hook: a.clone())]).logits

    def double(module: Any, args: tuple, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    handle = model.get_submodule(middle.path).register_forward_hook(double)
    plain = model(**inputs).logits
    handle.remove()
    assert torch.equal(again, bare)
    assert (ours - plain).abs().max().item() <= 1e-5 * largest
    assert (ours - bare).abs().max().item() > 1e-3 * largest

    vlm.close()
    assert torch.equal(model(**inputs).logits, bare)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: module.forward.__func__ for path, module in model.named_modules()} == forwards


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_heads_are_those_of_the_attention_call(name: str) -> None:
    """z is what the output projection is given, and z through W_O, head by head, what is added of what it gives out."""
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    sites = [(layer, b.site) for layer, b in enumerate(vlm.anatomy.text.blocks) if b.site is not None]
    for layer, site in sites[:2]:
        writer = vlm.anatomy.text.blocks[layer].writer("attn")
        factor = writer.coefficient if writer and writer.module == writer.body else 1.0
        lead = f"blocks.{layer}.attn"
        if site.out is None or f"{lead}.hook_result" not in vlm.hook_points:
            continue
        with plain_hooks(given.model, {site.out}) as seen:
            _, cache = vlm.run_with_cache(given.inputs, [f"{lead}.hook_z", f"{lead}.hook_result"])
        z, out = seen[site.out]
        bias = getattr(given.model.get_submodule(site.out), "bias", None)
        out = scaled(given.model, factor, out)
        bias = 0 if bias is None else scaled(given.model, factor, bias)
        heads = cache[f"{lead}.hook_result"].sum(-2) + bias
        assert torch.equal(cache[f"{lead}.hook_z"].flatten(-2).reshape(z.shape), z)
        assert (heads.reshape(out.shape) - out).abs().max().item() <= 1e-5 * max(1.0, out.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_heads_through_the_output_matrix_are_what_attention_gives(name: str) -> None:
    """What goes into W_O, head by head through its rows, sums to what comes out."""
    given = build(name)
    model, inputs = given.model, given.inputs
    sites = [b.site for b in find_anatomy(model, inputs, IMAGE).text.blocks if b.site is not None]
    for site in sites[:2]:
        if site.out is None:
            continue
        with plain_hooks(model, {site.out}) as seen:
            model(**inputs)
        z, out = seen[site.out]
        assert z.shape[-1] == site.n_heads * site.d_value
        projection: Any = model.get_submodule(site.out)
        weight = projection.weight
        weight = weight if type(projection).__name__ == "Conv1D" else weight.T
        bias = getattr(projection, "bias", None)
        heads = torch.einsum(
            "...hd,hdm->...m", z.unflatten(-1, (site.n_heads, -1)), weight.unflatten(0, (site.n_heads, -1))
        )
        error = (heads + (0 if bias is None else bias) - out).abs().max().item()
        assert error <= 1e-5 * max(1.0, out.abs().max().item())
        assert heads.abs().max().item() > 1e-3 * max(1.0, out.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in {**NO_LANGUAGE, **UNSOLVED}])
def test_the_equations_hold_in_half_precision(name: str, dtype: torch.dtype) -> None:
    given = build(name, dtype=dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    assert all(block.writers for block in vlm.anatomy.text.blocks), str(vlm)
    exact = HookedVLM(build(name).model, inputs=build(name).inputs, check=False)
    for ours, theirs in zip(vlm.anatomy.text.blocks, exact.anatomy.text.blocks, strict=True):
        assert [(w.role, w.module) for w in ours.writers] == [(w.role, w.module) for w in theirs.writers]


@pytest.mark.parametrize("name", NO_LANGUAGE)
def test_what_is_no_language_model_opens_or_is_refused_in_one_sentence(name: str) -> None:
    given = build(name)
    try:
        HookedVLM(given.model, inputs=given.inputs)
    except FrankenlensError as refusal:
        told = str(refusal)
    else:
        told = type(given.model).__name__
    assert type(given.model).__name__ in told


@torch.no_grad()
def test_a_model_that_chooses_its_keys_shows_them_in_its_pattern() -> None:
    """Chosen keys are hidden by a mask made inside the block; keys that layers share are of the same tokens."""
    given = build("mistral_large4")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    assert [block.writers[0].role for block in vlm.anatomy.text.blocks] == ["attn"] * vlm.n_layers
    eager = build("mistral_large4").model
    eager.set_attn_implementation("eager")
    patterns = eager(**given.inputs, output_attentions=True).attentions
    _, cache = vlm.run_with_cache(
        given.inputs, [f"blocks.{n}.attn.hook_pattern" for n in range(vlm.n_layers)]
    )
    hidden = 0
    for layer, pattern in enumerate(patterns):
        assert (cache["pattern", layer] - pattern).abs().max().item() <= 1e-5
        hidden += int((pattern == 0).sum() - pattern.shape[1] * torch.ones_like(pattern[0, 0]).triu(1).sum())
    assert hidden > 100, "no key is left out"
