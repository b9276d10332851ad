"""What follows the pixels and what the words: the model runs again with others, and its calls are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks.anatomy.watching import Call, Record, copied, of_an_image, run, watched
from hooks.errors import FrankenlensError, one_line


class Beside:
    """Two runs side by side, the second with other pixels or other words.

    Args:
        calls: of the first run, in the order in which they started, with copies.
        again: of the second.
    """

    def __init__(self, calls: Sequence[Call], again: Sequence[Call]) -> None:
        self._turns = {id(call): turn for turn, call in _in_turn(calls)}
        self._again = dict(_in_turn(again))
        self._times = dict(self._turns.values())

    def once(self, call: Call) -> bool:
        """Whether a module ran only this once."""
        return self._times[call.path] == 0

    def given(self, call: Call) -> Bool[Tensor, "..."] | None:
        """The rows of what a module was given that are others in the second run; None if it did not run there alike."""
        other = self._of(call)
        return None if call.given is None or other is None else _moved(call.given, other.given)

    def made(self, call: Call, key: str | None) -> Bool[Tensor, "..."] | None:
        """The same of what it gave out."""
        other = self._of(call)
        return None if other is None else _moved(call.made[key], other.made.get(key))

    def _of(self, call: Call) -> Call | None:
        return self._again.get(self._turns[id(call)])


def with_other_pixels(
    model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str], calls: Sequence[Call]
) -> Beside | None:
    """The run beside one with other pixels; None where there are none.

    Args:
        model: the model.
        inputs: processor tensors.
        paths: modules to look at.
        calls: their calls on these inputs.

    Raises:
        FrankenlensError: it does not run on other pixels.
    """
    pixels = other_pixels(inputs)
    return _beside(model, {**inputs, **pixels}, paths, calls) if pixels else None


def with_other_words(
    model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str], calls: Sequence[Call], embed: str
) -> Beside | None:
    """The run beside one with other words; None where no layer embeds them.

    Raises:
        FrankenlensError: it does not run on other words.
    """
    if not embed:
        return None
    with other_words(model, embed):
        return _beside(model, inputs, paths, calls)


def other_pixels(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A negative of the image, by the names of its tensors.

    Whole numbers stay what they are: among Pix2Struct's patches stand their rows and columns.
    """
    return {
        name: torch.where(value == value.round(), value, -value)
        for name, value in inputs.items()
        if of_an_image(name) and isinstance(value, Tensor) and value.is_floating_point()
    }


@contextmanager
def other_words(model: nn.Module, embed: str, rows: slice = slice(None)) -> Iterator[None]:
    """Every word of some prompts of a batch is embedded otherwise, for the length of the context.

    Args:
        model: the model.
        embed: path of its embedding; encoder and decoder may each have a layer with its matrix.
        rows: of the batch.
    """

    def other(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        new = output.clone()
        new[rows] = 2 * output[rows].roll(1, -1)
        return new

    own = model.get_submodule(embed)
    weight = getattr(own, "weight", None)
    layers = [m for m in model.modules() if m is own or (isinstance(m, nn.Embedding) and m.weight is weight)]
    with ExitStack() as stack:
        for layer in layers if embed else ():
            stack.callback(layer.register_forward_hook(other).remove)
        yield


def _beside(
    model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str], calls: Sequence[Call]
) -> Beside:
    record = Record()
    try:
        with watched(model, paths, record, keep=copied):
            run(model, inputs)
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception as error:
        told = one_line(error, 200)
        raise FrankenlensError(f"it does not run on another image or other words ({told})") from error
    return Beside(calls, record.calls)


def _in_turn(calls: Sequence[Call]) -> list[tuple[tuple[str, int], Call]]:
    times: dict[str, int] = {}
    found = []
    for call in calls:
        turn = times[call.path] = times.get(call.path, -1) + 1
        found.append(((call.path, turn), call))
    return found


def _moved(a: Float[Tensor, "..."], b: Float[Tensor, "..."] | None) -> Bool[Tensor, "..."] | None:
    """The rows that differ by more than rounding."""
    if b is None or a.shape != b.shape:
        return None
    size = a.abs().max() * 8 * torch.finfo(a.dtype).eps
    return ((a.double() - b.double()).abs() > size).any(-1)
