"""A clean run with everything kept that lets it be taken up again at any layer and any token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.batches import is_out_of_memory
from hooks.engine import Hook, HookContext, together
from hooks.errors import one_line
from hooks.points import interface_point
from hooks.selfcheck_writes import tolerance
from hooks.uninterrupted import registered
from interp.metrics.logits import Logits, sparing_logits, unmade
from interp.prompts import PromptBatch
from interp.sweep.attention import SegmentContext, Tap, segment_of, segments_on
from interp.sweep.edits import Span
from interp.sweep.halves import Halves, mixes
from interp.sweep.places import of_vision
from interp.sweep.rerun import NOT_CALLED_AGAIN, is_constant

AXES = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
"""The token axis of what blocks are handed besides the stream; rows, if any, are on the one before it."""


class Unsupported(Exception):
    """Why a model or a batch cannot be taken up at a token; the sweep then goes the longer way and says so."""


class StoredRun:
    """One forward of one model on one batch, and how to continue it from a changed residual stream.

    Attributes:
        logits: of the columns that are read; `columns` says which.
        blocks, attentions: the decoder's modules, by layer.
        cache: the activations asked for.
        end: one past the last column that is read; nothing later is ever computed again.
    """

    def __init__(
        self,
        vlm: HookedVLM,
        batch: PromptBatch,
        reads: Bool[Tensor, "batch pos"],
        names: Iterable[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """Run once.

        Args:
            vlm: the opened model.
            batch: on its device.
            reads: tokens whose next-token logits are wanted.
            names: further activations to keep.
            device: where to keep all of it; by default where it is made.

        Raises:
            FrankenlensError: nothing is read.
            Unsupported: the architecture does something that is not known here.
        """
        self._device, self._runs_on = device, vlm.device
        self.vlm, self.batch = vlm, batch
        self.columns = reads.any(0).nonzero()[:, 0].to(vlm.device)
        if not len(self.columns):
            raise FrankenlensError("the metric reads no token of this batch.")
        self.end = int(self.columns[-1]) + 1
        text = vlm.anatomy.text.blocks
        _require_one_stream(vlm)
        self.blocks = [vlm.module(block.path) for block in text]
        self.halves = [Halves(vlm, layer) for layer in range(len(text))]
        self._attending = {layer: block.site for layer, block in enumerate(text) if block.site is not None}
        self._attention = {layer: vlm.module(site.module) for layer, site in self._attending.items()}
        self.attentions = list(self._attention.values())
        self._calls: list[dict[str, Any]] = []
        self._cuts: dict[Span, dict[tuple[str, int, bool], Any]] = {}
        self.cache: dict[str, Tensor] = {}
        self.has_image = vlm.has_image(batch.inputs)
        self._deepstack = {
            int(name.split(".")[1]): name for name in vlm.hook_points if name.endswith("hook_deepstack")
        }
        kept = dict.fromkeys([*names, *streams(vlm, self.halves), *self._deepstack.values()])
        self._run([name for name in kept if self.has_image or not of_vision(name)])

    def _run(self, names: list[str]) -> None:
        missing = [name for name in names if name not in self.vlm.hook_points]
        if missing:
            raise Unsupported(f"it has no hook point {missing[0]}")
        seen = [
            partial(block.register_forward_pre_hook, self._record, with_kwargs=True) for block in self.blocks
        ]
        ends = [
            Hook(
                self._keep,
                HookContext(interface_point(f"blocks.{layer}.interface.{leaf}", site, ("batch", "pos"))),
            )
            for layer, site in self._attending.items()
            for leaf in ("hook_rot_k", "hook_v")
        ]
        last = int(self.columns[-1])
        with (
            torch.no_grad(),
            self.vlm.attached(ends),
            registered(*seen),
            sparing_logits(self.vlm, last) as extra,
        ):
            output = self.vlm.run_with_hooks(
                self.batch.inputs, [(name, self._keep) for name in names], use_cache=False, **extra
            )
        made = output.logits
        self._last_logits = made[:, min(last, made.shape[1] - 1)].clone()
        if len(self._calls) != len(self.blocks):
            raise Unsupported("its decoder blocks do not run once each, in order")
        unseen = [layer for layer in self._attending if f"blocks.{layer}.interface.hook_v" not in self.cache]
        if unseen:
            raise Unsupported(f"its block {unseen[0]} did not attend")
        self._keys = {layer: self._heads_first(layer, "hook_rot_k") for layer in self._attending}
        self._values = {layer: self._heads_first(layer, "hook_v") for layer in self._attending}
        self._visible = {layer: self._visibility(layer) for layer in self._attending}
        if any(bool(visible.triu(1).any()) for visible in self._visible.values()):
            raise Unsupported(
                "its tokens look at later ones, so an earlier token is not out of an edit's reach"
            )
        triangle = torch.ones(self.end, self.end, dtype=torch.bool, device=self.vlm.device).tril()
        self._causal = {layer: bool((v == triangle).all()) for layer, v in self._visible.items()}
        self.added = {layer: self._scattered(self.read(name)) for layer, name in self._deepstack.items()}

    @cached_property
    def logits(self) -> Logits:
        """Of the clean run."""
        if not self.vlm.can("lens"):
            raise Unsupported("its logits were not seen to be an unembedding's of a normed stream")
        last = self.post(len(self.blocks) - 1, Span(0, self.end))[:, self.columns]
        with torch.no_grad():
            normed = self.vlm.module(self.vlm.anatomy.final_norm)(last)
        return unmade(self.vlm, normed, self.columns)

    def logits_of(self, normed: Float[Tensor, "batch some d_model"], span: Span) -> Logits:
        """Of what the final norm gives out under an intervention, in the columns that are read within the span.

        Those before it are the clean run's.
        """
        within = self.columns >= span.start
        if not bool(within.all()):
            whole = self.logits.source.clone()
            whole[:, within] = normed.to(whole)
            normed = whole
        return self.logits.of(normed)

    def _keep(self, activation: Tensor, hook: HookContext) -> None:
        kept = activation.detach()
        copy = kept.clone() if self._device is None else kept.to(self._device, copy=True)
        self.cache[hook.name] = together(self.cache.get(hook.name), copy, hook)

    def read(self, name: str, span: Span | None = None) -> Float[Tensor, "..."]:
        """A stored activation, its columns in the span if one is given, on the model's device."""
        kept = self.cache[name]
        return (kept if span is None else kept[:, span.columns]).to(self._runs_on)

    def _record(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _by_name(block, args, kwargs)
        known = self.halves[len(self._calls) % len(self.halves)].block.key
        stream = known if known in given else next(iter(given))
        for name, value in given.items():
            if name != stream and isinstance(value, Tensor) and value.requires_grad:
                raise Unsupported("its blocks are handed tensors that need gradients")
        # logits_to_keep is ours, for the unembedding; some families hand it down to their blocks.
        self._calls.append({k: v for k, v in given.items() if k not in (stream, "logits_to_keep")})

    def _heads_first(self, layer: int, leaf: str) -> Float[Tensor, "batch kv_head pos d_head"]:
        """Keys or values, taken out of the cache."""
        kept = self.cache.pop(f"blocks.{layer}.interface.{leaf}")[:, : self.end].transpose(1, 2)
        return kept if kept.stride()[2:] == (kept.shape[3], 1) else kept.contiguous()

    def _scattered(
        self, features: Float[Tensor, "*image image_token d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        added = features.new_zeros(*self.image_mask.shape, features.shape[-1])
        added[self.image_mask] = features.flatten(0, -2)
        return added

    @property
    def image_mask(self) -> Bool[Tensor, "batch pos"]:
        """The tokens that stand for images."""
        return self.vlm.image_mask(self.batch.inputs)

    @cached_property
    def image_rows(self) -> bool:
        """Whether the projector's rows are, as they are, the stream's at the tokens that stand for images."""
        if "projector.hook_out" not in self.cache:
            return False
        made = self.read("projector.hook_out")
        rows = self.pre(0, Span(0, self.batch.roles.shape[1]))[self.image_mask]
        return made.reshape(-1, made.shape[-1]).shape == rows.shape and torch.equal(
            made.reshape(rows.shape).to(rows), rows
        )

    def pre(self, layer: int, span: Span) -> Float[Tensor, "batch column d_model"]:
        """The residual stream before a block."""
        return self.read(f"blocks.{layer}.hook_resid_pre", span)

    def mid(self, layer: int, span: Span) -> Float[Tensor, "batch column d_model"]:
        """The residual stream between attention and MLP."""
        return self.read(f"blocks.{layer}.hook_resid_mid", span)

    def post(self, layer: int, span: Span) -> Float[Tensor, "batch column d_model"]:
        """The residual stream after a block, before any DeepStack addition."""
        name = f"blocks.{layer}.hook_resid_post"
        if name not in self.cache:
            name = f"blocks.{layer + 1}.hook_resid_pre"
        return self.read(name, span)

    def run_block(
        self,
        layer: int,
        stream: Float[Tensor, "lane column d_model"],
        span: Span,
        tap: Tap | None = None,
        dense: bool = False,
        cut: Bool[Tensor, "lane column key"] | None = None,
    ) -> Float[Tensor, "lane column d_model"]:
        """One block on a segment of every lane; inside `segments_on(self.vlm, self.attentions)`.

        `cut` are attention edges hidden from each lane, besides those that no token sees.

        After the last block only the columns that are read hold anything meant, unless something inside is tapped.
        """
        if mixes(self.halves[layer].block) and span.start:
            return self._from_the_first_token(layer, stream, span, tap is None and cut is None)
        plain = self.halves[layer].block.plain and tap is None
        wanted = self.reads_within(span) if plain and layer == len(self.blocks) - 1 else None
        wanted = None if wanted is None or len(wanted) == len(span) else wanted
        if layer in self._attending:
            self._context(layer, stream, span, tap, dense, cut, wanted)
        given = self._arguments(layer, span, len(stream) // len(self.batch))
        some: list[Any] = []
        if wanted is not None:
            half, width = self.halves[layer].block, len(span)
            norm, mlp = self.vlm.module(half.mid_norm), self.vlm.module(half.mlp)
            take = partial(norm.register_forward_pre_hook, lambda _, args: (args[0][:, wanted], *args[1:]))
            spread = partial(mlp.register_forward_hook, lambda *io: _spread(io[-1], wanted, width))
            some = [take, spread]
            site = self._attending.get(layer)
            if site is not None and site.out is not None:
                out = self.vlm.module(site.out)
                some += [
                    partial(out.register_forward_pre_hook, partial(_taken, wanted, width)),
                    partial(out.register_forward_hook, partial(_given_back, wanted, width)),
                ]
        with registered(*some) if some else nullcontext():
            key = self.halves[layer].block.key
            out = self.blocks[layer](**{key: stream}, **given) if key else self.blocks[layer](stream, **given)
        return out[0] if isinstance(out, tuple) else out

    def _context(
        self,
        layer: int,
        stream: Float[Tensor, "lane column d_model"],
        span: Span,
        tap: Tap | None,
        dense: bool,
        cut: Bool[Tensor, "lane column key"] | None,
        wanted: Int[Tensor, " wanted"] | None,
    ) -> None:
        """Hand the block's attention what it needs beyond the segment."""
        visible = self._visible[layer][:, :, span.columns, : span.stop]
        if cut is not None:
            visible = visible.repeat(len(cut) // len(visible), 1, 1, 1) & ~cut[:, None]
        segment_of(self._attention[layer]).context = SegmentContext(
            self._keys[layer][:, :, : span.start].to(stream.device),
            self._values[layer][:, :, : span.start].to(stream.device),
            visible,
            self._causal[layer] and cut is None,
            tap,
            dense,
            wanted,
        )

    def _from_the_first_token(
        self, layer: int, stream: Float[Tensor, "lane column d_model"], span: Span, whole_block: bool
    ) -> Float[Tensor, "lane column d_model"]:
        """A block that carries a state along the tokens: what stands before the segment is the clean run's."""
        if not whole_block:
            raise Unsupported(f"its block {layer} does not attend")
        before = self.pre(layer, Span(0, span.start)).to(stream)
        whole = torch.cat([before.repeat(len(stream) // len(before), 1, 1), stream], dim=1)
        return self.run_block(layer, whole, Span(0, span.stop))[:, span.start :]

    def reads_within(self, span: Span) -> Int[Tensor, " column"]:
        """The columns that are read, counted from the span's first."""
        return self.columns[self.columns >= span.start] - span.start

    def run_mlp(
        self, layer: int, mid: Float[Tensor, "lane column d_model"]
    ) -> Float[Tensor, "lane column d_model"]:
        """The second half of a block whose writers read one after the other."""
        return mid + self.halves[layer].second_adds(mid)

    def _arguments(self, layer: int, span: Span, copies: int) -> dict[str, Any]:
        """What a block is called with, besides the stream, for a span and that many copies of the batch.

        What all blocks are handed is cut once, as long as the span is the same.
        """
        if span not in self._cuts and len(self._cuts) > 1:  # blocks that mix run from the first token
            self._cuts.clear()
        found, known = {}, self._cuts.setdefault(span, {})
        for name, value in self._calls[layer].items():
            key = name, id(value), layer in self._attending
            if key not in known:
                known[key] = self._cut(name, value, span, layer)
            found[name] = self._copied(name, known[key], copies)
        return found

    def _copied(self, name: str, value: Any, copies: int) -> Any:
        """An argument that is cut, once per copy of the batch where it has its rows."""
        if isinstance(value, tuple):
            return tuple(self._copied(name, part, copies) for part in value)
        if not isinstance(value, Tensor) or copies == 1:
            return value
        axis = value.ndim + AXES.get(name, -1) - 1
        if axis < 0 or not value.shape[axis] == len(self.batch) > 1:
            return value
        repeats = [1] * value.ndim
        repeats[axis] = copies
        return value.repeat(repeats)

    def _cut(self, name: str, value: Any, span: Span, layer: int) -> Any:
        """One argument of a block for the columns of a span."""
        padding = name.endswith("mask") and isinstance(value, Tensor) and value.ndim == 2
        if _is_past(name) or (name.endswith("mask") and not padding):
            return None
        if padding and layer in self._attending:
            return None
        if name in ("use_cache", "output_attentions", "output_router_logits"):
            return False
        if isinstance(value, tuple):
            return tuple(self._cut(name, part, span, layer) for part in value)
        if not is_constant(value):
            raise Unsupported(f"its blocks share a {type(value).__name__} {name!r} that they may write to")
        if not isinstance(value, Tensor):
            return value
        axis = -1 if padding else AXES.get(name)
        if axis is None:
            raise Unsupported(f"its blocks take a tensor {name!r} whose axes are not known")
        return value.narrow(axis, span.start, len(span))

    def _visibility(self, layer: int) -> Bool[Tensor, "#batch 1 query key"]:
        masks = [v for k, v in self._calls[layer].items() if k.endswith("mask") and isinstance(v, Tensor)]
        mask, n = masks[0] if masks else None, self.batch.roles.shape[1]
        if len(masks) > 1:
            raise Unsupported("its blocks are handed several masks")
        device = self.vlm.device
        if mask is None:
            return torch.ones(self.end, self.end, dtype=torch.bool, device=device).tril()[None, None]
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != n:
            raise Unsupported("its attention mask has an unknown form")
        mask = mask[:, :, : self.end, : self.end]
        if mask.dtype == torch.bool:
            return mask
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if mask.masked_fill(hidden, 0).any():
            raise Unsupported("its attention mask adds a bias")
        return ~hidden

    @torch.no_grad()
    def check(self) -> None:
        """The clean run, continued from the middle of every block and from the middle of the tokens, is the clean run.

        Raises:
            Unsupported: it is not, within 1e-5 of the largest value of the stream (sixteen rounding steps of a half
                precision).
        """
        implementation = self.vlm.model.config.get_text_config()._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise Unsupported(f"its attention implementation is {implementation!r}")
        if "hook_embed" in self.cache and not torch.equal(
            self.cache["hook_embed"], self.cache["blocks.0.hook_resid_pre"]
        ):
            raise Unsupported("it changes the embeddings before the first block")
        made = self.vlm.unembed(self.logits.source[:, -1:])[:, 0]
        error = (made - self._last_logits).abs().max().item()
        if not error <= tolerance(self._last_logits):
            raise Unsupported(f"its logits are not its unembedding's output (off by {error:.1e})")
        real = (self.batch.mask("all").to(self.vlm.device))[..., None]
        for start in {0, self.end // 2, self.end - 1}:
            span = Span(start, self.end)
            with segments_on(self.vlm, self.attentions):
                for layer in range(len(self.blocks)):
                    try:
                        self._check_block(layer, span, real[:, span.columns], start == self.end // 2)
                    except NOT_CALLED_AGAIN as error:
                        if is_out_of_memory(error):  # says nothing about the model
                            raise
                        told = one_line(error, 120)
                        raise Unsupported(
                            f"its block {layer} does not run on some tokens alone ({type(error).__name__}: {told})"
                        ) from error

    def _check_block(
        self, layer: int, span: Span, keep: Bool[Tensor, "batch column 1"], inside: bool
    ) -> None:
        expected, half = self.post(layer, span), self.halves[layer]
        if layer == len(self.blocks) - 1:
            keep = torch.zeros_like(keep).index_fill(1, self.reads_within(span), True) & keep
        ways = {"at a token": (self.run_block(layer, self.pre(layer, span), span), expected)}
        if half.in_turn:
            ways["between its writers"] = self.run_mlp(layer, self.mid(layer, span)), expected
        ways |= self._second_ways(layer, span)
        if inside and layer in self._attending:  # two lanes, as edits inside attention and cuts run
            two, uncut = self.pre(layer, span).repeat(2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool)
            dense = self.run_block(layer, two, span, lambda leaf, value: value, dense=True)
            cut = self.run_block(
                layer, two, span, cut=uncut.to(two.device).expand(len(two), len(span), span.stop)
            )
            rows = len(self.batch)
            ways |= {"with its pattern": (dense[rows:], expected), "with cuts": (cut[rows:], expected)}
        for way, (got, wanted) in ways.items():
            error = ((got - wanted) * keep).abs().max().item()
            if not error <= tolerance(wanted):
                raise Unsupported(
                    f"block {layer} taken up {way} is off by {error:.1e} (allowed {tolerance(wanted):.1e})"
                )

    def _second_ways(self, layer: int, span: Span) -> dict[str, tuple[Tensor, Tensor]]:
        """What edits of heads and neurons start from: z and neurons, through to what is added."""
        half, block = self.halves[layer], self.halves[layer].block
        found: dict[str, tuple[Tensor, Tensor]] = {}
        z, post = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.mlp.hook_post"
        if z in self.cache and half.first is not None and half.starts("hook_z"):
            raw = half.project(block.out, self.read(z, span).flatten(-2))
            found["at its heads"] = half.added(half.first, raw), self.read(half.point(half.first), span)
        if post in self.cache and half.second is not None and half.starts("hook_post"):
            raw = half.project(block.mlp_out, self.read(post, span))
            raw = raw.reshape(self.read(half.point(half.second), span).shape)
            found["at its neurons"] = half.added(half.second, raw), self.read(half.point(half.second), span)
        return found


def streams(vlm: HookedVLM, halves: Sequence[Halves]) -> list[str]:
    """The states of the stream that a stored run keeps, whatever it is continued from."""
    found = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(halves))]
    found += [f"blocks.{layer}.hook_resid_mid" for layer, half in enumerate(halves) if half.in_turn]
    deepstack = [name.split(".")[1] for name in vlm.hook_points if name.endswith("hook_deepstack")]
    return [*found, *(f"blocks.{layer}.hook_resid_post" for layer in (len(halves) - 1, *deepstack))]


def _require_one_stream(vlm: HookedVLM) -> None:
    if vlm.anatomy.text.ndim != 3:
        raise Unsupported("its stream is not [batch pos d_model]")
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        if len(block.sites) > 1:
            raise Unsupported(f"its block {layer} attends more than once")
        if block.sites and block.site is None:
            raise Unsupported(f"its block {layer} attends to what is not the stream")
        if block.sites and mixes(block):
            besides = (
                "carries a state along the tokens besides" if block.writers else "adds what is not known"
            )
            raise Unsupported(f"its block {layer} attends and {besides}")


def _is_past(name: str) -> bool:
    return name.startswith(("past_key_value", "layer_past", "cache_params"))


def _by_name(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, in the order of the signature, the stream first."""
    forward: Any = block.forward
    bound = inspect.signature(forward).bind(*args, **kwargs)
    names = {p.name for p in bound.signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if (
            isinstance(value, tuple)
            and bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        ):
            raise Unsupported("its blocks are called with positional arguments without names")
        found |= value if name in names else {name: value}
    return found


def _taken(wanted: Tensor, width: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Of the heads' outputs [lane column width], those of some columns; another layout is left as it is."""
    whole = args[0]
    return (whole[:, wanted], *args[1:]) if whole.ndim == 3 and whole.shape[1] == width else None


def _given_back(wanted: Tensor, width: int, module: nn.Module, args: tuple[Any, ...], made: Any) -> Any:
    """What `_taken` left out, set to zero."""
    narrowed = isinstance(made, Tensor) and made.ndim == 3 and made.shape[1] == len(wanted)
    return _spread(made, wanted, width) if narrowed else None


def _spread(few: Any, wanted: Int[Tensor, " column"], width: int) -> Any:
    """An MLP's output for some columns, set among zeros for the others."""
    if isinstance(few, tuple):
        return (_spread(few[0], wanted, width), *few[1:])
    few = few.reshape(-1, len(wanted), few.shape[-1])  # Llama 4's experts have the tokens in a row
    whole = few.new_zeros(len(few), width, few.shape[-1])
    whole[:, wanted] = few
    return whole
