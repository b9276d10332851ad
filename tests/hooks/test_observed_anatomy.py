"""Anatomy by observation, on tiny models of every architecture: what is claimed of a block is held against plain hooks.

The plain hooks are written here and know nothing of `hooks`: they look at the modules that the anatomy names, and the
equations are summed anew. The default suite runs a handful of architectures; `make test-slow` runs all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks.anatomy.drawing import drawn
from hooks.anatomy.observed import observed_anatomy
from tests.architectures import ARCHITECTURES, build
from tests.architectures.shrink import IMAGE

DEFAULT = ("qwen3_5", "gemma3", "gemma4", "mllama", "internvl+gpt_oss", "gpt2", "llava+cohere2", "granite")
"""Mixers, post-norms, gains, cross-attention, layer scales and experts, Conv1D, parallel branches, multipliers."""
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
EVERY = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in NO_LANGUAGE
]


@contextmanager
def plain_hooks(model: Any, paths: set[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What goes into modules and comes out of them, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def first(values: Any) -> Tensor:
        values = values if isinstance(values, tuple | list) else [values]
        return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1)

    def look(path: str):
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            seen[path] = first([*args, *kwargs.values()]).clone(), first(output).clone()

        return hook

    handles = [model.get_submodule(p).register_forward_hook(look(p), with_kwargs=True) for p in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scaled(model: Any, coefficient: float | str, output: Tensor) -> Tensor:
    """An output times its coefficient, read off the model's parameters here."""
    if not isinstance(coefficient, str):
        return output * coefficient
    owner, _, name = coefficient.removeprefix("tanh(").rstrip(")").rpartition(".")
    value = getattr(model.get_submodule(owner), name).detach()
    return output * (value.tanh() if coefficient.startswith("tanh(") else value)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_the_stream_is_the_sum_of_what_blocks_are_seen_to_add(name: str) -> None:
    given = build(name)
    model, inputs = given.model, given.inputs
    bare = model(**inputs).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    anatomy = observed_anatomy(model, inputs, IMAGE)
    assert torch.equal(model(**inputs).logits, bare)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    blocks = anatomy.text.blocks
    if name not in UNSOLVED:
        assert all(block.writers for block in blocks), drawn(anatomy)
    with plain_hooks(model, {b.path for b in blocks} | {w.module for b in blocks for w in b.writers}) as seen:
        model(**inputs)
    for block in blocks:
        pre, post = seen[block.path]
        if not block.writers or any(writer.rest for writer in block.writers):
            continue
        parts = [scaled(model, w.coefficient, seen[w.module][1].reshape(pre.shape)) for w in block.writers]
        total = scaled(model, block.gain, pre + torch.stack(parts).sum(0))
        size = max(1.0, post.abs().max().item())
        assert (total - post).abs().max().item() <= 1e-5 * size
        for part in parts:  # each is a hundred times what rounding could be
            assert part.abs().max().item() > 1e-3 * size


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_attention_is_where_it_is_seen(name: str) -> None:
    """Zeroing what goes into W_O is zeroing all heads; a head's own rows of q's projection move that head's query."""
    given = build(name)
    model, inputs = given.model, given.inputs
    sites = [b.site for b in observed_anatomy(model, inputs, IMAGE).text.blocks if b.site is not None]
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
def test_the_writers_are_the_same_in_half_precision(name: str, dtype: torch.dtype) -> None:
    given, exact = build(name, dtype=dtype), build(name)
    ours = observed_anatomy(given.model, given.inputs, IMAGE).text.blocks
    theirs = observed_anatomy(exact.model, exact.inputs, IMAGE).text.blocks
    for own, other in zip(ours, theirs, strict=True):
        assert [(w.role, w.module) for w in own.writers] == [(w.role, w.module) for w in other.writers]
