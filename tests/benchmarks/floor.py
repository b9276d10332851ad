"""How much arithmetic a scan cannot avoid, in closed form.

Counted as `torch.utils.flop_counter` counts under the MATH backend: two operations per multiply-add of every matrix
product, attention's products over all keys (hidden ones included); nothing for norms, softmax and activations.

Unavoidable, for an intervention on a batch: from its layer up, every token from its first on, because what it changes
there reaches them all; in the last layer keys and values of those tokens, but queries, MLP and unembedding only of the
one token that is read. A head's z passes through its own rows of W_O only. On top, once per scan: the clean run of the
recipient, without which neither the keys before the first token nor the streams below the layer are known. The donor's
activations are given to every engine, and counted for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.benchmarks.arms import D_HEAD, Site
from tests.benchmarks.models import (
    ACTIVE,
    BATCH,
    D_MLP,
    EXPERTS,
    HEADS,
    KERNEL,
    LAYERS,
    TOKENS,
    WIDTH,
    WINDOW,
    convolves,
    slides,
)

PROJECTION = 2 * WIDTH * WIDTH  # per token: q, k, v or the output


def _of_attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


def _of_groups(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """A row goes through the weight of its own group alone."""
    return 2 * rows[0] * rows[1] * weight[-1]


def _of_product(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows) * weight[0]


ALSO_COUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._grouped_mm: _of_groups,
    torch.ops.mkldnn._linear_pointwise: _of_product,
}
"""Operations that PyTorch's counter does not know."""


def mlp(family: str) -> int:
    """Gate, up and down, per token; of the experts that it is sent to, and the router."""
    one = 2 * 3 * WIDTH * D_MLP[family]
    return ACTIVE * one + 2 * WIDTH * EXPERTS if family == "llava+qwen3_moe" else one


def attention(queries: int, keys: int) -> int:
    """Scores and mixing of one row."""
    return 2 * 2 * queries * keys * HEADS * D_HEAD


def block(family: str, layer: int, tokens: int, keys: int) -> int:
    """A whole block on the last `tokens` of `keys` tokens of one row."""
    every = tokens * (4 * PROJECTION + mlp(family))
    if convolves(family, layer):  # three projections in, one out; the convolution runs over its padding too
        return every + (tokens + KERNEL - 1) * 2 * KERNEL * WIDTH
    return every + attention(tokens, keys)


def last_block(family: str, tokens: int, keys: int) -> int:
    """The last block, which attends to all, and of which only the last token is read."""
    return tokens * 2 * PROJECTION + 2 * PROJECTION + mlp(family) + attention(1, keys)


def decoder(family: str, vocabulary: int) -> int:
    """A full forward of the decoder on one row, logits at every token."""
    blocks = sum(block(family, layer, TOKENS, TOKENS) for layer in range(LAYERS))
    return blocks + TOKENS * 2 * WIDTH * vocabulary


def of_site(family: str, site: Site, vocabulary: int) -> int:
    """What one intervention in the decoder cannot avoid, on one row."""
    first = 0 if site.token is None else site.token
    tokens = TOKENS - first
    total = 2 * WIDTH * vocabulary  # one token is unembedded
    begin = site.layer
    if site.head is not None:  # its rows of W_O, then the MLP of its own block
        read = site.layer == LAYERS - 1
        total += 2 * D_HEAD * WIDTH * (1 if read else tokens) + mlp(family) * (1 if read else tokens)
        begin += 1
    for layer in range(begin, LAYERS - 1):
        seen = min(TOKENS, tokens + WINDOW - 1) if slides(family, layer) else TOKENS
        total += block(family, layer, tokens, seen)
    return total + (last_block(family, tokens, TOKENS) if begin < LAYERS else 0)


def of_scan(family: str, sites: Sequence[Site], vocabulary: int, clean: int) -> int:
    """What a scan cannot avoid: every site on the whole batch, and one clean run that costs `clean`."""
    inside = [site for site in sites if site.layer >= 0]
    decoder_only = BATCH * sum(of_site(family, site, vocabulary) for site in inside)
    return clean * (1 + len(sites) - len(inside)) + decoder_only
