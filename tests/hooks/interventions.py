"""The write half of the reference: the same edit made at any hook point with plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.hooks.reference import (
    Block,
    heads,
    mix,
    parts,
    result_of,
    scores_of,
    text_allowed,
    vision_allowed,
)

Edit = Callable[[Tensor], Tensor]


def _swap(x: Any, value: Tensor) -> Any:
    """A module's output with its hidden states replaced."""
    return (value, *x[1:]) if isinstance(x, tuple) else value


def edit_output(module: nn.Module, edit: Edit) -> list[Any]:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        if hasattr(output, "pooler_output"):
            output.pooler_output = edit(output.pooler_output)
            return output
        return _swap(output, edit(output[0] if isinstance(output, tuple) else output))

    # first in line: transformers records hidden states, which LLaVA's projector reads, by forward hooks of its own
    return [module.register_forward_hook(hook, prepend=True)]


def edit_input(module: nn.Module, edit: Edit, name: str = "hidden_states") -> list[Any]:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {name: edit(kwargs[name])}

    return [module.register_forward_pre_hook(hook, with_kwargs=True)]


def _edit_projection(block: Block, which: int, edit: Edit) -> list[Any]:
    n = block.n_heads if which == 0 else block.n_kv_heads
    if len(block.qkv) == 3:
        return edit_output(block.qkv[which], lambda x: edit(heads(x, n)).flatten(-2))

    def fused(x: Tensor) -> Tensor:
        chunks = list(x.chunk(3, dim=-1))
        chunks[which] = edit(heads(chunks[which], n)).flatten(-2)
        return torch.cat(chunks, dim=-1)

    return edit_output(block.qkv[0], fused)


def _edit_mid(block: Block, edit: Edit) -> list[Any]:
    """Both readers of the middle residual, the MLP and the sum, see the attention output, so it carries the edit."""
    pre: list[Tensor] = []
    keep = block.block.register_forward_pre_hook(
        lambda _, args, kwargs: pre.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    return [keep, *edit_output(block.attn, lambda out: edit(pre[-1] + out) - pre[-1])]


def _edit_result(block: Block, edit: Edit) -> list[Any]:
    z: list[Tensor] = []
    keep = block.out.register_forward_pre_hook(lambda _, args: z.append(heads(args[0], block.n_heads)))

    def add(out: Tensor) -> Tensor:
        result = result_of(z[-1], block.out)
        return out + (edit(result) - result).sum(-2)

    return [keep, *edit_output(block.attn, add)]


def _edit_attention(
    block: Block, point: str, edit: Edit, clean: Mapping[str, Tensor], allowed: Tensor
) -> list[Any]:
    """Attention worked out again from the clean values up to the edited point; its z enters the output projection."""
    values = dict(clean)
    if "attn.hook_rot_q" not in values:
        values["attn.hook_rot_q"], values["attn.hook_rot_k"] = values["attn.hook_q"], values["attn.hook_k"]
    values[point] = edit(values[point])
    if point != "attn.hook_pattern":
        if point != "attn.hook_attn_scores":
            scores = scores_of(values["attn.hook_rot_q"], values["attn.hook_rot_k"], allowed)
            values["attn.hook_attn_scores"] = scores
        values["attn.hook_pattern"] = values["attn.hook_attn_scores"].softmax(-1)
    z = mix(values["attn.hook_pattern"], values["attn.hook_v"])
    return edit_input(block.out, lambda old: z.reshape(old.shape))


def _install(model: Any, family: str, name: str, edit: Edit, clean: Any, inputs: Any) -> list[Any]:
    where = parts(model, family)
    ends = {"ln_final.hook_normalized": where.final_norm, "projector.hook_out": where.projector}
    if name in ends:
        return edit_output(ends[name], edit)
    if name == "hook_embed":
        return edit_input(where.language, edit, "inputs_embeds")
    vision = name.startswith("vision.")
    layer, point = name.removeprefix("vision.").removeprefix("blocks.").split(".", 1)
    if point == "hook_deepstack":
        return edit_output(where.deepstack[int(layer)], edit)
    block = (where.vision if vision else where.text)[int(layer)]
    projections = {"attn.hook_q": 0, "attn.hook_k": 1, "attn.hook_v": 2}
    if point in projections:
        return _edit_projection(block, projections[point], edit)
    simple: dict[str, Callable[[], list[Any]]] = {
        "hook_resid_pre": lambda: edit_input(block.block, edit),
        "hook_resid_mid": lambda: _edit_mid(block, edit),
        "hook_resid_post": lambda: edit_output(block.block, edit),
        "hook_attn_out": lambda: edit_output(block.attn, edit),
        "hook_mlp_out": lambda: edit_output(block.mlp, edit),
        "mlp.hook_post": lambda: edit_input(block.down, edit),
        "attn.hook_z": lambda: edit_input(block.out, lambda x: edit(heads(x, block.n_heads)).flatten(-2)),
        "attn.hook_result": lambda: _edit_result(block, edit),
    }
    if point in simple:
        return simple[point]()
    if vision:
        allowed = vision_allowed(model, family, inputs, int(layer))
    else:
        allowed = text_allowed(inputs["attention_mask"])
    prefix = name.removesuffix(point)
    own = {key.removeprefix(prefix): value for key, value in clean.items() if key.startswith(prefix)}
    return _edit_attention(block, point, edit, own, allowed)


@contextmanager
def intervention(
    model: Any,
    family: str,
    name: str,
    edit: Edit,
    clean: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Run the bare model with `edit` applied at hook point `name`.

    Rotated queries and keys, scores and patterns need the `clean` values of this very forward pass (from
    `reference`) and its `inputs`; every other point works in any forward pass, generation included.
    """
    handles = _install(model, family, name, edit, clean, inputs)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flip(activation, hook):
    """The activation, last axis reversed: written back twice it is what it was."""
    return activation.flip(-1)
