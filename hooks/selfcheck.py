"""Proofs, on the very model that was opened, that its hook points are what they say they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hooks.anatomy.precise import in_float32, runs_in_float32
from hooks.anatomy.watching import forward
from hooks.errors import FrankenlensError, one_line
from hooks.opened import Opened
from hooks.selfcheck_attention import SQUARES, Bare, bare_run, unlike_attention
from hooks.selfcheck_experts import unproved_contributions
from hooks.selfcheck_once import Once, at_once
from hooks.selfcheck_sums import split_from_the_stream, unequal
from hooks.selfcheck_writes import Seen, Writes, apart, looked_at, tolerance

__all__ = ["check_inputs", "opening_inputs", "self_check", "tolerance", "undisturbed", "zero_every_point"]


def check_inputs(processor: Any, side: int = 64) -> dict[str, Any]:
    """One prompt with one small random image, as tensors of this processor.

    Raises:
        FrankenlensError: there is no processor.
    """
    if processor is None:
        raise FrankenlensError(
            "the self-check needs a processor (or `inputs=` with an image); check=False skips it."
        )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": "a b"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        text = f"{getattr(processor, 'image_token', '')} a b".strip()
    return dict(processor(text=[text], images=[image], return_tensors="pt"))


def opening_inputs(model: Any, processor: Any) -> dict[str, Any]:
    """The prompt that a model is watched on: a small random image where there is a processor, else a few random words.

    Args:
        model: the model.
        processor: its processor, its tokenizer, or None.

    Raises:
        FrankenlensError: none can be made.
    """
    try:
        return check_inputs(processor) if hasattr(processor, "image_processor") else _words(model)
    except FrankenlensError:
        raise
    except Exception as error:
        maker = type(model if processor is None else processor).__name__
        raise FrankenlensError(
            f"no prompt to open {type(model).__name__} with can be made with {maker}: {type(error).__name__}: "
            f"{one_line(error)} Give processor tensors of your own: HookedVLM(model, processor, "
            "inputs=...)."
        ) from error


def _words(model: Any) -> dict[str, Any]:
    words = model.get_input_embeddings().weight.shape[0]
    special = {
        getattr(model.config, f"{name}_token_{kind}", None)
        for name in ("image", "video")
        for kind in ("id", "index")
    }
    ids = torch.randint(0, words, (64,), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([i for i in ids.tolist() if i not in special])[None, :24]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Checked(NamedTuple):
    """The absent points, name → reason.

    Attributes:
        absent: all of them.
        by_structure: those that no model of this structure has; None where a point did not hold as it was expected to,
            so that nothing is known of other models.
    """

    absent: dict[str, str]
    by_structure: dict[str, str] | None


def self_check(vlm: Opened, inputs: Mapping[str, Any]) -> Checked:
    """Prove every listed point: written back it moves nothing, it has a gradient, and the stream is its writers' sum.

    What is written is proved on the model as it is, by its bits; equations in float32 too, on its own weights.

    Raises:
        FrankenlensError: the decoder's residual stream cannot be read and written.
    """
    with undisturbed(vlm.model):
        bare = bare_run(vlm, inputs)
        proof = Writes(vlm, inputs, bare.logits)
        shown = [name for name, point in vlm.hook_points.items() if point.place != "expert_out"]
        once = at_once(vlm, inputs, bare, shown)
        if once is None:
            seen, absent = proof.sound([name for name in shown if vlm.hook_points[name].leaf not in SQUARES])
            _require_stream(vlm, absent)
            absent |= unequal(vlm, seen)
        else:
            seen, absent = once.seen, {}
        absent |= inexact(vlm, inputs, seen, bare, once)
        structure = None if once is None else dict(absent)
        known = None if once is None else once.live
        absent |= without_effect(proof, [name for name in shown if name not in absent], seen, known)
        live = {name for name in shown if name not in absent}
        absent |= unproved_contributions(vlm, inputs, live, bare.logits, proof.allowed)
    return Checked({name: absent[name] for name in vlm.hook_points if name in absent}, structure)


def _require_stream(vlm: Opened, absent: Mapping[str, str]) -> None:
    stream = [f"blocks.{layer}.hook_resid_{end}" for layer in range(vlm.n_layers) for end in ("pre", "post")]
    if lost := [name for name in stream if name in absent]:
        raise FrankenlensError(
            f"self-check of {type(vlm.model).__name__}: {lost[0]} cannot be read and written: {absent[lost[0]]}"
        )


def inexact(
    vlm: Opened, inputs: Mapping[str, Any], seen: Seen, bare: Bare, once: Once | None
) -> dict[str, str]:
    """Points that are not what their equations say in float32, and ways of attention that are not the model's.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        seen: what stands at streams and writers that can be written back, in the model's own precision.
        bare: the model without hooks.
        once: what one run has proved in the model's own precision.
    """
    with in_float32(vlm.model, runs_in_float32(vlm.anatomy)) as precision:
        given = precision.given(inputs)
        found = unequal(vlm, looked_at(vlm, given, list(seen))) if precision.acts else {}
        found |= split_from_the_stream(vlm, given, [name for name in seen if name not in found])
    return found | unlike_attention(vlm, inputs, bare.outs) if once is None else found


def without_effect(
    proof: Writes, names: Sequence[str], seen: Seen, live: frozenset[str] | None = None
) -> dict[str, str]:
    """The points that the logits do not depend on, by their gradient; where none can be taken, by zeroing them.

    Args:
        proof: the model and its logits.
        names: the points.
        seen: what stands at them.
        live: those with a gradient, where that is known; each of the others has fired.
    """
    vlm = proof.vlm
    fired, found = set(names), set()
    try:
        if live is None:
            live, fired = proof.with_gradients(names, seen)
        found |= live
        # A router whose weights are normalized over one expert decides, without a gradient.
        left = [n for n in names if n not in found and vlm.hook_points[n].place == "router_logits"]
    except torch.OutOfMemoryError:  # says nothing about a point
        raise
    except (RuntimeError, NotImplementedError):
        left = list(names)
    found |= {name for name, change in _changes(vlm, proof.inputs, left, proof.bare).items() if change > 0}
    return {name: _reason(vlm, name, name in fired) for name in names if name not in found}


def zero_every_point(vlm: Opened, inputs: Mapping[str, Any], progress: bool = True) -> dict[str, float]:
    """Zero each point in turn; name → largest change of a logit. Raises if one changes nothing."""
    with undisturbed(vlm.model), torch.no_grad():
        bare = _logits(vlm, inputs)
        bar = tqdm(vlm.hook_points, desc="zeroing every point", leave=False, delay=2, disable=not progress)
        changes = _changes(vlm, inputs, bar, bare)
    inert = [name for name, change in changes.items() if not change > 0]
    if inert:
        raise FrankenlensError(f"zeroing these points changes nothing: {', '.join(inert)}")
    return changes


@torch.no_grad()
def _changes(
    vlm: Opened, inputs: Mapping[str, Any], names: Iterable[str], bare: Float[Tensor, "batch pos vocab"]
) -> dict[str, float]:
    """Name → largest change of a logit when that point is zeroed."""
    changes = {}
    for name in names:
        with vlm.hooks([(name, lambda activation, hook: torch.zeros_like(activation))]):
            changes[name] = apart(_logits(vlm, inputs), bare)
    return changes


def _logits(vlm: Opened, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    return forward(vlm.model, inputs)


def _reason(vlm: Opened, name: str, fired: bool) -> str:
    if not fired:
        return "it does not fire in a forward pass with an image; this architecture computes it elsewhere."
    layer = getattr(vlm.model.config, "vision_feature_layer", None)
    if name.startswith("vision.") and layer not in (None, -1):
        return f"the projector reads hidden state {layer} of the vision tower (vision_feature_layer), not this one."
    return "no gradient of the logits reaches it: this architecture (or a zero gate in these weights) ignores it."


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, and afterwards the training flags and the M-RoPE offset that a forward pass leaves behind."""
    training = {module: module.training for module in model.modules()}
    stateful = [module for module in model.modules() if hasattr(module, "rope_deltas")]
    offsets = [module.rope_deltas for module in stateful]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, offset in zip(stateful, offsets, strict=True):
            module.rope_deltas = offset
