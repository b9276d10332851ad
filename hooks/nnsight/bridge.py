"""nnsight's traces served by our own hooks: its blocks, sessions, invokes and saving; our names, tensors and model.

nnsight's usual way is to replace every module's `forward` for good. Here nothing is wrapped: hooks that sleep until a
block waits for them stand on the model for the length of a trace, so every hook point is within reach, those inside
attention too, and the model is untouched afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from hooks.engine import Hook, HookContext
from hooks.errors import FrankenlensError
from hooks.opened import Opened
from hooks.refusals import refuse_checkpointing, refuse_foreign

try:
    from nnsight.intervention.envoy import Envoy
    from nnsight.intervention.interleaver import Interleaver
    from nnsight.intervention.tracer import InterleavingTracer
    from nnsight.tracing.tracer import Tracer

    from hooks.nnsight.batching import HookBatcher
    from hooks.nnsight.names import Place
except (ImportError, AttributeError) as error:
    raise FrankenlensError(
        f"`trace` needs nnsight 0.8 (pip install 'nnsight==0.8.1'): {error}. Without it, run_with_cache and "
        "run_with_hooks reach the same hook points."
    ) from error


class HookInterleaver(Interleaver):
    """Tells the batcher which hook point it is slicing."""

    def handle(self, provider: str, value: Any) -> Any:
        """Serve one hook point's tensor to the blocks; returns it with their edits."""
        if isinstance(self.batcher, HookBatcher):
            self.batcher.provider = provider
        return super().handle(provider, value)


class VLMTracer(InterleavingTracer):
    """nnsight's tracer; what it offers for wrapped modules only is refused."""

    def cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: `run_with_cache` is the cache of a HookedVLM."""
        raise FrankenlensError("tracer.cache() has no modules to watch here; use vlm.run_with_cache(inputs).")


class Bridge(Envoy):
    """The whole model as nnsight sees it: one envoy without children; the hook points are served from our hooks."""

    _batcher_class = HookBatcher

    def __init__(self, vlm: Opened) -> None:
        # Envoy.__init__ would wrap every module; what the inherited methods need is set here instead.
        self._vlm = weakref.ref(vlm)
        self._parent, self.path, self.interleaver = None, "", HookInterleaver()
        self._edits, self._children, self._child_map, self._aliases = [], [], {}, {}
        place = partial(Place, owner=self.interleaver)
        self.places: dict[str, Place | str] = {name: place(name) for name in vlm.hook_points} | vlm.absent

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @property
    def vlm(self) -> Opened:
        """The opened model."""
        vlm = self._vlm()
        assert vlm is not None
        return vlm

    @property
    def _module(self) -> Any:
        return self.vlm.model

    @property
    def device(self) -> Any:
        """The device that inputs go to."""
        return self.vlm.device

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model with every hook point asleep until a block waits for it."""
        interleaver = self.interleaver

        def serve(activation: Tensor, hook: HookContext) -> Tensor | None:
            new = interleaver.handle(hook.name, activation)
            return None if new is activation else new

        sleeping = [
            Hook(serve, HookContext(point), partial(_waited_for, interleaver, name))
            for name, point in self.vlm.hook_points.items()
        ]
        with self.vlm.attached(sleeping):
            return super().interleave(fn, *args, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return inputs[0]["input_ids"].shape[0] if inputs else 0

    def _batch(self, invokes: list[tuple], fn: Any) -> tuple:
        return (), self.interleaver.batcher.joined(self.vlm)


def _waited_for(interleaver: Interleaver, name: str) -> bool:
    return name in interleaver.parked


_BRIDGES: weakref.WeakKeyDictionary[Any, Bridge] = weakref.WeakKeyDictionary()


def bridge_of(vlm: Opened) -> Bridge:
    """The one bridge of an opened model."""
    if vlm not in _BRIDGES:
        _BRIDGES[vlm] = Bridge(vlm)
    return _BRIDGES[vlm]


def places(vlm: Opened) -> Mapping[str, Place | str]:
    """Name → where nnsight finds the hook point, or the reason why it cannot."""
    return bridge_of(vlm).places


def trace(vlm: Opened, inputs: Mapping[str, Any] | None, remote: Any, kwargs: dict[str, Any]) -> VLMTracer:
    """See `HookedVLM.trace`."""
    _refuse_remote(remote)
    vlm.require_open()
    refuse_foreign(kwargs)
    refuse_checkpointing(vlm.model)
    if inputs is None and "input_ids" in kwargs:
        inputs, kwargs = kwargs, {}
    return VLMTracer(bridge_of(vlm), "__call__", *([] if inputs is None else [inputs]), **kwargs)


def session(vlm: Opened, remote: Any) -> Tracer:
    """See `HookedVLM.session`."""
    _refuse_remote(remote)
    vlm.require_open()
    return Tracer()


def _refuse_remote(remote: Any) -> None:
    if remote:
        raise FrankenlensError(
            f"remote={remote!r}: this model's weights are loaded here, and a server knows models by their repository "
            "id alone; nnsight would run the block here and not say so. Leave `remote` out, or open the repository "
            "without its weights: hooks.nnsight.remote.RemoteVLM('org/model').trace(inputs, remote=True)."
        )
