"""The experts of an MLP where they are one module: how it is called, and which router chooses them.

What is looked for is a call, not a name: a module that is given tokens [token d], for each token the chosen experts
[token k] and their weights [token k], and gives out [token d]; or (Llama 4) one that is given every token once for each
expert, weighted already, [expert*token d]. Each find is an equation on the tensors that were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hooks.anatomy.nouns import Experts
from hooks.anatomy.precise import eps_of, within_rounding
from hooks.anatomy.watching import Call, floating_parts
from hooks.errors import one_line

SEPARATE = "its experts are modules called one by one, so no call shows which tokens each of them is given."
UNKNOWN = "its experts are not called with tokens, the chosen experts and their weights."


class LinearMap(TorchFunctionMode):
    """While a module runs, the result of its linear map by one of its own parameters goes through a function.

    Routers compute logits, choose and return the chosen, all in one forward: no hook of PyTorch's stands between.

    Args:
        module: the router.
        name: the parameter, [expert d].
        fn: what takes the logits' place, or None for no change.
    """

    def __init__(self, module: nn.Module, name: str, fn: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._module, self._name, self._fn = module, name, fn
        self._same: list[Tensor] = []  # the parameter in another precision, or transposed

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        weight = getattr(self._module, self._name)
        mine = [a for a in (*args, *(kwargs or {}).values()) if any(a is w for w in (weight, *self._same))]
        if not mine or not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if len([a for a in args if isinstance(a, Tensor)]) == 1 and out.numel() == weight.numel():
            self._same.append(out)
        elif out.ndim >= 2 and out.shape[-1] == weight.shape[0]:
            new = self._fn(out)
            return out if new is None else new
        return out


def called(
    experts: Experts,
    hidden: Float[Tensor, "token d"],
    chosen: Int[Tensor, "token k"],
    weights: Float[Tensor, "token k"],
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of the experts."""
    given = {experts.hidden: hidden, experts.chosen: chosen, experts.weights: weights}
    args = tuple(given[place] for place in sorted(p for p in given if isinstance(p, int)))
    return args, {name: value for name, value in given.items() if isinstance(name, str)}


@torch.no_grad()
def experts_of(
    model: nn.Module, whole: Call, body: Call, calls: Sequence[Call]
) -> tuple[Experts | None, str]:
    """The experts among some calls, and why there are none.

    Args:
        model: the model.
        whole: the call of the block.
        body: of the MLP.
        calls: of what ran for this writer, with their arguments.
    """
    assert whole.given is not None
    tokens = whole.given.shape[:-1].numel()
    why = UNKNOWN
    for call in calls:
        found = _chosen(model, call) or _repeated(model, call, calls, tokens)
        if found is None:
            continue
        if _n_tokens(found, call) != tokens:
            why = "its experts are given other tokens than those of the stream."
            continue
        try:
            whole_call = _sums_up(model, found, call)
        except torch.OutOfMemoryError:  # says nothing about a point
            raise
        except Exception as error:
            why = f"its experts cannot be called for one expert each: {one_line(error, 200)}"
            continue
        if not whole_call:
            why = "what its experts give out is not the sum of what each gives for its own tokens."
            continue
        found = _routed(model, found, call, body, calls)
        return replace(found, added=_added(model, found, body)), ""
    listed = any(isinstance(part, nn.ModuleList) for part in model.get_submodule(body.path).modules())
    return None, SEPARATE if why == UNKNOWN and listed else why


def _tensors(call: Call) -> dict[int | str, Tensor] | None:
    """The arguments of a call by place; None if something else than tensors is among them."""
    if call.arguments is None:
        return None
    args, kwargs = call.arguments
    given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    return given if all(isinstance(value, Tensor) for value in given.values()) else None


def _first_axis(module: nn.Module) -> int:
    """How many experts a module holds: the first axis of its three-axis parameters, or the length of its list."""
    sizes = {value.shape[0] for value in module.parameters() if value.ndim == 3}
    lists = {len(part) for part in module.modules() if isinstance(part, nn.ModuleList)}
    sizes = sizes or lists
    return sizes.pop() if len(sizes) == 1 else 0


