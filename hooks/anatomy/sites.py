"""Attention sites: heads and sizes as a call of the attention interface shows them, and the projections around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy.nouns import Site, Slice
from hooks.anatomy.towers import is_linear
from hooks.anatomy.watching import Attended, Call


def site_of(model: nn.Module, path: str, seen: Attended, calls: Sequence[Call]) -> Site:
    """One attention call as a site.

    Args:
        model: the model.
        path: of the module that called.
        seen: the call.
        calls: of the modules of the block, with copies of what went in and out.
    """
    n_heads, n_kv = seen.query.shape[1], seen.key.shape[1]
    d_head, d_value = seen.query.shape[-1], seen.value.shape[-1]
    linears = [
        call for call in calls if _within(call.path, path) and is_linear(model.get_submodule(call.path))
    ]
    others = [call for call in calls if _within(call.path, path)]
    linears = _outermost(linears)
    z = _flat_out(seen, n_heads, d_value)
    out = next((call for call in linears if call.given is not None and _holds(call.given, z)), None)
    q = _projection(linears, others, seen.query, n_heads, d_head, seen.time)
    k = _projection(linears, others, seen.key, n_kv, d_head, seen.time)
    v = _projection(linears, others, seen.value, n_kv, d_value, seen.time)
    rotary = q is None or k is None or not (q[1] and k[1])
    given = {one[0].module: one[2] for one in (q, k) if one is not None}
    cross = seen.key.shape[2] != seen.query.shape[2]
    if not cross and q is not None and k is not None:
        # Projections with inputs of their own may be of latents of one stream, or of keys that layers share.
        same = _equal_inputs(given[q[0].module], given[k[0].module])
        cross = not same and not _looks_back(z, seen.value, n_heads)
    return Site(
        path, n_heads, n_kv, d_head, d_value,
        q and q[0], k and k[0], v and v[0], out and out.path, rotary, cross,
    )  # fmt: skip


def _looks_back(
    z: Float[Tensor, "token width"], values: Float[Tensor, "batch kv_head pos d"], heads: int
) -> bool:
    """Whether the first token is given its own value alone, head by head, up to a factor (sinks take a share)."""
    z = z.unflatten(0, (len(values), -1))[:, 0].unflatten(-1, (heads, -1)).double()
    own = values[:, :, 0].repeat_interleave(heads // values.shape[1], dim=1).double()
    near = torch.nn.functional.cosine_similarity(z, own, dim=-1)
    return bool((1 - near <= torch.finfo(values.dtype).eps).all())


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def joined(calls: Sequence[Attended]) -> Attended:
    """One call per module: windows that a packed tower hands over one by one are put behind one another."""
    first = calls[0]
    if len(calls) == 1 or any(one.query.shape[0] != 1 for one in calls):
        return first
    states = {
        name: torch.cat([getattr(one, name) for one in calls], dim=2) for name in ("query", "key", "value")
    }
    return Attended(first.module, calls[-1].time, **states, out=torch.cat([one.out for one in calls], dim=1))


def _outermost(calls: Sequence[Call]) -> list[Call]:
    """Wrapped layers (adapters) count as one: the wrapper."""
    paths = {call.path for call in calls}
    return [call for call in calls if not any(call.path.startswith(f"{p}.") for p in paths if p != call.path)]


def _equal_inputs(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and bool(torch.equal(a, b))


def _flat_out(seen: Attended, n_heads: int, d_value: int) -> Float[Tensor, "token width"]:
    """The call's output, one row a token, heads side by side."""
    out = seen.out
    if out.shape[-1] == n_heads * d_value:
        return out.reshape(-1, n_heads * d_value)
    if out.ndim == 4 and out.shape[1] == n_heads and out.shape[2] != n_heads:  # not yet transposed
        out = out.transpose(1, 2)
    return out.reshape(-1, n_heads * d_value)


