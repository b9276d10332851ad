"""The nnsight way into a HookedVLM: `with vlm.trace(inputs):` and the hook names as attributes. nnsight is imported
when they are first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Traceable:
    """`trace`, `session` and the roots of the hook names. Mixed into HookedVLM."""

    def trace(self, inputs: Mapping[str, Any] | None = None, *, remote: Any = False, **kwargs: Any) -> Any:
        """nnsight's trace: the block below reads and writes hook points by name while the model runs.

        Args:
            inputs: processor tensors; None where the block holds `with tracer.invoke(inputs):` blocks, which run as
                one batch and see their own rows and their own tokens of every hook point.
            remote: refused here, because the weights are here; `hooks.nnsight.remote.RemoteVLM` passes it on.
            kwargs: passed to the model.

        Returns:
            nnsight's tracer; `tracer.result` is Hugging Face's output.

        Raises:
            FrankenlensError: this HookedVLM is closed, `remote` is set, or nnsight is missing or too old.
        """
        from hooks.nnsight.bridge import trace

        own: Any = self
        return trace(own, inputs, remote, kwargs)

    def session(self, *, remote: Any = False) -> Any:
        """nnsight's session: traces of one or several models that share values without saving them."""
        from hooks.nnsight.bridge import session

        own: Any = self
        return session(own, remote)

    @property
    def blocks(self) -> Any:
        """Hook points of the decoder's blocks, inside a trace."""
        return self._named("blocks")

    @property
    def vision(self) -> Any:
        """Hook points of the vision tower, inside a trace."""
        return self._named("vision")

    @property
    def projector(self) -> Any:
        """Hook points of the projector, inside a trace."""
        return self._named("projector")

    @property
    def ln_final(self) -> Any:
        """Hook points of the final norm, inside a trace."""
        return self._named("ln_final")

    @property
    def hook_embed(self) -> Any:
        """What the decoder reads, image features included; inside a trace."""
        return self._named("hook_embed")

    @hook_embed.setter
    def hook_embed(self, value: Any) -> None:
        from hooks.nnsight.bridge import places
        from hooks.nnsight.names import put

        own: Any = self
        put("hook_embed", value, places(own))

    def _named(self, path: str) -> Any:
        from hooks.nnsight.bridge import places
        from hooks.nnsight.names import get

        own: Any = self
        return get(path, places(own))