def _chosen(model: nn.Module, call: Call) -> Experts | None:
    given = _tensors(call)
    if given is None or len(given) != 3 or call.out is None or call.out.ndim != 2:
        return None
    whole = [place for place, value in given.items() if not value.is_floating_point() and value.ndim == 2]
    if len(whole) != 1 or given[whole[0]].dtype == torch.bool:
        return None
    shape = given[whole[0]].shape
    floats = [place for place in given if place != whole[0]]
    weights = [place for place in floats if given[place].shape == shape]
    if len(weights) != 1 or any(given[place].shape[:1] != shape[:1] for place in floats):
        return None
    hidden = next(place for place in floats if place != weights[0])
    n_experts = _first_axis(model.get_submodule(call.path))
    if given[hidden].ndim != 2 or len(call.out) != shape[0] or int(given[whole[0]].max()) >= n_experts:
        return None
    return Experts(call.path, n_experts, hidden, whole[0], weights[0])


def _repeated(model: nn.Module, call: Call, calls: Sequence[Call], tokens: int) -> Experts | None:
    """Experts that are given every token once for each of them, times its weight (0 where it is not chosen)."""
    given = _tensors(call)
    module = model.get_submodule(call.path)
    if given is None or len(given) != 1 or call.given is None or call.out is None:
        return None
    n_experts = _first_axis(module)
    rows = n_experts * tokens
    if n_experts < 2 or call.given.ndim != 2 or len(call.given) != rows or len(call.out) != rows:
        return None
    each = call.given.unflatten(0, (n_experts, tokens))
    for router in calls:
        scores = router.out
        if router.given is None or scores is None or scores.shape != (tokens, n_experts):
            continue
        if torch.equal(each, router.given.reshape(1, tokens, -1) * scores.T[..., None]):
            return Experts(call.path, n_experts, next(iter(given)), scores=router.path)
    return None


def _n_tokens(experts: Experts, call: Call) -> int:
    given = _tensors(call)
    assert given is not None
    return len(given[experts.hidden]) // (1 if experts.chosen is not None else experts.n_experts)


def _sums_up(model: nn.Module, experts: Experts, call: Call) -> bool:
    """Whether what the experts give out is the sum over a token's chosen ones, each called alone."""
    given = _tensors(call)
    assert given is not None and call.out is not None
    if experts.chosen is None or experts.weights is None:
        return True
    chosen, weights = given[experts.chosen], given[experts.weights]
    k = chosen.shape[1]
    hidden = given[experts.hidden].repeat_interleave(k, 0)
    forward: Any = model.get_submodule(call.path).forward
    args, kwargs = called(experts, hidden, chosen.reshape(-1, 1), weights.reshape(-1, 1))
    parts = forward(*args, **kwargs).unflatten(0, (-1, k))
    total, out = parts.double().sum(1), call.out.double()
    return within_rounding(total - out, parts.double().abs().sum(1), eps_of(call.out))


def _routed(model: nn.Module, experts: Experts, call: Call, body: Call, calls: Sequence[Call]) -> Experts:
    """The experts with their router: a linear map to one number an expert that, changed, changes who is chosen."""
    tokens = _n_tokens(experts, call)
    for one in reversed(calls):
        if one.arguments is None or one.ended > call.started or one.path.startswith(f"{call.path}."):
            continue
        module = model.get_submodule(one.path)
        for name, value in module.named_parameters(recurse=False):
            if value.ndim != 2 or value.shape[0] != experts.n_experts:
                continue
            logits, output = _rerun(module, name, one)
            if len(logits) != 1 or logits[0].numel() != tokens * experts.n_experts:
                continue
            plain = isinstance(output, Tensor)
            router = _outermost(model, one, calls) if plain else one.path
            found = replace(experts, router=router, router_weight="" if plain else name)
            if _decides(model, found, call, body, calls):
                return found
    return experts


