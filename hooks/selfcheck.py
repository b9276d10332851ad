"""Proofs, on the very model that was opened, that its hook points are what they say they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hooks.anatomy import Block
from hooks.anatomy.watching import forward
from hooks.anatomy.writers import coefficient_of
from hooks.errors import FrankenlensError
from hooks.opened import Opened
from hooks.selfcheck_experts import unproved_contributions


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


def tolerance(logits: Float[Tensor, "..."]) -> float:
    """1e-5 x max(1, largest logit) in fp32; in a half precision, sixteen of its own rounding steps."""
    scale = max(1.0, logits.abs().max().item())
    return scale * (
        1e-5 if logits.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(logits.dtype).eps
    )


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
            f"{' '.join(str(error).split())[:300]} Give processor tensors of your own: HookedVLM(model, processor, "
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


def self_check(vlm: Opened, inputs: Mapping[str, Any]) -> dict[str, str]:
    """Prove every listed point: written back it moves nothing, it has a gradient, and the stream is its writers' sum.

    Returns:
        The absent points, name → reason.

    Raises:
        FrankenlensError: the decoder's residual stream cannot be read and written.
    """
    with undisturbed(vlm.model):
        with torch.no_grad():
            bare = _logits(vlm, inputs)
        proof = _Proof(vlm, inputs, bare)
        shown = [name for name, point in vlm.hook_points.items() if point.place != "expert_out"]
        names, absent = proof.sound(shown)
        logits, taps = proof.written_back(names)
        stream = [
            f"blocks.{layer}.hook_resid_{end}" for layer in range(vlm.n_layers) for end in ("pre", "post")
        ]
        if lost := [name for name in stream if name in absent]:
            raise FrankenlensError(
                f"self-check of {type(vlm.model).__name__}: {lost[0]} cannot be read and written: {absent[lost[0]]}"
            )
        live = _live(proof, logits, taps)
        # A router whose weights are normalized over one expert decides, without a gradient.
        deciding = [n for n in names if n not in live and vlm.hook_points[n].place == "router_logits"]
        live |= {name for name, change in _changes(vlm, inputs, deciding, bare).items() if change > 0}
        absent |= {name: _reason(vlm, name, name in taps) for name in names if name not in live}
        absent |= _unequal(vlm, taps, absent)
        absent |= _split_from_the_stream(vlm, inputs, [name for name in names if name not in absent])
        absent |= unproved_contributions(vlm, inputs, live, bare, proof.allowed)
    return {name: absent[name] for name in vlm.hook_points if name in absent}


class _Proof:
    """Every point's own value written back, all together or some alone."""

    def __init__(
        self, vlm: Opened, inputs: Mapping[str, Any], bare: Float[Tensor, "batch pos vocab"]
    ) -> None:
        self.vlm, self.inputs, self.bare = vlm, inputs, bare
        self.allowed = tolerance(bare)
        self._widened = False

    def written_back(
        self, names: Sequence[str]
    ) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, Tensor]]:
        """Logits with gradients, and what stood at each point.

        Raises:
            FrankenlensError: they moved.
        """
        taps: dict[str, Tensor] = {}

        def write_back(activation: Tensor, hook: Any) -> Tensor:
            own = activation.clone()
            taps[hook.name] = own if own.requires_grad else own.requires_grad_()
            return own

        with torch.enable_grad(), self.vlm.hooks([(name, write_back) for name in names]):
            logits = _logits(self.vlm, self.inputs)
        moved = (logits.detach() - self.bare).abs().max().item()
        if moved > self.allowed and not self._widened:
            # Some models magnify rounding; dense attention rounds otherwise than SDPA.
            self._widened = True
            self.allowed = max(self.allowed, 4 * rounding_spread(self.vlm, self.inputs, self.bare))
        if not moved <= self.allowed:
            raise FrankenlensError(
                f"writing its own value back moved the logits by {moved:.2e} (allowed {self.allowed:.2e})."
            )
        return logits, taps

    def sound(self, names: list[str]) -> tuple[list[str], dict[str, str]]:
        """The points that can be written back, and the others with the reason.

        Kinds that cannot are found by halving; of each, single points.

        Raises:
            FrankenlensError: each can, but all together they cannot.
        """
        if not (why := self._fails(names)):
            return names, {}
        absent: dict[str, str] = {}
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(re.sub(r"\d+", "", name), []).append(name)
        for alike in self._failing_kinds(list(kinds.values())):
            absent |= self._failing_points(alike)
        left = [name for name in names if name not in absent]
        if (why and not absent) or (why := self._fails(left)):
            raise FrankenlensError(f"self-check of {type(self.vlm.model).__name__}: {why}")
        return left, absent

    def _failing_kinds(self, kinds: list[list[str]]) -> list[list[str]]:
        """Of kinds that fail together, those that fail by themselves: they are few."""
        if len(kinds) == 1:
            return kinds
        middle = len(kinds) // 2
        failing = [
            half for half in (kinds[:middle], kinds[middle:]) if self._fails([n for k in half for n in k])
        ]
        return [kind for half in failing for kind in self._failing_kinds(half)]

    def _failing_points(self, alike: list[str]) -> dict[str, str]:
        """Of points of one kind that fail together, those that fail alone: one, or most of them."""
        middle = len(alike) // 2
        failing = [half for half in (alike[:middle], alike[middle:]) if half and self._fails(half)]
        if len(failing) == 1 and 1 < len(failing[0]) < len(alike):
            return self._failing_points(failing[0])
        return {name: reason for half in failing for name in half if (reason := self._fails([name]))}

    def _fails(self, names: Sequence[str]) -> str:
        try:
            self.written_back(names)
        except torch.OutOfMemoryError:  # says nothing about a point
            raise
        except Exception as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        return ""


