"""What is done to a model while it writes: the interface, and the intervention that does nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from jaxtyping import Float
from torch import Tensor

from hooks.vlm import FwdHooks


class Intervention:
    """Nothing is done; others override what they need.

    Attributes:
        waits: something is done only from the divergence on, so the token at which it shows is read again.
        donor_hooks, recipient_hooks: to be on while the two run.
    """

    waits: bool = False
    donor_hooks: FwdHooks = ()
    recipient_hooks: FwdHooks = ()

    def reading(self) -> AbstractContextManager[None]:
        """Around the donor's forward pass."""
        return nullcontext()

    def writing(self) -> AbstractContextManager[None]:
        """Around the recipient's."""
        return nullcontext()

    def keep(self) -> None:
        """Some rows are about to leave the batch."""

    def logits(
        self, donor: Float[Tensor, "row vocab"], recipient: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """What the next token is chosen by; the donor's are its own on the same tokens."""
        return recipient
