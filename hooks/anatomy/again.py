"""A block that runs once more with one thing changed: which tokens a part of it moves, and what is left without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks.anatomy.watching import Call, first_floating, floating_parts, with_own_caches
from hooks.errors import FrankenlensError, one_line

Change = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]


class NotAgain(FrankenlensError):
    """A block does not do by itself what it did inside the model."""


class Again:
    """One block, to be called with the arguments that it was seen to be given.

    Args:
        model: the model.
        whole: the block's call, with its arguments.
        calls: of the modules below it, in the order in which they started.
    """

    def __init__(self, model: nn.Module, whole: Call, calls: Sequence[Call]) -> None:
        assert whole.given is not None and whole.arguments is not None
        self._model, self._whole = model, whole
        self._tokens = whole.given.shape[:-1].numel()
        self._plain: dict[int, Tensor] = {}
        self._turns: dict[int, int] = {}  # the how manyeth call of its module one is
        times: dict[str, int] = {}
        for call in calls:
            self._turns[id(call)] = times.get(call.path, 0)
            times[call.path] = self._turns[id(call)] + 1

    def mixes(self, made: Call, held: Sequence[Call] = ()) -> bool:
        """Whether what a module gives out for a token depends on other tokens of the stream.

        Args:
            made: the module's call.
            held: calls that give out what they did, however the stream is changed.

        Raises:
            NotAgain: it cannot be told.
        """
        changes = [(call, _always(call)) for call in held]
        return self._moved(made, self._output(made, changes, _another_first)) > 1

    def mixes_behind(self, source: Call, made: Call) -> bool:
        """Whether what a module gives out for a token depends on what an earlier one gives out for other tokens.

        Raises:
            NotAgain: it cannot be told.
        """
        return self._moved(made, self._output(made, [(source, _another_first)])) > 1

    def without(self, silent: Sequence[Call]) -> Float[Tensor, "..."]:
        """The stream behind the block, had some modules given out zeros.

        Raises:
            NotAgain: the block does not run by itself.
        """
        output = self._run([(call, torch.zeros_like) for call in silent])
        given = self._whole.given
        found = [
            out for out in floating_parts(output).values() if given is not None and out.shape == given.shape
        ]
        if not found:
            raise NotAgain("run by itself, it gives out something else")
        return found[0]

    def _moved(self, made: Call, new: Float[Tensor, "..."]) -> int:
        """How many tokens have another output than when nothing is changed."""
        if id(made) not in self._plain:
            self._plain[id(made)] = self._output(made, ())
        old, seen = self._plain[id(made)], made.out
        if (
            seen is None
            or old.shape != seen.shape
            or not _near(old, seen, torch.finfo(old.dtype).eps ** 0.5).all()
        ):
            raise NotAgain("run by itself, it gives out something else")
        if new.shape != old.shape or new.numel() % self._tokens:
            raise NotAgain("its tokens are not those of the stream")
        same = _near(new, old, 8 * torch.finfo(old.dtype).eps)
        return int((~same).reshape(self._tokens, -1).any(-1).sum())

    def _output(
        self, made: Call, changes: Sequence[tuple[Call, Change]], stream: Change = torch.clone
    ) -> Float[Tensor, "..."]:
        """What one module gives out meanwhile."""
        seen: list[Tensor] = []

        def look(output: Tensor) -> Tensor:
            seen.append(output.clone())
            return output

        self._run([*changes, (made, look)], stream)
        if not seen:
            raise NotAgain("run by itself, it calls other modules")
        return seen[0]

    def _run(self, changes: Sequence[tuple[Call, Change]], stream: Change = torch.clone) -> Any:
        """The block's output when its stream and what some modules give out go through functions."""
        whole = self._whole
        assert whole.given is not None and whole.arguments is not None
        args, kwargs = _with_stream(*whole.arguments, stream(whole.given))
        block: Any = self._model.get_submodule(whole.path)
        try:
            with torch.no_grad(), self._changed(changes):
                return block.forward(*args, **kwargs)
        except torch.OutOfMemoryError:  # says nothing about the block
            raise
        except Exception as error:
            told = one_line(error, 200)
            raise NotAgain(f"it does not run by itself ({type(error).__name__}: {told})") from error

    @contextmanager
    def _changed(self, changes: Sequence[tuple[Call, Change]]) -> Iterator[None]:
        by_path: dict[str, dict[int, Change]] = {}
        for call, change in changes:
            by_path.setdefault(call.path, {})[self._turns[id(call)]] = change
        handles = [
            self._model.get_submodule(path).register_forward_hook(_in_turn(turns))
            for path, turns in by_path.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_turn(changes: Mapping[int, Change]) -> Callable[[nn.Module, tuple, Any], Any]:
    """A forward hook that acts on some of a module's calls."""
    turn = -1

    def act(module: nn.Module, args: tuple, output: Any) -> Any:
        nonlocal turn
        turn += 1
        return _with_first(output, changes[turn]) if turn in changes else output

    return act


def _with_first(output: Any, change: Change) -> Any:
    """An output whose first floating tensor has gone through a function."""
    if isinstance(output, Tensor):
        return change(output)
    first = floating_parts(output)[None]  # of a tuple or list
    return type(output)(change(first) if part is first else part for part in output)


def _with_stream(args: tuple, kwargs: dict[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments with another stream."""
    key, old = first_floating(args, kwargs)
    args, kwargs = with_own_caches(args, kwargs)  # to which each run adds
    if key is not None:
        return args, {**kwargs, key: new}
    return tuple(new if value is old else value for value in args), kwargs


def _another_first(stream: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same tokens but for the first."""
    rows = stream.reshape(-1, stream.shape[-1]).clone()
    rows[0] = rows[0].roll(1) + 1
    return rows.reshape(stream.shape)


def _always(call: Call) -> Change:
    def same(output: Tensor) -> Tensor:
        assert call.out is not None
        return call.out.reshape(output.shape).clone()

    return same


def _near(a: Tensor, b: Tensor, share: float) -> Bool[Tensor, "..."]:
    return (a.double() - b.double()).abs() <= share * b.double().abs().max()
