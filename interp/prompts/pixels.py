"""A prompt's tensors, those of its images made when they are used: 1,000 image tokens of Qwen are 19 MB of patches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256

import torch
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.prompt import TOKEN_TENSORS
from interp.questions.on_demand import Recent

LARGE = 1 << 12
"""Bytes of a prompt's images from which on they are made again, where many others were used since (`KEPT`)."""


class Inputs(Mapping[str, Tensor]):
    """The processor's tensors of one prompt.

    Args:
        held: those that are kept.
        made: those of its images, where they are large.
    """

    def __init__(self, held: Mapping[str, Tensor], made: Pixels | None = None) -> None:
        self._held, self._made = dict(held), made

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], again: Callable[[], Mapping[str, Tensor]], name: str) -> Inputs:
        """Of what a processor has made.

        Args:
            inputs: all tensors.
            again: makes them again.
            name: for the message of a refusal.
        """
        large = {
            key: value
            for key, value in inputs.items()
            if key not in TOKEN_TENSORS and value.nbytes >= LARGE  # 131,072 tokens are as large, and grow
        }
        held = {key: value for key, value in inputs.items() if key not in large}
        return cls(held, Pixels(again, large, name) if large else None)

    def with_tokens(self, tokens: Mapping[str, Tensor]) -> Inputs:
        """With other tensors of tokens, about the same images."""
        return Inputs(self._held | dict(tokens), self._made)

    def __getitem__(self, name: str) -> Tensor:
        if self._made is not None and name in self._made.names:
            return self._made.tensors()[name]
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from () if self._made is None else self._made.names

    def __len__(self) -> int:
        return len(self._held) + (0 if self._made is None else len(self._made.names))

    def __contains__(self, name: object) -> bool:
        return name in self._held or (self._made is not None and name in self._made.names)

    def __reduce__(self) -> tuple:
        return Inputs, (dict(self),)


class Pixels:
    """Tensors that were made once and can be made again.

    Args:
        again: makes them, and others.
        first: what that gave.
        name: for the message of a refusal.
    """

    def __init__(
        self, again: Callable[[], Mapping[str, Tensor]], first: Mapping[str, Tensor], name: str
    ) -> None:
        self.names = tuple(first)
        self._again, self._name, self._digest = again, name, _digest(first)
        _MADE.keep(self, dict(first))
        weakref.finalize(self, _MADE.drop, id(self))

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors.

        Raises:
            FrankenlensError: the processor does not make them as it did.
        """
        return _MADE.of(self) or _MADE.keep(self, self._same())

    def _same(self) -> Mapping[str, Tensor]:
        made = self._again()
        found = {name: made[name] for name in self.names if name in made}
        if _digest(found) != self._digest:
            raise FrankenlensError(
                f"the processor does not make the same of the images of {self._name} when it is asked again; a map of "
                "them would mix two. Is something random in it, or were its settings changed?"
            )
        return found


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


_MADE: Recent[Mapping[str, Tensor]] = Recent(_n_bytes)


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
