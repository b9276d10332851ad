"""What lenses compute and hold: streams of every layer, what they spell, tuned lenses, and direct attribution."""

from __future__ import annotations

from collections.abc import Sequence

from hooks.batches import batched
from hooks.memory import limit
from interp.lens.streams import CHUNK, in_order
from interp.metrics.logits import keeps_some
from interp.plan.images import pictures_of
from interp.plan.memory import WIDE
from interp.plan.runs import Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt
from interp.statistics.distributions import TERMS_AT_ONCE

DOUBLE = 8
"""Bytes of a float64 number, which distributions are worked out in."""
COPIES = 6
"""Of the terms of a divergence that exist at once."""
MOST_TOKENS, A_STEP = 20_000, 512
"""`interp.lens.tuned_lens.train_tuned_lens`: tokens that are kept, and that a step takes."""


def _within_limit(kept: int) -> int:
    """Streams that exist together: of no more prompts than half of the limit holds (`interp.lens.streams.groups`)."""
    most = limit()
    return kept if most is None else min(kept, most // 2)


class LensPlan:
    """Lenses of one model.

    Args:
        runs: of the model.
        scale: prompts that each of those at hand stands for: the streams of all of them are held together.
    """

    def __init__(self, runs: Runs, scale: int | float = 1) -> None:
        self._runs, self._vlm, self._scale = runs, runs.vlm, scale
        self._layers, self._unembed = runs.vlm.n_layers, runs.arithmetic.unembedding
        self._map = 2 * runs.vlm.d_model**2

    def streams(
        self, prompts: Sequence[Prompt], places: int | None = None, scale: int | float | None = None
    ) -> Work:
        """`read_streams`, at all tokens or at so many of each prompt, with the proof of the head."""
        scale, found = self._scale if scale is None else scale, []
        kept = round(self._kept(self._tokens(prompts, places)) * scale)
        held = {"streams of every layer": _within_limit(kept)}
        for rows in batched(in_order(prompts), self._runs.batch_size):
            some = [prompts[row] for row in rows]
            n, width = len(some), max(map(len, some))
            probe = min(width if places is None else places, max(1, CHUNK // (n * self._vlm.n_logits)))
            made = n * (probe if keeps_some(self._vlm) else width)
            flops = self._runs.arithmetic.forward(n, width, pictures_of(self._vlm, some), 2 * made)
            own = {
                "streams of a batch": self._kept(self._tokens(some, places))
                + self._runs.footprint.stream(n, width),
                "a forward pass": self._runs.footprint.forward(n, width),
                "logits that prove the head": 3 * WIDE * made * self._vlm.n_logits,
            }
            found.append(Work("streams", 1, flops, own))
        return _beside(together("streams", found).times(scale), held)

    def spelt(self, prompts: Sequence[Prompt], places: int | None = None, tuned: bool = False) -> Work:
        """`logit_lens`: streams, and the logits of every layer, and of the last once more."""
        read, tokens = self.streams(prompts, places), self._tokens(prompts, places) * self._scale
        flops = tokens * ((self._layers + 2) * self._unembed + tuned * self._layers * self._map)
        made = self._chunk(tokens)
        passing = max((2 * DOUBLE + WIDE + 2 * DOUBLE) * made, (2 * DOUBLE + WIDE) * made + _terms(made))
        held = {**_streams(read), "distributions of a chunk of tokens": passing}
        return together("logit lens", [read, Work("spelling", 0, flops, held)])

    def apart(self, prompts: Sequence[Prompt], both: bool) -> Work:
        """`compare_lenses` of one comparison: the streams of both models, or of a changed one beside those at hand."""
        read, tokens = self.streams(prompts), self._tokens(prompts, None) * self._scale
        (kept,) = _streams(read).values()
        beside = {"streams of every layer": _within_limit(3 * kept - (kept if both else 0))}
        made = self._chunk(tokens)
        passing = max((3 * DOUBLE + WIDE) * made, 2 * DOUBLE * made + _terms(made))
        compared = 2 * tokens * (self._layers + 1) * self._unembed
        held = {**beside, "distributions of a chunk of tokens": passing}
        reads = _beside(read, beside).times(2 if both else 1)
        return together("lenses apart", [reads, Work("comparison", 0, compared, held)])

    def trained(self, prompts: Sequence[Prompt], steps: int) -> Work:
        """`train_tuned_lens`: forward through each layer's map and the head, and back into the map alone."""
        tokens = self._tokens(prompts, None) * self._scale
        some = min(tokens, MOST_TOKENS)
        step = min(A_STEP, some)
        read = self.streams(prompts)
        kept = {"streams of every layer": round(self._kept(some))}
        maps = 4 * WIDE * self._layers * (self._map // 2 + self._vlm.d_model)
        made = step * self._vlm.n_logits
        held = kept | {"maps and what trains them": maps}
        held |= {"distributions and their gradients": round(2 * (COPIES + 1) * DOUBLE * made)}
        flops = steps * step * (self._unembed + self._layers * 2 * (self._unembed + self._map))
        return together("tuned lens", [_beside(read, kept), Work("training", 0, flops, held)])

    def attributed(self, prompts: Sequence[Prompt]) -> Work:
        """`direct_logit_attribution` at one token of each prompt."""
        read = self.streams(prompts, 1)
        blocks, arithmetic = self._vlm.anatomy.text.blocks, self._runs.arithmetic
        heads = sum(arithmetic.row(block.out) for block in blocks if block.site is not None)
        parts = 2 + sum(block.n_heads + 2 for block in blocks)
        of_one = heads + 2 * self._vlm.d_model * parts + self._unembed
        return together(
            "attribution", [read, Work("parts", 0, len(prompts) * self._scale * of_one + heads, read.held)]
        )

    def _kept(self, tokens: int | float) -> int:
        return round((self._layers + 1) * self._runs.footprint.stream(1, 1) * tokens)

    def _tokens(self, prompts: Sequence[Prompt], places: int | None) -> int:
        return sum(map(len, prompts)) if places is None else places * len(prompts)

    def _chunk(self, tokens: int | float) -> int:
        """Logits that exist at one time."""
        size = max(1, CHUNK // self._vlm.n_logits)
        return round(min(size, tokens)) * self._vlm.n_logits


def _terms(made: int) -> int:
    """What a divergence holds in passing."""
    return COPIES * DOUBLE * min(made, TERMS_AT_ONCE)


def _streams(read: Work) -> dict[str, int]:
    return {"streams of every layer": read.held["streams of every layer"]}


def _beside(work: Work, held: dict[str, int]) -> Work:
    for item, size in held.items():
        work = work.beside(item, size)
    return work
