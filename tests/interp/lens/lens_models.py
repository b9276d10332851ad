"""Tiny models of every family with prompts of different length for the tests of the lenses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hooks import HookedVLM
from interp.prompts import Prompt, PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from tests.families import TinyVLM, tiny

TRACES = ("<think> red 3 + blue 2 </think> answer 5", "<think> red 3 </think> answer 3")


def opened(made: TinyVLM) -> HookedVLM:
    """A tiny model, opened."""
    return HookedVLM(made.model, made.processor, inputs=made.inputs())


def prompts_of(made: TinyVLM, traces: tuple[str, ...] = TRACES) -> list[Prompt]:
    """Prompts with two images of different size each, a question of growing length, and a trace."""
    builder = PromptBuilder(made.processor, TraceFormat())
    images = made.images(2 * len(traces), seed=4)
    return [
        builder.build(
            Example(f"e{row}", tuple(images[2 * row : 2 * row + 2]), "how many red " * (row + 1), "3"), trace
        )
        for row, trace in enumerate(traces)
    ]


def family(name: str, seed: int = 0) -> tuple[TinyVLM, HookedVLM, list[Prompt]]:
    """A model of a family, opened, and prompts for it."""
    made = tiny(name, seed)
    return made, opened(made), prompts_of(made)


@torch.no_grad()
def bare(model: Any, prompt: Prompt) -> tuple[Tensor, list[Tensor]]:
    """Logits [pos vocab] of the bare model, and what each decoder block and the final norm read [pos d_model]."""
    seen: list[Tensor] = []
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in (*text.layers, text.norm)]
    logits = model(**prompt.inputs, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, seen


@torch.no_grad()
def rms_lens(model: Any, resid: Tensor) -> Tensor:
    """Root-mean-square norm and unembedding, written out."""
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    scale = torch.rsqrt(resid.double().pow(2).mean(-1, keepdim=True) + text.norm.variance_epsilon)
    return (resid.double() * scale * text.norm.weight.double()) @ model.lm_head.weight.double().T