def _live(proof: _Proof, logits: Float[Tensor, "batch pos vocab"], taps: Mapping[str, Tensor]) -> set[str]:
    """The points with a gradient of the logits; where none can be taken, those that move the logits."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(logits.shape, generator=generator).to(logits.device, logits.dtype)
    try:
        gradients = torch.autograd.grad(
            logits, list(taps.values()), grad_outputs=direction, allow_unused=True
        )
    except (RuntimeError, NotImplementedError):
        changes = _changes(proof.vlm, proof.inputs, list(taps), proof.bare)
        return {name for name, change in changes.items() if change > 0}
    return {name for name, grad in zip(taps, gradients, strict=True) if grad is not None and bool(grad.any())}


@torch.no_grad()
def rounding_spread(vlm: Opened, inputs: Mapping[str, Any], bare: Float[Tensor, "batch pos vocab"]) -> float:
    """How far the logits move when every residual stream before a block is off by one step of its own rounding."""
    generator = torch.Generator().manual_seed(0)

    def off_by_one_step(activation: Tensor, hook: Any) -> Tensor:
        signs = torch.randint(0, 2, activation.shape, generator=generator).to(activation) * 2 - 1
        return activation * (1 + signs * torch.finfo(activation.dtype).eps)

    names = [name for name in vlm.hook_points if name.endswith("hook_resid_pre")]
    with vlm.hooks([(name, off_by_one_step) for name in names]):
        return (_logits(vlm, inputs) - bare).abs().max().item()


@torch.no_grad()
def _unequal(vlm: Opened, taps: Mapping[str, Tensor], absent: Mapping[str, str]) -> dict[str, str]:
    """Points of blocks whose stream is not the sum of what is read at them; a wrong place cannot be."""
    found: dict[str, str] = {}
    for prefix, tower in vlm.anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            name = f"{prefix}blocks.{layer}"
            ends = [f"{name}.hook_resid_{end}" for end in ("pre", "post")]
            writers = [point for point in vlm.hook_points if _is_writer(point, name)]
            if not writers or any(point not in taps for point in (*ends, *writers)):
                continue
            own = [taps[point].reshape(taps[ends[0]].shape) for point in writers]
            expected = _gained(vlm, block, taps[ends[0]] + sum(own[1:], own[0]))
            error = (taps[ends[1]] - expected).abs().max().item()
            if not error <= tolerance(expected):
                why = f"the stream of {name} is not the sum of what was read (off by {error:.2e})."
                found |= dict.fromkeys(writers, why)
            found |= _unlike_neurons(vlm, taps, name, block)
    return found


def _gained(vlm: Opened, block: Block, stream: Tensor) -> Tensor:
    """A block's sum, times what it multiplies it with."""
    gain = coefficient_of(vlm.model, block.gain)
    return stream * (gain.to(stream) if isinstance(gain, Tensor) else gain)


