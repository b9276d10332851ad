"""One block, looked at while the model runs: its writers with their roles, and its attention sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hooks.anatomy.experts import experts_of
from hooks.anatomy.nouns import Block, Role, Site, Writer
from hooks.anatomy.sites import joined, site_of
from hooks.anatomy.towers import is_linear
from hooks.anatomy.watching import Attended, Call, first_floating, floating_parts
from hooks.anatomy.writers import Solution, solve


def look_at(
    model: nn.Module, whole: Call, calls: Sequence[Call], attended: Sequence[Attended], names: dict[int, str]
) -> Block:
    """What a block is, from one call of it.

    Args:
        model: the model.
        whole: the block's own call.
        calls: of the modules below it, with copies of what went in and out.
        attended: the attention calls inside.
        names: module id to path.
    """
    assert whole.given is not None
    sites = _sites(model, whole.path, calls, attended, names)
    post = next((out for out in whole.made.values() if out.shape == whole.given.shape), None)
    if post is None:
        return Block(whole.path, whole.key, (), sites, "Its output has another shape than its stream.")
    ended = [call for call in calls if call.ended >= 0]
    solution = solve(model.get_submodule(whole.path), whole.path, whole.given, post, ended)
    if solution is None:
        writers = _with_a_rest(model, whole, post, ended, sites, attended, names)
        if writers:
            return Block(whole.path, whole.key, writers, sites)
        why = "What it adds to its stream is not a sum of its parts' outputs, as far as was tried."
        return Block(whole.path, whole.key, (), sites, why)
    writers = _writers(model, whole, solution, ended, sites, attended, names)
    return Block(whole.path, whole.key, writers, sites, gain=solution.gain)


def _sites(
    model: nn.Module,
    path: str,
    calls: Sequence[Call],
    attended: Sequence[Attended],
    names: dict[int, str],
) -> tuple[Site, ...]:
    by_module: dict[int, list[Attended]] = {}
    for one in attended:
        if names.get(id(one.module), "").startswith(f"{path}."):
            by_module.setdefault(id(one.module), []).append(one)
    return tuple(site_of(model, names[key], joined(some), calls) for key, some in by_module.items())


def _writers(
    model: nn.Module,
    whole: Call,
    solution: Solution,
    calls: Sequence[Call],
    sites: Sequence[Site],
    attended: Sequence[Attended],
    names: dict[int, str],
) -> tuple[Writer, ...]:
    found: list[Writer] = []
    since = whole.started
    times = {names.get(id(one.module), ""): one.time for one in attended}
    for term in solution.terms:
        own = term.call
        inside = [call for call in calls if since < call.started and call.ended <= own.ended]
        body = _body(model, own, calls)
        site = next((s for s in sites if since < times[s.module] < own.ended), None)
        role: Role = _role(model, body, site)
        state, reader = _reads(model, solution, body, inside, calls)
        alone = _alone(reader, body, calls)
        parts: tuple[str, ...] = ()
        experts, why = None, ""
        if role in ("mlp", "moe"):
            experts, why = experts_of(model, whole, body, inside)
            role = "mlp" if experts is None and role == "mlp" else "moe"
            parts = () if alone and _has_linear(model, body) else _makers(model, inside)
        last = _last(model, body, calls) if role == "mlp" else None
        why = why if role == "moe" else ""
        found.append(
            Writer(
                role, own.path, body.path, term.coefficient, state, reader, site, last,
                experts=experts, why=why, parts=parts, alone=alone,
            )
        )  # fmt: skip
        since = own.ended
    return tuple(found)


def _with_a_rest(
    model: nn.Module,
    whole: Call,
    post: Tensor,
    calls: Sequence[Call],
    sites: Sequence[Site],
    attended: Sequence[Attended],
    names: dict[int, str],
) -> tuple[Writer, ...]:
    """Writers up to a stream that a module inside is given, and one for all that is added behind it.

    Mllama multiplies what its cross-attention layers' MLPs write by a mask of tokens, inline.
    """
    assert whole.given is not None
    pre = whole.given
    for reader in sorted(calls, key=lambda call: -call.started):
        mid = reader.given
        if mid is None or mid.shape != pre.shape or _equal(mid, pre) or _equal(mid, post):
            continue
        before = [call for call in calls if call.ended < reader.started]
        first = solve(model.get_submodule(whole.path), whole.path, pre, mid, before)
        after = [call for call in calls if call.started >= reader.started and _has_linear(model, call)]
        if first is None or first.gain != 1.0 or not after:
            continue
        body = min(after, key=lambda call: (call.path.count("."), call.started))
        site = next((s for s in sites if s.module.startswith(body.path)), None)
        role = _role(model, body, site)
        last = _last(model, body, calls) if role == "mlp" else None
        own = _writers(model, whole, first, before, sites, attended, names)
        rest = Writer(role, whole.path, body.path, 1.0, len(own), reader.path, site, last, True)
        return (*own, rest)
    return ()


def _body(model: nn.Module, own: Call, calls: Sequence[Call]) -> Call:
    """The part behind a post-norm: what goes into modules that hold no linear layer is followed to what made it."""
    body = own
    while not _has_linear(model, body) and (maker := _maker(body, calls)) is not None:
        body = maker
    return body


def _has_linear(model: nn.Module, call: Call) -> bool:
    return any(is_linear(part) for part in model.get_submodule(call.path).modules())


def _makers(model: nn.Module, calls: Sequence[Call]) -> tuple[str, ...]:
    """The outermost modules with matrices, where no one module makes what is added, and the norms behind them."""
    paths = [
        call.path for call in calls if any(v.ndim > 1 for v in model.get_submodule(call.path).parameters())
    ]
    makers = [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{other}.") for other in paths)]
    norms = [
        call.path
        for call in calls
        if not _has_linear(model, call)
        and any(True for _ in model.get_submodule(call.path).parameters())
        and (maker := _maker(call, calls)) is not None
        and maker.path in makers
    ]
    return (*makers, *dict.fromkeys(norms))


def _maker(of: Call, calls: Sequence[Call]) -> Call | None:
    """The outermost module whose output goes into another."""
    makers = [
        call
        for call in calls
        if of.given is not None
        and call.ended < of.started
        and call.out is not None
        and _equal(call.out, of.given)
    ]
    return min(makers, key=lambda call: (call.path.count("."), call.started), default=None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.dtype == b.dtype and bool(torch.equal(a.reshape(b.shape), b))


def _reads(
    model: nn.Module, solution: Solution, body: Call, inside: Sequence[Call], calls: Sequence[Call]
) -> tuple[int | None, str | None]:
    """The latest state that a module of this writer is given as it is, and the first such module.

    A norm that parallel branches share has run before: it is found upstream of the body.
    """
    upstream: list[Call] = [body]
    while (maker := _maker(upstream[-1], calls)) is not None and not _has_linear(model, maker):
        upstream.append(maker)
    for some in (inside, reversed(upstream)):
        for call in some:
            for index in reversed(range(len(solution.states))):
                if call.given is not None and _equal(call.given, solution.states[index]):
                    return index, call.path
    return None, None


def _alone(reader: str | None, body: Call, calls: Sequence[Call]) -> bool:
    """Whether a body is given what the reader gives out, or holds the reader."""
    if reader is None or reader == body.path or reader.startswith(f"{body.path}."):
        return True
    outs = [call.out for call in calls if call.path == reader and call.out is not None]
    return body.given is not None and any(_equal(out, body.given) for out in outs)


def _role(model: nn.Module, body: Call, site: Site | None) -> Role:
    if site is not None:
        return "cross_attn" if site.cross else "attn"
    module = model.get_submodule(body.path)
    if mixes_tokens(module, body):
        return "mixer"
    return "moe" if _has_experts(module) else "mlp"


def _has_experts(module: nn.Module) -> bool:
    if any(value.ndim == 3 and value.shape[0] > 1 for value in module.parameters()):
        return not any(isinstance(part, nn.Conv1d) for part in module.modules())
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 1)
    return any(
        len({type(member) for member in some}) == 1 and sum(map(is_linear, some[0].modules())) > 1
        for some in lists
    )


@torch.no_grad()
def mixes_tokens(module: nn.Module, call: Call) -> bool:
    """Whether the output at a token depends on other tokens: one is changed, and the rows that move are looked at."""
    if call.arguments is None or call.given is None or call.given.ndim < 2:
        return False
    args, kwargs = call.arguments
    tokens = call.given.shape[-2]
    if tokens < 2:
        return False
    changed = call.given.clone()
    changed[..., 0, :] = changed[..., 0, :].roll(1, -1) + 1
    key, _ = first_floating(args, kwargs)
    if key is None:
        place = next(
            i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()
        )
        args = (*args[:place], changed.reshape(args[place].shape), *args[place + 1 :])
    else:
        kwargs = {**kwargs, key: changed}
    forward: Any = module.forward
    try:
        new, old = (
            next(iter(floating_parts(forward(*a, **k)).values())) for a, k in ((args, kwargs), call.arguments)
        )
    except (RuntimeError, TypeError, ValueError, StopIteration, IndexError, AttributeError):
        return False
    if new.shape != old.shape or new.numel() % tokens:
        return False
    rows = (new - old).reshape(-1, tokens, new.shape[-1])[:, 1:].abs().amax()
    return float(rows) > 1e-6 * float(old.abs().amax())


def _last(model: nn.Module, body: Call, calls: Sequence[Call]) -> str | None:
    """The linear layer below an MLP whose output is the MLP's."""
    for call in reversed(calls):
        if not (call.path == body.path or call.path.startswith(f"{body.path}.")):
            continue
        made = call.out is not None and body.out is not None and _equal(call.out, body.out)
        if made and is_linear(model.get_submodule(call.path)):
            return call.path
    return None
