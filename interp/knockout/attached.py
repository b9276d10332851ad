"""Knockouts on a model: for full passes, prefill and every decoding step.

A renormalized cut is made in the mask that the layer's attention is given, so the layer keeps SDPA; where the mass is
lost, or the model runs another implementation, that layer alone goes through the tapped attention (`hooks.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import Block
from hooks.engine import HookContext, HookFunction
from hooks.uninterrupted import registered
from interp.knockout.cut import Cut, Knockout, blocks_of, cut_layers, require_cuts, together
from interp.knockout.places import Place, Unfolding, parts_of, place_label
from interp.pair.generation import greedy_batch
from interp.prompts import PromptBatch
from interp.sweep.places import patch_mask

WRITTEN = ("reasoning", "answer", "template", "before reasoning", "before answer")
"""Roles that a prompt without tokens of them may still get while it is continued."""


class Cutting:
    """Cuts that act on one batch, and how many edges they have cut.

    Attributes:
        n_edges: edges cut in every row, of all knockouts together, in one layer each; of the text.
    """

    def __init__(self, cut: Cut, batch: PromptBatch) -> None:
        text = [one for one in together(cut) if one.tower == "text"]
        self.unfolding = Unfolding(batch, [place for one in text for place in (one.source, one.target)])
        self._text, self.n_edges = text, torch.zeros(len(batch), dtype=torch.long)
        self._count()

    def _count(self) -> None:
        for one in self._text:
            self.n_edges += self.edges(one).flatten(1).sum(1).cpu()

    def edges(self, cut: Knockout) -> Bool[Tensor, "batch query key"]:
        """The edges of a knockout in the current pass."""
        return self.unfolding.edges(cut.source, cut.target)

    def on_ids(self, embed: nn.Module, args: tuple) -> None:
        """Before the embedding: which tokens the coming pass runs."""
        ids, given = args[0], self.unfolding.batch.inputs["input_ids"]
        if ids.shape == given.shape and torch.equal(ids.to(given), given):
            self.unfolding.restart()
            self.n_edges.zero_()
        elif ids.ndim == 2 and len(ids) == len(given):
            self.unfolding.advance(ids.tolist())
        else:
            raise FrankenlensError(
                f"knockout: it was made for a batch of {tuple(given.shape)} tokens, and {tuple(ids.shape)} are run "
                "that do not continue it; give the batch that runs, without beams"
            )
        self._count()

    def masked(self, cuts: Sequence[Knockout], n_heads: int) -> Callable[..., tuple[tuple, dict[str, Any]]]:
        """A pre-hook for one attention module of `n_heads` heads that hides the edges of renormalized cuts."""

        def hide(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cache = kwargs.get("past_key_values")
            before = 0 if cache is None else cache.get_seq_length(module.layer_idx)
            self._require_pass(hidden.shape[1], before)
            edges = _by_head(self.edges(cuts[0]), cuts[0].heads, n_heads)
            for one in cuts[1:]:
                edges = edges | _by_head(self.edges(one), one.heads, n_heads)
            n_key = self.unfolding.stop
            if cache is not None:
                n_key, _ = cache.get_mask_sizes(hidden.shape[1], module.layer_idx)
            mask = without(kwargs.get("attention_mask"), edges.to(hidden.device), n_key)
            return args, {**kwargs, "attention_mask": mask}

        return hide

    def dense(self, cut: Knockout) -> HookFunction:
        """A hook for `attn.hook_attn_scores` (renormalized) or `attn.hook_pattern` (lost)."""
        value = 0.0 if cut.mass == "lost" else -torch.inf

        def write(square: Float[Tensor, "*image head query key"], hook: HookContext) -> Tensor:
            if cut.tower == "vision":
                edges = _patch_edges(cut, self.unfolding.batch, square)
            else:
                self._require_pass(square.shape[-2])
                edges = _aligned(self.edges(cut).to(square.device), square.shape[-1])
            return square.masked_fill(_by_head(edges, cut.heads, square.shape[-3]), value)

        return write

    def _require_pass(self, n: int, before: int | None = None) -> None:
        start, stop = self.unfolding.start, self.unfolding.stop
        if n != stop - start or before not in (None, start):
            raise FrankenlensError(
                f"knockout: {n} tokens are run{'' if before is None else f' behind {before}'} where "
                f"{stop - start} behind {start} were expected; run the batch that the cut was made for, and to "
                "generate use `with knocked_out(...)`, which follows what is written"
            )


@contextmanager
def knocked_out(vlm: HookedVLM, cut: Cut, batch: PromptBatch, generating: bool = False) -> Iterator[Cutting]:
    """Cut edges in whatever runs on a batch inside the context: full passes, or prefill and decoding steps.

    The role of a token that is written follows from what is written before it.

    Args:
        vlm: the opened model.
        cut: one knockout, or several at once.
        batch: the prompts that run; padded on the left where tokens are generated.
        generating: tokens will be written, so that roles which are empty now may still fill.

    Raises:
        FrankenlensError: a layer or head that the model does not have, a row without such edges; before anything runs.
    """
    require_cuts(vlm, [cut])
    require_edges(cut, batch, generating)
    cutting = Cutting(cut, batch)
    masks: dict[Block, list[Knockout]] = {}
    hooks: list[tuple[str, HookFunction]] = []
    for one in together(cut):
        for layer in sorted(cut_layers(vlm, one)):
            block = blocks_of(vlm, one)[layer]
            as_mask = one.tower == "text" and one.mass == "renormalized"
            if as_mask and _implementation(vlm.module(block.attention)) == "sdpa":
                masks.setdefault(block, []).append(one)
            else:
                hooks.append((_hook_name(one, layer), cutting.dense(one)))
    cut_off = [partial(vlm.module(vlm.anatomy.embed).register_forward_pre_hook, cutting.on_ids)]
    for block, some in masks.items():
        hide = cutting.masked(some, block.n_heads)
        register = vlm.module(block.attention).register_forward_pre_hook
        cut_off.append(partial(register, hide, with_kwargs=True))
    with vlm.exclusive("a knockout"), registered(*cut_off), vlm.hooks(hooks):
        yield cutting


def knockout_hooks(vlm: HookedVLM, cut: Cut, batch: PromptBatch) -> list[tuple[str, HookFunction]]:
    """The same as forward hooks on scores and patterns, for full passes and for the prefill of a batch.

    The layers that are cut leave SDPA; `knocked_out` keeps them there where it can, and follows a generation.

    Raises:
        FrankenlensError: see `knocked_out`.
    """
    require_cuts(vlm, [cut])
    require_edges(cut, batch)
    cutting = Cutting(cut, batch)
    return [
        (_hook_name(one, layer), cutting.dense(one))
        for one in together(cut)
        for layer in sorted(cut_layers(vlm, one))
    ]


@torch.no_grad()
def greedy_knockout(
    vlm: HookedVLM, batch: PromptBatch, cut: Cut, max_new_tokens: int = 128
) -> tuple[list[list[int]], Int[Tensor, " batch"]]:
    """What the model writes greedily while edges are cut, during prefill and every step.

    Args:
        vlm: the opened model.
        batch: padded on the left, on its device.
        cut: one knockout, or several at once.
        max_new_tokens: the most that is written.

    Returns:
        Token ids per row as of `interp.pair.generation.greedy_batch`, and how many edges were cut in each row (0: the
        model wrote no such tokens).

    Raises:
        FrankenlensError: see `knocked_out`.
    """
    with knocked_out(vlm, cut, batch, generating=True) as cutting:
        written = greedy_batch(vlm, batch, max_new_tokens)
    return written, cutting.n_edges


def require_edges(cut: Cut, batch: PromptBatch, generating: bool = False) -> None:
    """Refuse rows in which a knockout cuts nothing.

    Args:
        cut: one knockout, or several.
        batch: the prompts.
        generating: roles that may still fill are not missed.

    Raises:
        FrankenlensError: names the row, its example and what is missing.
    """
    for row, why in enumerate(missing(cut, batch, generating)):
        if why:
            raise FrankenlensError(f"row {row} ({batch.prompts[row].example.id}): {why}")


def missing(cut: Cut, batch: PromptBatch, generating: bool = False) -> list[str]:
    """Per row, why a knockout cuts nothing there; "" where it cuts, or may yet."""
    why = [""] * len(batch)
    for one in together(cut):
        found = _imageless(one, batch) if one.tower == "vision" else _edgeless(one, batch, generating)
        why = [old or new for old, new in zip(why, found, strict=True)]
    return why


def _imageless(cut: Knockout, batch: PromptBatch) -> list[str]:
    has = batch.with_image.tolist()
    return ["" if there else f"knockout {cut.name}: the prompt has no image" for there in has]


def _edgeless(cut: Knockout, batch: PromptBatch, generating: bool) -> list[str]:
    places = (cut.source, cut.target)
    unfolding = Unfolding(batch, places)
    cuts = unfolding.edges(*places).flatten(1).any(1).tolist()
    there = [unfolding.tokens(place).any(1).tolist() for place in places]
    found = []
    for row in range(len(batch)):
        empty = [place for place, has in zip(places, there, strict=True) if not has[row]]
        what = f"no tokens of {' or '.join(map(place_label, empty))}" if empty else "no key before a query"
        may_fill = generating and not any(map(_is_fixed, [*empty, cut.target]))
        found.append("" if cuts[row] or may_fill else f"knockout {cut.name}: the prompt has {what}")
    return found


def _is_fixed(place: Place) -> bool:
    """Whether no token that is written later belongs to the place."""
    parts = parts_of(place)
    names = {place_label(part) for part in parts}
    return not names & {*WRITTEN, "decision", "all"} and not any(isinstance(p, int) and p >= 0 for p in parts)


def without(
    mask: Tensor | None, edges: Bool[Tensor, "batch #head query written"], n_key: int
) -> Bool[Tensor, "batch #head query key"] | Float[Tensor, "batch #head query key"]:
    """An SDPA mask (None: the causal one) of `n_key` keys with edges hidden."""
    if mask is None:
        edges, n_query = _aligned(edges, n_key), edges.shape[-2]
        seen = torch.ones(n_query, n_key, dtype=torch.bool, device=edges.device).tril(n_key - n_query)
        return seen & ~edges
    edges = _aligned(edges, mask.shape[-1])
    return mask & ~edges if mask.dtype == torch.bool else mask.masked_fill(edges, -torch.inf)


def _aligned(edges: Bool[Tensor, "*lead query written"], n_key: int) -> Bool[Tensor, "*lead query key"]:
    """The edges to the keys of a cache: one that is longer than what is written, or that keeps the last of it."""
    n_written = edges.shape[-1]
    if n_key < n_written:
        return edges[..., n_written - n_key :]
    return nn.functional.pad(edges, (0, n_key - n_written))


def _by_head(
    edges: Bool[Tensor, "*image query key"], heads: Sequence[int] | None, n_heads: int
) -> Bool[Tensor, "*image head query key"]:
    if heads is None:
        return edges.unsqueeze(-3)
    chosen = torch.zeros(n_heads, 1, 1, dtype=torch.bool, device=edges.device)
    chosen[list(heads)] = True
    return edges.unsqueeze(-3) & chosen


def _patch_edges(cut: Knockout, batch: PromptBatch, square: Tensor) -> Bool[Tensor, "*image query key"]:
    source, target = (
        torch.stack([patch_mask(part, batch, square, axis) for part in parts_of(place)]).any(0)
        for place, axis in ((cut.source, -1), (cut.target, -2))
    )
    return target[..., :, None] & source[..., None, :]


def _hook_name(cut: Knockout, layer: int) -> str:
    tower = "vision." if cut.tower == "vision" else ""
    leaf = "hook_pattern" if cut.mass == "lost" else "hook_attn_scores"
    return f"{tower}blocks.{layer}.attn.{leaf}"


def _implementation(module: Any) -> str:
    """What the user set, whether or not the module is tapped now."""
    tap = getattr(module.config, "_frankenlens_tap", None)
    return str(module.config._attn_implementation if tap is None else tap.implementation)