def _is_writer(point: str, block: str) -> bool:
    leaf = point.removeprefix(f"{block}.")
    return (
        leaf != point and re.fullmatch(r"hook_(attn|cross_attn|mixer|mlp|rest)_out(_\d+)?", leaf) is not None
    )


def _unlike_neurons(vlm: Opened, taps: Mapping[str, Tensor], name: str, block: Block) -> dict[str, str]:
    """`hook_post` must be what the MLP's last layer reads."""
    writer, post, out = block.writer("mlp"), f"{name}.mlp.hook_post", f"{name}.hook_mlp_out"
    if writer is None or writer.last is None or writer.module != writer.body or writer.coefficient != 1.0:
        return {}
    if post not in taps or out not in taps:
        return {}
    last: Any = vlm.module(writer.last)
    expected = last.forward(taps[post])
    error = (taps[out] - expected.reshape(taps[out].shape)).abs().max().item()
    return (
        {} if error <= tolerance(expected) else {post: f"{writer.last} does not make the MLP's output of it."}
    )


@torch.no_grad()
def _split_from_the_stream(vlm: Opened, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Streams inside a block that, written, reach only what reads them there, and not the stream itself."""
    inner = [name for name in names if ".hook_resid_mid" in name]
    if not inner:
        return {}
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Tensor] = {}

    def shifted(activation: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(activation.shape, generator=generator).to(activation)
        seen[hook.name] = activation + 0.1 * activation.std() * noise
        return seen[hook.name]

    def look(activation: Tensor, hook: Any) -> None:
        seen[hook.name] = activation.clone()

    blocks = {name.rpartition(".")[0] for name in inner}
    read = [name for name in names if name.rpartition(".")[0] in blocks and name not in inner]
    with vlm.hooks([*((name, shifted) for name in inner), *((name, look) for name in read)]):
        _logits(vlm, inputs)
    found: dict[str, str] = {}
    order = list(vlm.hook_points)
    for name in inner:
        block = name.rpartition(".")[0]
        after = [n for n in order[order.index(name) + 1 :] if _is_writer(n, block)]
        end = f"{block}.hook_resid_post"
        if end not in seen or any(n not in seen for n in after) or any(n in inner for n in after):
            continue
        later = [n for n in inner if n.startswith(f"{block}.") and order.index(n) > order.index(name)]
        if later:  # what is written there stands for everything before it
            continue
        own = vlm.anatomy.towers[block.rpartition("blocks.")[0]].blocks[int(block.rpartition(".")[2])]
        expected = _gained(vlm, own, seen[name] + sum(seen[n].reshape(seen[name].shape) for n in after))
        error = (seen[end] - expected).abs().max().item()
        if not error <= tolerance(expected):
            found[name] = (
                f"what is written here does not reach the stream behind the block (off by {error:.2e})."
            )
    return found


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
            changes[name] = (_logits(vlm, inputs) - bare).abs().max().item()
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
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, offset in zip(stateful, offsets, strict=True):
            module.rope_deltas = offset
