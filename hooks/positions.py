"""Which tokens of the sequence a hook function is shown: all of a prompt at first, then one more at each step.

Positions count from 0 along `input_ids` as they were given, padding included; generated tokens go on from there.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from hooks.errors import FrankenlensError
from hooks.inert import Stays

At = Literal["all", "prompt", "generated"] | Collection[int]
"""Where hooks act while a model generates: everywhere, on the prompt, on what follows it, or at these positions."""


@dataclass
class Clock:
    """The tokens that the model's forward pass works on: `start` up to `stop` of a sequence that began with `prompt`.

    `prompt` is None until it is known: the length of the first pass that has nothing behind it. `inner` is the path of
    the module that is handed the embeddings; while some models generate, it is called alone (BLIP-2).
    """

    start: int = 0
    stop: int = 0
    prompt: int | None = None
    fixed: bool = False
    inner: str = ""
    within: bool = field(default=False, repr=False)

    def begin(self, prompt: int | None) -> None:
        """A generation begins."""
        self.start, self.stop, self.prompt, self.fixed = 0, 0, prompt, prompt is not None

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Look at forward passes of a model, until the stack is closed."""
        inner = model.get_submodule(self.inner)
        for handle in (
            model.register_forward_pre_hook(Stays(self._enter), with_kwargs=True),
            model.register_forward_hook(Stays(self._leave), always_call=True),
            inner.register_forward_pre_hook(Stays(self._see_alone), with_kwargs=True),
        ):
            stack.callback(handle.remove)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.within = True
        self._see(args, kwargs)

    def _leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.within = False

    def _see_alone(self, inner: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.within:
            self._see(args, kwargs)

    def _see(self, args: tuple, kwargs: dict) -> None:
        given = [kwargs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds")]
        given += [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next((one for one in given if isinstance(one, Tensor) and one.ndim > 1), None)
        if tokens is None:
            return
        self.start = self._cached(kwargs)
        self.stop = self.start + tokens.shape[1]
        if self.start == 0 and not self.fixed:
            self.prompt = self.stop

    def _cached(self, kwargs: dict) -> int:
        past = kwargs.get("past_key_values", kwargs.get("cache_params"))
        if past is None:
            return 0
        try:
            return int(past.get_seq_length())
        except (AttributeError, ValueError):  # a cache of states alone, which has no length
            return self.stop if kwargs.get("cache_position") is None else int(kwargs["cache_position"][0])

    def positions(self, n: int) -> range:
        """Of `n` tokens of this pass: its last ones; where it has fewer, as keys of a cache are, all up to its last."""
        first = max(0, self.stop - n)
        return range(first, first + n)

    def chosen(self, n: int, at: At) -> list[int]:
        """Those of `n` tokens of this pass where hooks are to act."""
        positions = self.positions(n)
        prompt = self.stop if self.prompt is None else self.prompt
        if at == "all":
            return list(positions)
        if isinstance(at, str):
            return [p for p in positions if (p < prompt) == (at == "prompt")]
        return [p for p in positions if p in at]


def check_at(at: Any) -> At:
    """What was asked for, or an error.

    Raises:
        FrankenlensError: neither a known word nor positions from 0 on.
    """
    words = ("all", "prompt", "generated")
    if isinstance(at, str):
        valid = at in words
    else:
        valid = isinstance(at, Collection) and len(at) > 0 and all(type(p) is int and p >= 0 for p in at)
    if not valid:
        raise FrankenlensError(
            f"at={at!r}: expected {', '.join(map(repr, words))}, or positions of the sequence (integers from 0 on, "
            "padding included; the first generated token stands at the prompt's length)."
        )
    return at
