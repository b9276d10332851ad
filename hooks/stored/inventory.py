"""What tensors a model has, whether it is in memory or on disk, and in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

ABSENT = "nothing"


class Unlike(NamedTuple):
    """A tensor that is not alike in two models, and what it is in each."""

    name: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Inventory:
    """The names of a state dict and what they name.

    Attributes:
        shapes: name to shape.
        types: name to type; empty where types are not compared.
        ties: name to the first name of the same tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Inventory:
        """Of a model in memory, or on the meta device."""
        state = model.state_dict()
        first: dict[int, str] = {}
        ties = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name and name in state:
                ties[name] = first[id(parameter)]
        types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
        return cls({name: tuple(tensor.shape) for name, tensor in state.items()}, types, ties)

    def unlike(self, other: Inventory) -> Iterator[Unlike]:
        """What differs in names, shapes, types and ties, in this one's order."""
        for name in dict.fromkeys([*self.shapes, *other.shapes]):
            ours, theirs = self._described(name), other._described(name)
            if ours != theirs:
                yield Unlike(name, ours, theirs)
            elif self.ties.get(name) != other.ties.get(name):
                yield Unlike(name, self._use(name), other._use(name))

    def _described(self, name: str) -> str:
        return f"{self.types.get(name, '')} {self.shapes[name]}".strip() if name in self.shapes else ABSENT

    def _use(self, name: str) -> str:
        return f"tied to {self.ties[name]}" if name in self.ties else "its own"