def _rerun(module: nn.Module, name: str, call: Call) -> tuple[list[Tensor], Any]:
    """What the linear map by a parameter gives, and what its module does."""
    assert call.arguments is not None
    args, kwargs = call.arguments
    seen: list[Tensor] = []
    forward: Any = module.forward
    try:
        with LinearMap(module, name, seen.append):
            return seen, forward(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return [], None


def _decides(model: nn.Module, experts: Experts, call: Call, body: Call, calls: Sequence[Call]) -> bool:
    """Whether other logits choose other experts: what is around the router runs again, its logits in other order."""
    given = _tensors(call)
    assert given is not None
    if experts.chosen is None:
        before = next(c.out for c in calls if c.path == experts.scores)
    else:
        before = given[experts.chosen]
    assert before is not None
    around = [
        c for c in (*calls, body) if experts.router == c.path or experts.router.startswith(f"{c.path}.")
    ]
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.extend(
            v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point()
        )

    for one in sorted(around, key=lambda c: -c.path.count(".")):
        handle = model.get_submodule(experts.module).register_forward_pre_hook(look, with_kwargs=True)
        try:
            output = _with_other_logits(model, experts, one)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        finally:
            handle.remove()
        parts = [*seen, *(output if isinstance(output, tuple | list) else ())]
        alike = [
            p for p in parts if isinstance(p, Tensor) and (p.shape, p.dtype) == (before.shape, before.dtype)
        ]
        if experts.chosen is None:  # the scores are what the module gives out first
            alike = alike[:1]
        if alike:
            return any(not torch.equal(part, before) for part in alike)
    return False


def _with_other_logits(model: nn.Module, experts: Experts, one: Call) -> Any:
    args, kwargs = one.arguments or ((), {})
    forward: Any = model.get_submodule(one.path)
    router = model.get_submodule(experts.router)

    def rolled(logits: Tensor) -> Tensor:
        return logits.roll(1, -1)

    def act(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return rolled(output)

    if experts.router_weight:
        with LinearMap(router, experts.router_weight, rolled):
            return forward(*args, **kwargs)
    handle = router.register_forward_hook(act)
    try:
        return forward(*args, **kwargs)
    finally:
        handle.remove()


def _outermost(model: nn.Module, of: Call, calls: Sequence[Call]) -> str:
    """The module around a linear layer that gives out the logits: an adapter's, where one is wrapped around it."""
    path = of.path
    for call in calls:
        if call.started < of.started and of.path.startswith(f"{call.path}.") and call.ended > of.ended:
            own = [
                value for value in call.made.values() if of.out is not None and value.shape == of.out.shape
            ]
            args, kwargs = call.arguments or ((), {})
            forward: Any = model.get_submodule(call.path).forward
            if own and isinstance(forward(*args, **kwargs), Tensor):
                return call.path
    return path


def _added(model: nn.Module, experts: Experts, body: Call) -> bool:
    """Whether a change of what the experts give out is, as it is, a change of what the MLP gives out."""
    if body.arguments is None or body.out is None or not experts.module.startswith(f"{body.path}."):
        return False
    if experts.chosen is None:
        return False
    args, kwargs = body.arguments
    forward: Any = model.get_submodule(body.path).forward
    change = torch.zeros(())

    def shift(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        nonlocal change
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        change = noise * body.out.abs().mean() if body.out is not None else noise
        return output + change

    def first(output: Any) -> Tensor:
        return next(iter(floating_parts(output).values()))

    handle = None
    try:
        before = first(forward(*args, **kwargs)).clone()
        handle = model.get_submodule(experts.module).register_forward_hook(shift)
        after = first(forward(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, StopIteration):
        return False
    finally:
        if handle is not None:
            handle.remove()
    if change.numel() != before.numel():
        return False
    change = change.reshape(before.shape).double()
    size = before.double().abs() + after.double().abs() + change.abs()
    return within_rounding((after - before).double() - change, size, eps_of(before))
