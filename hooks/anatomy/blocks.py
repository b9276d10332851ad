"""One block, looked at while the model runs: its writers with their roles, and its attention sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hooks.anatomy.again import Again, NotAgain
from hooks.anatomy.experts import experts_of
from hooks.anatomy.nouns import Block, Role, Site, Writer
from hooks.anatomy.sites import joined, site_of
from hooks.anatomy.towers import is_linear
from hooks.anatomy.watching import Attended, Call
from hooks.anatomy.writers import Solution, solve


@dataclass(frozen=True)
class _Look:
    """What one block was seen to do.

    Attributes:
        model: the model.
        whole: the block's own call.
        calls: those of the modules below it that have ended, with copies of what went in and out.
        sites: its attention.
        times: when each of its modules attended, by path.
        again: the block, to be run once more.
    """

    model: nn.Module
    whole: Call
    calls: Sequence[Call]
    sites: tuple[Site, ...]
    times: Mapping[str, int]
    again: Again

    def module(self, call: Call) -> nn.Module:
        return self.model.get_submodule(call.path)

    def elsewhere(self, call: Call) -> bool:
        """Whether what a module is given are other tokens than those of the stream, or some of them."""
        rows = [given.shape[:-1].numel() for given in (self.whole.given, call.given) if given is not None]
        return len(set(rows)) > 1


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
    times = {names.get(id(one.module), ""): one.time for one in attended}
    look = _Look(model, whole, ended, sites, times, Again(model, whole, calls))
    try:
        solution = solve(model.get_submodule(whole.path), whole.path, whole.given, post, ended)
        if solution is not None:
            return Block(whole.path, whole.key, _writers(look, solution), sites, gain=solution.gain)
        if writers := _with_a_rest(look, post):
            return Block(whole.path, whole.key, writers, sites)
    except NotAgain as error:
        return Block(whole.path, whole.key, (), sites, f"What its parts do cannot be told: {error}.")
    why = "What it adds to its stream is not a sum of its parts' outputs, as far as was tried."
    return Block(whole.path, whole.key, (), sites, why)


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


def _writers(look: _Look, solution: Solution) -> tuple[Writer, ...]:
    found: list[Writer] = []
    held: list[Call] = []
    since = look.whole.started
    for term in solution.terms:
        inside = [call for call in look.calls if since < call.started and call.ended <= term.call.ended]
        found.append(_writer(look, term.call, term.coefficient, inside, held, solution))
        held.append(term.call)
        since = term.call.ended
    return tuple(found)


def _writer(
    look: _Look,
    own: Call,
    coefficient: float | str,
    inside: Sequence[Call],
    held: Sequence[Call],
    solution: Solution,
) -> Writer:
    """One writer: what ran since the one before it (`inside`), while what was written earlier stays what it is."""
    makers = _makers(look, inside)
    body = _body(look, own, makers)
    makers = [
        call for call in makers if call is body or call is not own
    ]  # a convolution where others have a norm
    site = next(
        (s for s in look.sites if inside and inside[0].started < look.times[s.module] < own.ended), None
    )
    role, site = _role(look, body, makers, site, held)
    state, reader = _reads(look, solution, body, inside)
    experts, why = None, ""
    if role in ("mlp", "moe"):
        experts, why = experts_of(look.model, look.whole, body, inside)
        role = "mlp" if experts is None and role == "mlp" else "moe"
    return Writer(
        role, own.path, body.path, coefficient, state, reader, site,
        last=_last(look, body) if role == "mlp" else None,
        experts=experts,
        why=why if role == "moe" else "",
        parts=_parts(look, own, body, makers, inside),
        alone=_alone(reader, body, look.calls),
    )  # fmt: skip


def _with_a_rest(look: _Look, post: Tensor) -> tuple[Writer, ...]:
    """Writers up to a stream that a module inside is given, and one for all that becomes of it behind.

    Mllama multiplies what its cross-attention layers' MLPs write by a mask of tokens, inline. BERT's norms stand in the
    stream itself.
    """
    whole, pre = look.whole, look.whole.given
    assert pre is not None
    for reader in sorted(look.calls, key=lambda call: -call.started):
        mid = reader.given
        if mid is None or mid.shape != pre.shape or _equal(mid, pre) or _equal(mid, post):
            continue
        before = [call for call in look.calls if call.ended < reader.started]
        makers = _makers(look, [call for call in look.calls if call.started >= reader.started])
        first = solve(look.model.get_submodule(whole.path), whole.path, pre, mid, before)
        if first is None or first.gain != 1.0 or not makers:
            continue
        earlier = _writers(look, first)
        return (*earlier, _rest(look, reader, makers, [term.call for term in first.terms], len(earlier)))
    return ()


def _rest(look: _Look, reader: Call, makers: Sequence[Call], held: Sequence[Call], state: int) -> Writer:
    """What becomes of the stream that `reader` is given: a part's own, if without the part it would stay what it is."""
    whole = look.whole
    assert reader.given is not None
    left = look.again.without(makers)
    eps = torch.finfo(left.dtype).eps
    stays = bool((left - reader.given).abs().max() <= 8 * eps * reader.given.abs().max())
    if not stays or len(makers) > 1:
        parts = tuple(call.path for call in makers)
        return Writer("rest", whole.path, whole.path, 1.0, state, reader.path, rest=True, parts=parts)
    body = makers[0]
    site = next((s for s in look.sites if s.module.startswith(body.path)), None)
    role, site = _role(look, body, makers, site, held)
    last = _last(look, body) if role == "mlp" else None
    return Writer(role, whole.path, body.path, 1.0, state, reader.path, site, last, rest=True)


