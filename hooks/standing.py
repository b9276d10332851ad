"""The hooks that stand on a model: layer over layer, for one thread at a time, past what was compiled."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hooks.engine import Hook, attached
from hooks.positions import Clock


class _Locks:
    """A lock a model. They stay in their process: nnsight sends this module along with a block that runs elsewhere."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
        self._new = threading.Lock()

    def of(self, model: nn.Module) -> threading.RLock:
        with self._new:
            return self._of.setdefault(model, threading.RLock())

    def __reduce__(self) -> tuple:
        return _Locks, ()


_LOCKS = _Locks()


def lock_of(model: nn.Module) -> threading.RLock:
    """The one lock of a model: whoever runs it with hooks, or needs it to run without, holds it for that long."""
    return _LOCKS.of(model)


class Standing:
    """The layers of hooks of one opened model.

    Args:
        model: the model.
        packed: paths of attention modules that see [patch, d] without a batch axis.
        inner: path of the module that is handed the decoder's embeddings; "" where the model makes them itself.
    """

    def __init__(self, model: nn.Module, packed: frozenset[str], inner: str = "") -> None:
        self._model, self.packed = model, packed
        self.clock = Clock(inner=inner)
        self._layers: list[list[Hook]] = []
        self._installed = ExitStack()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread runs the model through an opened model, or changes what stands on it; contexts nest."""
        with lock_of(self._model):
            yield

    @contextmanager
    def attached(self, layer: list[Hook]) -> Iterator[None]:
        """Keep hooks on, after those that stand.

        Code that was compiled does not look at hooks that were attached after it, and what is compiled under hooks
        would keep them: for the length of the context nothing compiled runs, and nothing is compiled.
        """
        with self.exclusive(), torch.compiler.set_stance("force_eager"):
            self._layers.append(layer)
            try:
                self._install(self._layers)
                yield
            finally:
                self._layers = [other for other in self._layers if other is not layer]
                self._install(self._layers)

    def clear(self) -> None:
        """Take every hook away."""
        with self.exclusive():
            self._layers = []
            self._installed.close()

    def _install(self, layers: Sequence[Sequence[Hook]]) -> None:
        self._installed.close()
        self._installed = ExitStack()
        flat = [hook for layer in layers for hook in layer]
        self._installed.enter_context(attached(self._model, flat, self.packed, self.clock))
