"""What an analysis may ask of an opened model, and the sentence that says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hooks.anatomy import Anatomy, Block
from hooks.errors import FrankenlensError, nearest

Missing = Callable[[Anatomy, Mapping[str, object]], str]
"""What is missing, in words; "" where nothing is."""


def _every(what: str, has: Callable[[Block], bool]) -> Missing:
    def missing(anatomy: Anatomy, points: Mapping[str, object]) -> str:
        without = [str(layer) for layer, block in enumerate(anatomy.text.blocks) if not has(block)]
        return f"{what} in its decoder blocks {', '.join(without)}" if without else ""

    return missing


def _some(what: str, has: Callable[[Block], bool]) -> Missing:
    def missing(anatomy: Anatomy, points: Mapping[str, object]) -> str:
        return "" if any(has(block) for block in anatomy.text.blocks) else f"{what} in any decoder block"

    return missing


def _points(what: str, leaf: str) -> Missing:
    def missing(anatomy: Anatomy, points: Mapping[str, object]) -> str:
        without = [
            str(layer) for layer in range(len(anatomy.text.blocks)) if f"blocks.{layer}.{leaf}" not in points
        ]
        return f"{what} in its decoder blocks {', '.join(without)}" if without else ""

    return missing


def _part(what: str, name: str) -> Missing:
    def missing(anatomy: Anatomy, points: Mapping[str, object]) -> str:
        why = anatomy.absent.get(name)
        return "" if getattr(anatomy, name) else f"{what}" + (f" ({why})" if why else "")

    return missing


def _additive(anatomy: Anatomy, points: Mapping[str, object]) -> str:
    whole = "a stream that is the sum of known writers"
    each = _every(whole, lambda block: bool(block.writers) and block.gain == 1.0)
    why = anatomy.absent.get("sum")
    return each(anatomy, points) or (f"{whole} ({why})" if why else "")


def _vision(anatomy: Anatomy, points: Mapping[str, object]) -> str:
    return "" if anatomy.vision.blocks else "vision tower that was seen to run"


def _positions(anatomy: Anatomy, points: Mapping[str, object]) -> str:
    why = anatomy.absent.get("positions")
    return f"logits at every token of input_ids ({why})" if why else ""


def _lens(anatomy: Anatomy, points: Mapping[str, object]) -> str:
    if not anatomy.unembed:
        return f"unembedding ({anatomy.absent.get('unembed')})"
    return "" if anatomy.final_norm else f"final norm ({anatomy.absent.get('ln_final')})"


CAPABILITIES: Mapping[str, Missing] = {
    "stream": lambda anatomy, points: "",
    "positions": _positions,
    "writers": _every("known writers", lambda block: bool(block.writers)),
    "additive blocks": _additive,
    "plain blocks": _every("attention and then an MLP, each behind its own norm,", lambda block: block.plain),
    "attention": _every("attention", lambda block: block.site is not None),
    "some attention": _some("attention", lambda block: block.site is not None),
    "pattern": _points("attention pattern that can be read and written", "attn.hook_pattern"),
    "head z": _points("z (what heads give out)", "attn.hook_z"),
    "head result": _points("per-head result", "attn.hook_result"),
    "some head result": _some("per-head result", lambda block: bool(block.site and block.site.out)),
    "mlp": _every("MLP", lambda block: block.writer("mlp", "moe") is not None),
    "neurons": _points("neurons (a dense MLP)", "mlp.hook_post"),
    "experts": _some("experts", lambda block: block.writer("moe") is not None),
    "mixer": _some("mixer (linear attention, SSM, convolution)", lambda b: b.writer("mixer") is not None),
    "cross attention": _some("cross-attention", lambda block: block.writer("cross_attn") is not None),
    "vision": _vision,
    "projector": _part("projector that could be told apart", "projector"),
    "lens": _lens,
}


def missing(anatomy: Anatomy, points: Mapping[str, object], capability: str) -> str:
    """What a model lacks for a capability, in words; "" where it lacks nothing.

    Raises:
        FrankenlensError: there is no such capability.
    """
    if capability not in CAPABILITIES:
        hint = nearest(capability, CAPABILITIES)
        raise FrankenlensError(
            f"{capability!r} is no capability; choose of {', '.join(CAPABILITIES)}. {hint}".strip()
        )
    return CAPABILITIES[capability](anatomy, points)
