"""Vision-token swap: an answer is generated while some layers see another image (2602.12395, functional localization).

Target and source are one question about two images of equal size, so that the visual tokens of both stand at the same
positions. In the layers of the swap, the target's text reads the source's visual states:

- `kv`: keys (before the rotary embedding) and values of the visual tokens, written once, during prefill; the KV cache
  then holds them for the whole generation, and its length stays what it was.
- `resid`: the visual tokens' residual stream before each of the layers.

After the last layer of the swap the visual tokens' residual stream is the target's own again (with `kv` too: their own
queries have seen the source's keys). With one image and equal prefixes the two are then the same intervention, which
the tests show.

A suffix (every layer from k on) is what the paper's released code swaps: the change rate CR(k) then falls with k. At
k = 0 it is running the source image. Where the visual tokens stand in one block it is the same as the source's residual
stream put in once, before layer k, with the DeepStack states that Qwen3-VL adds behind layer k and later ones; where
text stands between them (several images, the tiles of SmolVLM and Idefics3), that text is the target's and is not
swapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import in_parts
from hooks.engine import HookContext, HookFunction
from interp import regions
from interp.localization.outcomes import NOT_COUNTED, OUTCOMES, Grader, outcome, same_answer
from interp.metrics.logits import sparing_logits
from interp.pair.generation import greedy_batch, rows_fitting
from interp.prompts import Prompt, PromptBatch, PromptBuilder, collate
from interp.prompts.pairing import image_shapes
from interp.questions.examples import Example, cluster_of
from interp.questions.grading import Ungraded, grade
from interp.results.store import Store, fingerprint, part, under

WHAT = ("kv", "resid")
Hooks = list[tuple[str, HookFunction]]


@dataclass(frozen=True)
class Swap:
    """The layers (first and last, inclusive) that see the source's image, and through what.

    Raises:
        FrankenlensError: an unknown `what`, or layers that run backwards.
    """

    first: int
    last: int
    what: str = "kv"

    def __post_init__(self) -> None:
        if self.what not in WHAT or not 0 <= self.first <= self.last:
            raise FrankenlensError(
                f"{self}: layers go upwards from 0, and what is swapped is one of {', '.join(WHAT)}"
            )

    @property
    def name(self) -> str:
        """E.g. `kv 3-7`."""
        return f"{self.what} {self.first}-{self.last}"


def singles(n_layers: int, what: str = "kv") -> list[Swap]:
    """One swap per layer."""
    return [Swap(*run, what) for run in regions.singles(n_layers)]


def suffixes(n_layers: int, what: str = "kv") -> list[Swap]:
    """For each layer k, every layer from k on: the released code's way.

    Example:
        >>> [swap.name for swap in fl.localization.suffixes(3)]
        ['kv 0-2', 'kv 1-2', 'kv 2-2']
    """
    return [Swap(*run, what) for run in regions.suffixes(n_layers)]


def windows(n_layers: int, width: int, what: str = "kv") -> list[Swap]:
    """Every run of `width` neighbouring layers.

    Raises:
        FrankenlensError: there are not so many layers.

    Example:
        >>> [swap.name for swap in fl.localization.windows(4, 3)]
        ['kv 0-2', 'kv 1-3']
    """
    return [Swap(*run, what) for run in regions.windows(n_layers, width)]


def vision_swap(
    vlm: HookedVLM,
    builder: PromptBuilder,
    pairs: Sequence[tuple[Example, Example]],
    swaps: Sequence[Swap],
    *,
    grader: Grader = grade,
    resize: bool = False,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
    keep: Store | None = None,
) -> xr.Dataset:
    """What becomes of the answer when some layers see the source image, for every pair and swap.

    Args:
        vlm: the model.
        builder: makes its prompts.
        pairs: (target, source): the same question about two images.
        swaps: what is swapped where.
        grader: whether an answer is right for an example.
        resize: bring the source image to the target's size where they differ; by default such a pair is left out.
        max_new_tokens: longest answer.
        batch_size: pairs that run together.
        progress: show a bar.
        keep: where it is kept what is written, swap by swap.

    Returns:
        outcome [swap example], as numbers of `OUTCOMES` ("source": the source's answer was taken; "broke": some third
        answer, one that cannot be read, or none; "unchanged": the model's own), NaN where left out: for what the
        unchanged model answered, never for what an intervention did; text [swap example]; fault [swap example] (why
        the grader cannot read an answer, "" where it can); clean [side example]; differs [example] (the two clean
        answers do); why [example] ("" where a pair counts).

    Raises:
        FrankenlensError: no pairs, no swaps, or a swap of layers that the model does not have; before anything runs.
    """
    _require(vlm, pairs, swaps)
    prompts, why = paired_prompts(builder, pairs, resize)
    text = np.full((len(swaps), len(pairs)), "", dtype=object)
    clean = np.full((2, len(pairs)), None, dtype=object)
    found = np.full((len(swaps), len(pairs)), np.nan)
    fault, differs = np.full(found.shape, "", dtype=object), np.zeros(len(pairs), dtype=bool)
    rows = sorted(prompts, key=lambda row: len(prompts[row][0]))
    both = [one for row in rows for one in prompts[row]]
    size = rows_fitting([vlm, vlm], both, max_new_tokens, batch_size)  # targets, and what sources leave
    total = -(-len(rows) // size) * (len(swaps) + 2)
    with tqdm(total=total, desc="swap", disable=not progress, delay=1) as bar:

        def measure(some: Sequence[int]) -> None:
            """Fills in these rows."""
            job = _Job(vlm, tuple([prompts[row][side] for row in some] for side in (0, 1)), swaps)
            kept = under(keep, f"{some[0]:06d}-{len(some)}")
            for side, name in enumerate(("target", "source")):
                write = partial(job.clean, side, max_new_tokens)
                written = part(kept, name, write, job.of(max_new_tokens))
                clean[side, some] = _answers(job.prompts[side], written)
                bar.update()
            for row in some:
                differs[row], why[row] = _compared(clean[0, row], clean[1, row], pairs[row][0], grader)
            for number, swap in enumerate(swaps):
                write = partial(job.swapped, swap, max_new_tokens)
                written = part(kept, f"{number:06d}", write, job.of(max_new_tokens, swap.name))
                for row, answer in zip(some, _answers(job.prompts[0], written), strict=True):
                    text[number, row] = "" if answer is None else answer
                    if not why[row]:
                        score = _scored(answer, clean[0, row], clean[1, row], pairs[row], grader)
                        found[number, row], fault[number, row] = score
                bar.update()

        list(in_parts(rows, size, measure))
    values = {
        "outcome": (("swap", "example"), found),
        "text": (("swap", "example"), text.astype(str)),
        "fault": (("swap", "example"), fault.astype(str)),
        "clean": (("side", "example"), np.where(clean == None, "", clean).astype(str)),  # noqa: E711
        "differs": ("example", differs),
        "why": ("example", np.array(why, dtype=str)),
    }
    return _dataset(values, pairs, swaps)


def swap_hooks(
    vlm: HookedVLM,
    swap: Swap,
    batch: PromptBatch,
    own: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
) -> Hooks:
    """The hooks of one swap; they act on the prefill of `batch` alone.

    Args:
        vlm: the model.
        swap: what is swapped.
        batch: the target prompts.
        own, source: clean activations of both batches, as `names_of` lists them.
    """
    mask = batch.mask("image")
    hooks: Hooks = []
    for layer in range(swap.first, swap.last + 1):
        for name in _names(swap.what, layer):
            hooks.append((name, _write(mask, source[name])))
    if swap.last + 1 < vlm.n_layers:
        name = f"blocks.{swap.last + 1}.hook_resid_pre"
        hooks.append((name, _write(mask, own[name])))
    return hooks


def _names(what: str, layer: int) -> list[str]:
    block = f"blocks.{layer}"
    return [f"{block}.attn.hook_k", f"{block}.attn.hook_v"] if what == "kv" else [f"{block}.hook_resid_pre"]


def _write(mask: Bool[Tensor, "batch pos"], value: Tensor) -> HookFunction:
    def write(activation: Tensor, hook: HookContext) -> Tensor | None:
        if activation.shape[1] != mask.shape[1]:
            return None  # a decoding step: the cache holds what the prefill wrote
        here = mask.reshape(*mask.shape, *[1] * (activation.ndim - 2)).to(activation.device)
        return torch.where(here, value.to(activation), activation)

    return write


def names_of(swaps: Sequence[Swap], n_layers: int) -> tuple[list[str], list[str]]:
    """Activations of the target that swaps put back behind them, and of the source that they put in."""
    layers = [(swap.what, layer) for swap in swaps for layer in range(swap.first, swap.last + 1)]
    ends = {swap.last + 1 for swap in swaps if swap.last + 1 < n_layers}
    after = [f"blocks.{layer}.hook_resid_pre" for layer in sorted(ends)]
    return after, list(dict.fromkeys(name for what, layer in layers for name in _names(what, layer)))


@torch.no_grad()
def _states(
    vlm: HookedVLM, batch: PromptBatch, source: PromptBatch, swaps: Sequence[Swap]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    after, names = names_of(swaps, vlm.n_layers)
    with sparing_logits(vlm) as extra:
        run = partial(vlm.run_with_cache, use_cache=False, **extra)
        own = dict(run(batch.inputs, after)[1]) if after else {}
        return own, dict(run(source.inputs, names)[1])


@dataclass(frozen=True)
class _Job:
    """Targets and sources that run together; what a model must run for is run when it is first asked for."""

    vlm: HookedVLM
    prompts: tuple[list[Prompt], ...]
    swaps: Sequence[Swap]

    @cached_property
    def sides(self) -> list[PromptBatch]:
        """Targets and sources."""
        return [collate(some, "left").to(self.vlm.device) for some in self.prompts]

    @cached_property
    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `_states`."""
        return _states(self.vlm, self.sides[0], self.sides[1], self.swaps)

    def clean(self, side: int, max_new_tokens: int) -> list[list[int]]:
        """What is written after one side as it is."""
        return greedy_batch(self.vlm, self.sides[side], max_new_tokens)

    def swapped(self, swap: Swap, max_new_tokens: int) -> list[list[int]]:
        """What is written after the targets under a swap."""
        hooks = swap_hooks(self.vlm, swap, self.sides[0], *self.states)
        return greedy_batch(self.vlm, self.sides[0], max_new_tokens, hooks)

    def of(self, *settings: Any) -> str:
        """A fingerprint of the prompts' tokens and some settings."""
        return fingerprint([[list(prompt.ids) for prompt in some] for some in self.prompts], settings)


def _answers(prompts: Sequence[Prompt], written: Sequence[Sequence[int]]) -> list[str | None]:
    return [
        prompt.builder.read_trace(prompt.with_tokens(ids)).answer
        for prompt, ids in zip(prompts, written, strict=True)
    ]


def _compared(target: str | None, source: str | None, example: Example, grader: Grader) -> tuple[bool, str]:
    """Whether the two clean answers differ, and why the pair does not count."""
    if target is None or source is None:
        image = "source image" if target is not None else "target image"
        return False, f"the clean trace on the {image} does not parse"
    try:
        return not same_answer(target, source, example, grader), ""
    except Ungraded as error:
        return False, f"the clean answers cannot be compared: {error}"


def _scored(
    answer: str | None, clean: str, on_source: str, pair: tuple[Example, Example], grader: Grader
) -> tuple[float, str]:
    """The outcome's number, and why the grader cannot read the answer, if it cannot."""
    number = float(OUTCOMES.index(outcome(answer, clean, on_source, *pair, grader)))
    try:
        if answer is not None:
            grader(answer, pair[0])
        return number, ""
    except Ungraded as error:
        return number, str(error)


def paired_prompts(
    builder: PromptBuilder, pairs: Sequence[tuple[Example, Example]], resize: bool
) -> tuple[dict[int, tuple[Prompt, Prompt]], list[str]]:
    """Row to the two prompts, and per row why there are none."""
    prompts: dict[int, tuple[Prompt, Prompt]] = {}
    why = [""] * len(pairs)
    for row, (target, source) in enumerate(pairs):
        if target.question != source.question:
            why[row] = "the two questions differ"
            continue
        if not target.images or len(target.images) != len(source.images):
            why[row] = f"the target has {len(target.images)} images and the source {len(source.images)}"
            continue
        try:
            one, other = builder.build(target), builder.build(source)
            if image_shapes(one) != image_shapes(other) and resize:
                images = [
                    image.resize(like.size) for image, like in zip(source.images, target.images, strict=True)
                ]
                other = builder.build(replace(source, images=tuple(images)))
        except (FrankenlensError, ValueError) as error:
            why[row] = str(error)
            continue
        if image_shapes(one) != image_shapes(other) or one.roles != other.roles:
            why[row] = "the images differ in size (resize=True would resample the source)"
        else:
            prompts[row] = one, other
    return prompts, why


def _require(vlm: HookedVLM, pairs: Sequence[Any], swaps: Sequence[Swap]) -> None:
    if not pairs or not swaps:
        raise FrankenlensError("a vision-token swap needs at least one pair of examples and one swap")
    for swap in swaps:
        if swap.last >= vlm.n_layers:
            raise FrankenlensError(f"swap {swap.name}: the model has layers 0-{vlm.n_layers - 1}")


def _dataset(
    values: Mapping[str, Any], pairs: Sequence[tuple[Example, Example]], swaps: Sequence[Swap]
) -> xr.Dataset:
    return xr.Dataset(
        values,
        coords={
            "swap": [swap.name for swap in swaps],
            "first": ("swap", [swap.first for swap in swaps]),
            "last": ("swap", [swap.last for swap in swaps]),
            "what": ("swap", [swap.what for swap in swaps]),
            "side": ["target", "source"],
            "example": [target.id for target, _ in pairs],
            "function": ("example", [target.task for target, _ in pairs]),
            "cluster": ("example", [cluster_of(target) for target, _ in pairs]),
        },
        attrs={"outcomes": list(OUTCOMES), "left out": NOT_COUNTED},
    )