def _body(look: _Look, own: Call, makers: Sequence[Call]) -> Call:
    """The part behind a post-norm: what goes into modules that hold no linear layer is followed to what made it.

    Where something else lies between (a layer scale), it is the one part that there is.
    """
    body = own
    while not _has_linear(look, body) and (maker := _maker(body, look.calls)) is not None:
        body = maker
    alone = len(makers) == 1 and not _has_linear(look, body)
    return makers[0] if alone else body


def _has_linear(look: _Look, call: Call) -> bool:
    return any(is_linear(part) for part in look.module(call).modules())


def _makers(look: _Look, calls: Sequence[Call]) -> list[Call]:
    """The outermost modules with matrices of their own."""
    some = {c.path: c for c in calls if any(v.ndim > 1 for v in look.module(c).parameters())}
    return [call for path, call in some.items() if not any(path.startswith(f"{other}.") for other in some)]


def _parts(
    look: _Look, own: Call, body: Call, makers: Sequence[Call], inside: Sequence[Call]
) -> tuple[str, ...]:
    """The modules that make it together, where it is not one alone, and the norms behind each."""
    paths = [call.path for call in makers]
    if paths == [body.path]:
        return ()
    norms = [
        call.path
        for call in inside
        if call is not own
        and not _has_linear(look, call)
        and any(True for _ in look.module(call).parameters())
        and (maker := _maker(call, inside)) is not None
        and maker.path in paths
    ]
    return (*paths, *dict.fromkeys(norms))


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
    look: _Look, solution: Solution, body: Call, inside: Sequence[Call]
) -> tuple[int | None, str | None]:
    """The latest state that a module of this writer is given as it is, and the first such module.

    A norm that parallel branches share has run before: it is found upstream of the body.
    """
    upstream: list[Call] = [body]
    while (maker := _maker(upstream[-1], look.calls)) is not None and not _has_linear(look, maker):
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


def _role(
    look: _Look, body: Call, makers: Sequence[Call], site: Site | None, held: Sequence[Call]
) -> tuple[Role, Site | None]:
    """What a part does, and its attention: another mixer may stand behind an attention call (Zamba 2)."""
    if site is not None and not _mixes_behind(look, site, makers, body):
        return "cross_attn" if site.cross else "attn", site
    if site is not None or look.again.mixes(body, held):
        return "mixer", None
    if any(look.again.mixes_behind(call, body) for call in makers if look.elsewhere(call)):
        return "cross_attn", None
    return "moe" if any(_has_experts(look.module(call)) for call in (*makers, body)) else "mlp", None


def _mixes_behind(look: _Look, site: Site, makers: Sequence[Call], body: Call) -> bool:
    if len(makers) == 1:  # one module, which is the attention
        return False
    source = next(call for call in reversed(look.calls) if call.path == site.module)
    return source.path != body.path and look.again.mixes_behind(source, body)


def _has_experts(module: nn.Module) -> bool:
    if any(value.ndim == 3 and value.shape[0] > 1 for value in module.parameters()):
        return not any(isinstance(part, nn.Conv1d) for part in module.modules())
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 1)
    return any(
        len({type(member) for member in some}) == 1 and sum(map(is_linear, some[0].modules())) > 1
        for some in lists
    )


def _last(look: _Look, body: Call) -> str | None:
    """The linear layer below an MLP whose output is the MLP's."""
    for call in reversed(look.calls):
        if not (call.path == body.path or call.path.startswith(f"{body.path}.")):
            continue
        made = call.out is not None and body.out is not None and _equal(call.out, body.out)
        if made and is_linear(look.module(call)):
            return call.path
    return None
