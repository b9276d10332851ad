"""Writers: which modules' outputs a block adds to its stream, with which coefficients, found by solving for them.

The equation is `resid_post = resid_pre + Σ coefficient · output`. A set of modules is taken only where the sum is the
stream to the rounding of float32, entry by entry, and every member is needed; in a half precision (of a model that does
not run in float32), only where it is the stream bit for bit, summed as the model sums it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy.stirred import factors
from hooks.anatomy.watching import Call

MAX_WRITERS = 4
_CANDIDATES = 14
_EXACT = 0.999  # share of entries that must be equal bit for bit, where sums are compared that way
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Term:
    """One module's output in a block's sum."""

    call: Call
    coefficient: float | str = 1.0


@dataclass(frozen=True)
class Solution:
    """Terms in order, the states of the stream before each of them, and what the sum is multiplied with."""

    terms: tuple[Term, ...]
    states: tuple[Float[Tensor, "..."], ...]
    gain: float | str = 1.0


def solve(
    block: nn.Module, path: str, pre: Float[Tensor, "..."], post: Float[Tensor, "..."], calls: Sequence[Call]
) -> Solution | None:
    """What a block adds to its stream.

    Args:
        block: the block; its parameters may be coefficients.
        path: its path.
        pre, post: its stream before and after.
        calls: of modules below it, in the order in which they started, with copies of their outputs.
    """
    found = _candidates(pre, post, calls)
    if not found:
        return None
    outs = [call.out.reshape(pre.shape) for call in found]  # type: ignore[union-attr]
    sets = [some for size in range(1, MAX_WRITERS + 1) for some in combinations(range(len(found)), size)]
    scales = _parameters(block, path, pre)
    own = [
        n for n, v in scales.items() if v.numel() == 1 and "." not in n.removeprefix(f"{path}.").rstrip(")")
    ]
    gains = [name for name in own if float(scales[name]) not in (0, 1)]
    for start, terms in _precisions(pre, post, outs):
        sums = [_Sums(start, post, found, terms, scales, gain) for gain in (1.0, *gains)]
        # Sums as they are come first, whatever they are multiplied with: in half precision a fit is a weaker proof.
        ways = [one.plain for one in sums] + [one.scaled for one in sums]
        solutions = (solution for way in ways for some in sets if (solution := way(some)) is not None)
        if (solution := next(solutions, None)) is not None:
            return replace(solution, states=(pre, *solution.states[1:]))
    return None


def _precisions(
    pre: Float[Tensor, "..."], post: Float[Tensor, "..."], outs: Sequence[Float[Tensor, "..."]]
) -> Iterator[tuple[Float[Tensor, "..."], list[Float[Tensor, "..."]]]]:
    """In which a model may add: in its stream's, in each term's own (T5 in fp16), in the sum's (Mamba's residuals)."""
    yield pre, [out.to(pre.dtype) for out in outs]
    if any(one.dtype != pre.dtype for one in (post, *outs)):
        yield pre, list(outs)
        yield pre.to(post.dtype), list(outs)


def coefficient_of(root: nn.Module, expression: float | str) -> Float[Tensor, "*channel"] | float:
    """The value of a coefficient now: a number, `path` or `tanh(path)` of a parameter or buffer below it."""
    if not isinstance(expression, str):
        return expression
    if expression.startswith("tanh("):
        return _value(root, expression[5:-1]).tanh()
    return _value(root, expression)


def _value(root: nn.Module, path: str) -> Float[Tensor, "..."]:
    module, _, name = path.rpartition(".")
    return getattr(root.get_submodule(module), name).detach()


def _candidates(pre: Tensor, post: Tensor, calls: Sequence[Call]) -> list[Call]:
    """Modules whose output has the stream's size and is neither of its ends; of equal ones the outermost, first."""
    found: list[Call] = []
    outputs: list[Tensor] = []
    for call in sorted(calls, key=lambda call: call.path.count(".")):
        out = call.out
        if out is None or out.numel() != pre.numel() or out.shape[-1] != pre.shape[-1] or call.ended < 0:
            continue
        out = out.reshape(pre.shape)
        if out.device != pre.device or any(_same(out, other) for other in (pre, post, *outputs)):
            continue
        if not bool(out.any()):
            continue
        found.append(call)
        outputs.append(out)
    return sorted(found[:_CANDIDATES], key=lambda call: call.ended)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bool(torch.equal(a, b))


def _parameters(block: nn.Module, path: str, pre: Tensor) -> dict[str, Tensor]:
    """What may be layer scales or gates (one number in all, or of the block itself one a channel), and tanh."""
    found: dict[str, Tensor] = {}
    for name, value in factors(block, path, pre.shape[-1]):
        flat = value.detach().reshape(-1)
        found[name] = flat
        if value.numel() == 1:
            found[f"tanh({name})"] = flat.tanh()
    return found


