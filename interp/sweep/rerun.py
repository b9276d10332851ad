"""One clean forward, from which the decoder can be rerun at any layer: what lies below is not computed again."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig

from hooks import FrankenlensError, HookedVLM
from hooks.batches import is_out_of_memory
from hooks.uninterrupted import registered
from interp.metrics.logits import Logits, run_for_logits, run_with_cache_for_logits, unmade
from interp.sweep.places import of_vision

Hooks = Sequence[tuple[str, Any]]
NOT_CALLED_AGAIN = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
"""What a block may raise that is called by itself, or on some of its tokens, though the model as a whole runs."""


class CleanRun:
    """A forward of one model on one batch, with the activations asked for.

    `rerun` starts at the stored residual of the first layer that its hooks act in, with the very arguments that the
    blocks got, so what its logits are made of is bit for bit that of a full forward. That is checked at the first
    rerun; where an architecture does something between blocks that is not known here, every rerun is a full forward,
    with a warning.

    Attributes:
        logits: of all columns, or of those asked for.
        cache: the activations named by `names`; those of the vision side only where the batch holds an image.
        has_image: whether it does.
    """

    def __init__(
        self,
        vlm: HookedVLM,
        inputs: Mapping[str, Any],
        names: Iterable[str] = (),
        columns: Int[Tensor, " column"] | None = None,
    ) -> None:
        """Run once.

        Args:
            vlm: the opened model.
            inputs: processor tensors, on its device.
            names: activations to keep.
            columns: whose logits will be read, ascending; None: all.
        """
        self.vlm, self.inputs, self._columns = vlm, inputs, columns
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._blocks = [vlm.module(block.path) for block in vlm.anatomy.text.blocks]
        self.has_image = vlm.has_image(inputs)
        deepstack = [name for name in vlm.hook_points if name.endswith("hook_deepstack")]
        wanted = dict.fromkeys([*names, *deepstack])
        kept = [name for name in wanted if self.has_image or not of_vision(name)]
        seen = [
            partial(block.register_forward_pre_hook, self._record, with_kwargs=True) for block in self._blocks
        ]
        with vlm.exclusive("a clean run"), registered(*seen):
            self.logits, self.cache = run_with_cache_for_logits(vlm, inputs, kept, columns)
        self._deepstack = {
            int(name.split(".")[1]): self.cache[name] for name in deepstack if name in self.cache
        }

    def rerun(self, fwd_hooks: Hooks, gradients: bool = False) -> Logits:
        """Logits with hooks on; with `gradients`, they carry those of what the hooks put in."""
        first = self._first_layer([name for name, _ in fwd_hooks])
        resume = first is not None and self._resumable
        with torch.set_grad_enabled(gradients), self.vlm.hooks(fwd_hooks):
            if first is None or not resume:
                return run_for_logits(self.vlm, self.inputs, self._columns)
            return self._decode(first)

    @cached_property
    def _resumable(self) -> bool:
        with torch.no_grad():
            try:
                self._require_no_state()
                same = self._decode(0).equal(self.logits)
            except (FrankenlensError, *NOT_CALLED_AGAIN) as error:
                if is_out_of_memory(error):  # says nothing about the model
                    raise
                same = False  # its blocks are no chain that can be called again one by one
        if not same:
            warnings.warn(
                f"{type(self.vlm.model).__name__} cannot be resumed at a stored residual; "
                "every rerun is a full forward.",
                stacklevel=3,
            )
        return same

    def _require_no_state(self) -> None:
        """Blocks that hand one another something to write to (keys that layers share) start with what a rerun left."""
        for args, kwargs in self._calls:
            for value in [*args, *kwargs.values()]:
                if not is_constant(value):
                    raise FrankenlensError(f"its blocks share a {type(value).__name__} that they write to")

    def _first_layer(self, names: Sequence[str]) -> int | None:
        """The first decoder block that hooks act in; None where they act before the decoder."""
        if any(before_the_decoder(name) for name in names):
            return None
        layers = [self.vlm.point(name).layer for name in self.vlm.names(names)]
        return min((layer for layer in layers if layer is not None), default=len(self._blocks) - 1)

    def _record(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append((args, kwargs))

    def _decode(self, first: int) -> Logits:
        args, kwargs = self._calls[first]
        # A copy: a hook may edit in place, and the stored residual serves every later rerun.
        blocks = self.vlm.anatomy.text.blocks
        if len(self._calls) != len(blocks):
            raise FrankenlensError("its blocks do not run once each")
        key = blocks[first].key or "hidden_states"
        hidden = (kwargs[key] if key in kwargs else args[0]).clone()
        for layer in range(first, len(self._blocks)):
            args, kwargs = self._calls[layer]
            key = blocks[layer].key or "hidden_states"
            if key in kwargs:
                out = self._blocks[layer](*args, **{**kwargs, key: hidden})
            else:
                out = self._blocks[layer](hidden, *args[1:], **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            if layer in self._deepstack:
                hidden = hidden.clone()
                mask = self._image_mask.to(hidden.device)
                hidden[mask] = hidden[mask] + self._deepstack[layer].to(hidden).flatten(0, -2)
        self.vlm.require("lens", "taking a run up at a stored residual")
        normed = self.vlm.module(self.vlm.anatomy.final_norm)(hidden)
        columns = self.logits.columns
        return unmade(self.vlm, normed[:, columns.to(normed.device)], columns)

    @property
    def _image_mask(self) -> Bool[Tensor, "batch pos"]:
        return self.vlm.image_mask(self.inputs)


def is_constant(value: Any) -> bool:
    """Whether an argument of a block is nothing that the block could leave something in."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    kinds = (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.nn.Module, PreTrainedConfig)
    return value is None or isinstance(value, kinds)


def before_the_decoder(name: str) -> bool:
    """Whether a hook point acts on something that is computed before the first decoder block."""
    return name.startswith(("vision.", "tower_", "projector.")) or name.endswith(
        ("hook_embed", "hook_deepstack")
    )
