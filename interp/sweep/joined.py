"""Attention to a shared prefix and to a segment of one's own, each by itself and joined by their shares of the softmax.

The lanes of a row are so many more queries to the one prefix: none of its keys is copied. This is the kernel that SDPA
runs on a CPU, which gives out, besides, the logarithm of what its softmax divides by.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_WIDE = (torch.float32, torch.float64)
"""In half precision both parts would be rounded before they are joined."""


def can_join(
    query: Float[Tensor, "lane head query d_head"], value: Float[Tensor, "lane kv_head own d_value"]
) -> bool:
    """Whether the kernel is there for these."""
    there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    kind = query.device.type == "cpu" and query.dtype in _WIDE and query.dtype == value.dtype
    return there and kind and query.shape[-1] == value.shape[-1]


def joined(
    query: Float[Tensor, "lane head query d_head"],
    own: tuple[Float[Tensor, "lane kv_head own d_head"], Float[Tensor, "lane kv_head own d_head"]],
    prefix: tuple[Float[Tensor, "batch kv_head prefix d_head"], Float[Tensor, "batch kv_head prefix d_head"]],
    visible: Bool[Tensor, "_ 1 query key"],
    causal: bool,
    scale: float,
) -> Float[Tensor, "lane head query d_head"]:
    """What each lane's queries mix of the prefix and of their own segment.

    Args:
        query: the lanes' queries, all rows of one lane behind those of another.
        own: keys and values of the segment; the queries are those of its tokens, or of some of them.
        prefix: keys and values before it, of every row.
        visible: which keys (prefix, then segment) each query may look at; the first axis may be 1, the rows of the
            batch, or all lanes.
        causal: whether nothing before a query is hidden from it.
        scale: of the scores.
    """
    (keys, values), n = prefix, query.shape[2]
    rows, before = keys.shape[0], keys.shape[2]
    near, near_shares = _near(query, own, visible[..., before:], scale)
    far_visible = None if causal else visible[..., :before]
    if far_visible is not None:
        first = _first_seen(far_visible)
        if first == before:
            return near
        keys, values, far_visible = keys[:, :, first:], values[:, :, first:], far_visible[..., first:]
        far_visible = None if bool(far_visible.all()) else _to_rows(far_visible, len(query), rows)
    together = query.unflatten(0, (-1, rows)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    far, shares = _attend(together, keys, values, far_visible, scale)
    far = far.unflatten(2, (-1, n)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    shares = shares.unflatten(2, (-1, n)).permute(2, 0, 1, 3).flatten(0, 1)
    share = (shares - near_shares).nan_to_num_(nan=0.0).sigmoid_()  # nothing is seen of either: both are 0
    return near.lerp_(far, share[..., None])


def _near(
    query: Float[Tensor, "lane head query d_head"],
    own: tuple[Tensor, Tensor],
    visible: Bool[Tensor, "_ 1 query own"],
    scale: float,
) -> tuple[Float[Tensor, "lane head query d_head"], Float[Tensor, "lane head query"]]:
    square = visible.shape[-2] == visible.shape[-1]
    if square and torch.equal(visible, torch.ones_like(visible).tril()):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, *own, 0.0, True, scale=scale)
    some = None if bool(visible.all()) else visible
    if some is not None and some.shape[0] not in (1, len(query)):
        some = some.repeat(len(query) // len(some), 1, 1, 1)
    return _attend(query, *own, some, scale)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Bool[Tensor, "_ 1 query key"] | None, scale: float
) -> tuple[Float[Tensor, "lane head query d_head"], Float[Tensor, "lane head query"]]:
    """What is mixed, and the logarithm of what the softmax divides by: minus infinity where nothing is seen."""
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    out, shares = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    if visible is not None:  # the kernel says 0
        shares = shares.masked_fill(~visible.any(-1), -torch.inf)
    return out, shares


def _first_seen(visible: Bool[Tensor, "_ 1 query prefix"]) -> int:
    """The first column of the prefix that any query sees, its length if none is."""
    seen = visible.flatten(0, 2).any(0).nonzero()
    return int(seen[0]) if len(seen) else visible.shape[-1]


def _to_rows(
    visible: Bool[Tensor, "_ 1 query prefix"], lanes: int, rows: int
) -> Bool[Tensor, "_ 1 some prefix"]:
    """As the queries of all lanes of a row stand behind one another."""
    if visible.shape[0] == lanes:
        return visible[:, 0].unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)[:, None]
    return visible.repeat(1, 1, lanes // rows, 1)
