"""One block between its writers: what an edit of the first leaves to be computed, and where an edit may start."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM
from hooks.anatomy import Block, Writer
from hooks.anatomy.writers import coefficient_of
from hooks.points import writer_points


class Halves:
    """A block of one writer, or of two of which the second sees each token alone (an MLP, dense or of experts).

    Other blocks are taken up only at their beginning and behind their end.

    Attributes:
        first, second: the writers; None where the block has none in that place, or is not known to be of this kind.
        in_turn: whether the second reads the stream that the first has written to, at `hook_resid_mid`.
        apart: whether what the first writes is nothing to the second. Where neither holds, an edit of the first cannot
            be taken up.
    """

    def __init__(self, vlm: HookedVLM, layer: int) -> None:
        self._vlm, self.block, self.name = vlm, vlm.anatomy.text.blocks[layer], f"blocks.{layer}"
        self.first, self.second = _pair(self.block)
        both = self.first is not None and self.second is not None
        second = self.second
        reads = second is not None and second.state == 1 and second.reader is not None and second.alone
        self.in_turn = both and reads and f"{self.name}.hook_resid_mid" in vlm.hook_points
        self.apart = not both or (self.second is not None and self.second.state == 0)
        self._points = dict(zip(self.block.writers, writer_points(self.name, self.block), strict=True))

    def point(self, writer: Writer) -> str:
        """The hook point of what a writer adds."""
        return self._points[writer]

    def starts(self, leaf: str) -> bool:
        """Whether an edit at this hook point of the block can be taken up there."""
        if leaf in ("hook_resid_pre", "hook_resid_post", "hook_embed", "hook_out"):
            return True
        if leaf == "hook_resid_mid":
            return self.in_turn
        if leaf in ("hook_z", "hook_result"):
            if self.first is None or (site := self.first.site) is None:
                return False
            behind = self.in_turn or self.apart
            return behind and site.out is not None and not site.cross and self._followed(self.first)
        if leaf == "hook_expert_out":
            return self.second is not None and self.adds_as_made(self.second)
        if leaf == "hook_post":
            return self.second is not None and self.second.last is not None and self._followed(self.second)
        known = [self.first if self.in_turn or self.apart else None, self.second]
        return any(self._points[writer].endswith(f".{leaf}") for writer in known if writer is not None)

    def _followed(self, writer: Writer) -> bool:
        """Whether at most a norm and a factor lie between what a part makes and what is added."""
        return writer.module == writer.body or not any(self._vlm.module(writer.module).children())

    def adds_as_made(self, writer: Writer) -> bool:
        """Whether what a part makes is added as it is."""
        return writer.module == writer.body and writer.coefficient == 1.0

    def project(self, path: str, given: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead d_model"]:
        """What a linear layer makes of an input, past its hooks; laid out in one piece, as GPT-2's Conv1D needs it."""
        layer: Any = self._vlm.module(path)
        return layer.forward(given.contiguous())

    def added(
        self, writer: Writer, made: Float[Tensor, "lane column d_model"]
    ) -> Float[Tensor, "lane column d_model"]:
        """What is added to the stream when a part makes this: behind a post-norm, times its factor."""
        if writer.module != writer.body:
            made = self._vlm.module(writer.module)(made)
        if writer.coefficient == 1.0:
            return made
        factor = coefficient_of(self._vlm.model, writer.coefficient)
        return made * (factor.to(made) if isinstance(factor, Tensor) else factor)

    def second_adds(self, mid: Float[Tensor, "lane column d_model"]) -> Float[Tensor, "lane column d_model"]:
        """What the second writer adds to a stream that the first has written to."""
        assert self.second is not None and self.second.reader is not None
        body, reader = self.second.body, self.second.reader
        at_once = reader == body or reader.startswith(f"{body}.")  # no norm before it
        made: Any = self._vlm.module(body)(mid if at_once else self._vlm.module(reader)(mid))
        made = made[0] if isinstance(made, tuple) else made
        return self.added(self.second, made.reshape(mid.shape))


def _pair(block: Block) -> tuple[Writer | None, Writer | None]:
    if block.gain != 1.0 or not block.writers or any(writer.rest for writer in block.writers):
        return None, None
    *before, last = block.writers
    if last.role not in ("mlp", "moe"):
        return (None, None) if before else (last, None)
    return (None, None) if len(before) > 1 else (next(iter(before), None), last)


def mixes(block: Block) -> bool:
    """Whether something in the block besides attention may carry one token to another: it runs from the first token."""
    return not block.writers or any(writer.role == "mixer" for writer in block.writers)