class _Sums:
    """Sums of a block's candidates, held against what the block added.

    Inner products of the candidates and of what was added give any set's least squares, so that few sets are summed.
    """

    def __init__(
        self,
        pre: Float[Tensor, "..."],
        post: Float[Tensor, "..."],
        calls: Sequence[Call],
        outs: Sequence[Float[Tensor, "..."]],
        scales: Mapping[str, Float[Tensor, " n"]],
        gain: float | str,
    ) -> None:
        self._pre, self._post, self._calls, self._outs, self._scales = pre, post, calls, outs, scales
        self._gain = gain
        self._numbers = {name: float(value) for name, value in scales.items() if value.numel() == 1}
        self._vectors = len(self._numbers) < len(scales)
        whole = post.double() if gain == 1.0 else post.double() / scales[str(gain)].double()
        self._delta = whole - pre.double()
        delta, stacked = self._delta.flatten(), torch.stack([out.double().flatten() for out in outs])
        self._inner, self._with_delta = (stacked @ stacked.T).cpu(), (stacked @ delta).cpu()
        self._size = float(delta @ delta)
        step = torch.finfo(pre.dtype).eps
        self._allowed = (16 * step) ** 2 * float((pre.double().square() + whole.square()).sum())

    def plain(self, some: Sequence[int]) -> Solution | None:
        """The sum as it is."""
        picked = list(some)
        rest = self._size - 2 * self._with_delta[picked].sum() + self._inner[picked][:, picked].sum()
        if abs(float(rest)) > self._allowed + 1e-12 * self._size:
            return None
        return self._summed(picked, [1.0] * len(picked))

    def scaled(self, some: Sequence[int]) -> Solution | None:
        """The sum with coefficients: parameters of the block, else one fitted number each."""
        picked = list(some)
        fitted = self._fitted(picked)
        solution = None if fitted is None else self._summed(picked, fitted)
        if solution is None and self._vectors and len(picked) <= 3:
            names = self._named(picked)
            solution = None if names is None else self._summed(picked, names)
        return solution

    def _fitted(self, picked: list[int]) -> list[float | str] | None:
        """The least squares if they leave no more than rounding: each a parameter, or what is in a configuration."""
        inner, target = self._inner[picked][:, picked], self._with_delta[picked]
        try:
            numbers = torch.linalg.solve(inner, target)
            spread = torch.linalg.inv(inner).diagonal()
        except RuntimeError:
            return None
        rest = self._size - float(numbers @ target)
        if abs(rest) > self._allowed + 1e-10 * self._size or bool((numbers.abs() < 1e-3).any()):
            return None
        errors = (spread.clamp(min=0) * abs(rest) / self._delta.numel()).sqrt()
        return [self._known(c, error) for c, error in zip(numbers.tolist(), errors.tolist(), strict=True)]

    def _known(self, c: float, error: float) -> float | str:
        """What a fitted number cannot be told from, given its standard error; itself, if it is nothing known."""
        allowed = 32 * error + 4 * torch.finfo(torch.float32).eps * abs(c)
        known: dict[float | str, float] = {1.0: 1.0, **self._numbers}
        nearest = min(known, key=lambda name: abs(known[name] - c))
        if abs(known[nearest] - c) <= allowed:
            return nearest
        short = (float(f"{c:.{digits}g}") for digits in range(1, 5))  # as someone wrote it
        return next((number for number in short if abs(number - c) <= allowed), c)

    def _named(self, picked: list[int]) -> list[float | str] | None:
        """For each output the parameter that is nearest to the least squares of each channel, or 1."""
        delta = self._delta.flatten(0, -2)
        stacked = torch.stack(
            [self._outs[i].double().flatten(0, -2) for i in picked], -1
        )  # token channel output
        if len(delta) < 2 * len(picked):
            return None
        try:
            channels = torch.linalg.lstsq(stacked.transpose(0, 1), delta.T[..., None]).solution[..., 0].T
        except RuntimeError:
            return None
        names: list[float | str] = []
        for own in channels:
            errors: dict[float | str, float] = {1.0: (own - 1).abs().max().item()}
            errors |= {n: (own - value.double()).abs().max().item() for n, value in self._scales.items()}
            names.append(min(errors, key=lambda name: errors[name]))
        return names if any(isinstance(name, str) for name in names) else None

    def _summed(self, picked: list[int], coefficients: Sequence[float | str]) -> Solution | None:
        """The solution, if these terms make the stream in one of the ways in which a model may add them."""
        pre, post = self._pre, self._post
        terms = [
            self._outs[i]
            if c == 1.0
            else self._outs[i] * (self._scales[c].to(pre.dtype) if isinstance(c, str) else c)
            for i, c in zip(picked, coefficients, strict=True)
        ]
        states, total = [pre], pre
        for term in terms:
            total = total + term
            states.append(total)
        sums = [total]
        if len(terms) == 2:  # parallel branches are often added to one another first
            sums += [pre + (terms[0] + terms[1]), (pre + terms[1]) + terms[0]]
        if self._gain != 1.0:
            sums = [one * self._scales[str(self._gain)].to(pre.dtype) for one in sums]
        if not any(_equal(one, post, pre, terms) for one in sums):
            return None
        if len(terms) > 1 and any(_negligible(term, pre, post) for term in terms):
            return None
        found = tuple(Term(self._calls[i], c) for i, c in zip(picked, coefficients, strict=True))
        return Solution(found, tuple(states[:-1]), self._gain)


def _equal(total: Tensor, post: Tensor, pre: Tensor, terms: Sequence[Tensor]) -> bool:
    """To rounding at every entry; in a half precision, bit for bit nearly everywhere too."""
    if not bool(torch.isfinite(post).all()):
        return False
    wide = post.dtype in _WIDE
    step = torch.finfo(torch.float32 if wide else post.dtype).eps
    size = pre.abs().double() + sum(term.abs().double() for term in terms)
    allowed = (8 if wide else 2) * step * size + (1e-12 if wide else torch.finfo(post.dtype).tiny)
    if not bool(((total.double() - post.double()).abs() <= allowed).all()):
        return False
    return wide or (total == post).double().mean().item() >= _EXACT


def _negligible(term: Tensor, pre: Tensor, post: Tensor) -> bool:
    """A term that rounding could hide at every entry proves nothing."""
    return bool((term.abs() <= 2 * torch.finfo(pre.dtype).eps * post.abs()).all())
