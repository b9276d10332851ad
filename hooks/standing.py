"""The hooks that stand on a model: layer over layer, for one thread and task at a time, past what was compiled."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from hooks.engine import Hook, attached
from hooks.exclusive import Hold, exclusive_of, exclusively, require_same_thread
from hooks.positions import Clock
from hooks.swapped import abandon
from hooks.uninterrupted import Uninterrupted


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

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """No other thread or task runs the model through an opened model, or changes what stands on it."""
        return exclusively(self._model, what)

    @contextmanager
    def attached(self, layer: list[Hook]) -> Iterator[None]:
        """Keep hooks on, after those that stand.

        Code that was compiled does not look at hooks that were attached after it, and what is compiled under hooks
        would keep them: for the length of the context nothing compiled runs, and nothing is compiled.

        Raises:
            FrankenlensError: another task or thread uses the model (`hooks.exclusive`); the context is left in another
                thread than it was entered in.
        """
        hold, eager = Hold("hooks"), ExitStack()
        try:
            exclusive_of(self._model).take(hold)
            with Uninterrupted():
                eager.enter_context(torch.compiler.set_stance("force_eager"))
                self._layers = [*self._layers, layer]
                self._install(self._layers)
            yield
        finally:
            try:
                self._detach(layer, hold, eager)
            except KeyboardInterrupt:
                self._detach(layer, hold, eager)
                raise
            require_same_thread(hold)

    def _detach(self, layer: list[Hook], hold: Hold, eager: ExitStack) -> None:
        """Take a layer off; once more changes nothing."""
        uses = exclusive_of(self._model)
        uses.until_on_top(hold)
        with Uninterrupted():
            if any(other is layer for other in self._layers):
                self._layers = [other for other in self._layers if other is not layer]
                self._install(self._layers)
            eager.close()
            uses.drop(hold)

    def clear(self) -> None:
        """Take every hook away, and the weights that a thread put in which has ended."""
        abandon(self._model)
        with self.exclusive("closing"), Uninterrupted():
            self._layers = []
            self._installed.close()

    def _install(self, layers: Sequence[Sequence[Hook]]) -> None:
        self._installed.close()
        self._installed = ExitStack()
        flat = [hook for layer in layers for hook in layer]
        self._installed.enter_context(attached(self._model, flat, self.packed, self.clock))