def _holds(given: Tensor, z: Tensor) -> bool:
    """Whether what goes into a layer is z, token by token (of several calls, these rows among others)."""
    if given.shape[-1] != z.shape[-1]:
        return False
    rows = given.reshape(-1, given.shape[-1])
    if len(rows) == len(z):
        return bool(torch.equal(rows, z.to(rows.dtype)))
    return len(rows) > len(z) and any(
        bool(torch.equal(rows[i : i + len(z)], z.to(rows.dtype)))
        for i in range(0, len(rows) - len(z) + 1, len(z))
    )


def _projection(
    linears: Sequence[Call],
    others: Sequence[Call],
    states: Float[Tensor, "batch head pos d"],
    heads: int,
    d: int,
    before: int,
) -> tuple[Slice, bool, Tensor | None] | None:
    """The linear layer and the part of its output that became these states; whether unchanged; and its input."""
    target = states.transpose(1, 2).reshape(-1, heads, d)  # token head d
    for changed in (False, True):
        for call in linears:
            if call.out is None or call.ended < 0 or call.ended > before:
                continue
            rows = call.out.reshape(-1, call.out.shape[-1])
            if len(rows) != len(target) or rows.shape[-1] < heads * d:
                continue
            for groups, start, length in layouts(rows.shape[-1], heads, d):
                part = rows.unflatten(-1, (groups, -1)).narrow(-1, start, length).reshape(len(rows), heads, d)
                if (_rotated if changed else _unchanged)(part, target, others):
                    width = rows.shape[-1] // groups
                    own = Slice(call.path, heads, groups, start, length, width)
                    return own, not changed, call.given
    return None


def layouts(width: int, heads: int, d: int) -> Iterator[tuple[int, int, int]]:
    """(groups, start, length): the ways in which a layer's outputs hold `heads` heads of size `d`."""
    if width == heads * d:
        yield 1, 0, width
        return
    step = d  # blocks behind one another: [q | k | v]
    for start in range(0, width - heads * d + 1, step):
        yield 1, start, heads * d
    for groups in (g for g in range(heads, 1, -1) if heads % g == 0 and width % g == 0):
        own, a_group = heads // groups * d, width // groups
        starts = {*range(0, a_group - own + 1, d), a_group - own}
        for start in sorted(starts):
            if own < a_group:
                yield groups, start, own


def _unchanged(part: Tensor, target: Tensor, others: Sequence[Call]) -> bool:
    return bool(torch.equal(part, target.to(part.dtype)))


def _rotated(part: Tensor, target: Tensor, others: Sequence[Call]) -> bool:
    """Every head has kept its length, up to one factor; or a norm before or after the rotation explains the rest."""
    if _lengths_kept(part, target):
        return True
    for call in others:
        given, made = call.given, call.out
        if given is None or made is None or given.numel() != part.numel() or made.shape != given.shape:
            continue
        if given.shape[-1] not in (part.shape[-1], part.shape[1] * part.shape[2]):
            continue
        for own_given, own_made in _orders(given, made, part.shape):
            normed_first = torch.equal(own_given, part) and _lengths_kept(own_made, target)
            if normed_first or (torch.equal(own_made, target) and _lengths_kept(part, own_given)):
                return True
    return False


def _orders(given: Tensor, made: Tensor, shape: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
    yield given.reshape(shape), made.reshape(shape)
    if given.ndim == 4 and given.shape[1] == shape[1]:  # already [batch head pos d]
        yield given.transpose(1, 2).reshape(shape), made.transpose(1, 2).reshape(shape)


def _lengths_kept(part: Tensor, target: Tensor) -> bool:
    a, b = part.double().norm(dim=-1), target.double().norm(dim=-1)
    if not bool((a > 0).all()):
        return False
    ratio = b / a
    eps = torch.finfo(target.dtype).eps
    return bool((ratio / ratio.mean() - 1).abs().max() <= max(4 * eps, 1e-5))
