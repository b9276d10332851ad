"""FLOPs of a model's parts, from the shapes of its parameters: two a number of a matrix and row that it is applied to.

Counted as `torch.utils.flop_counter` counts: matrix products, convolutions and attention's two products over all keys
(hidden ones too); nothing for norms, softmax and activations. What a mixer carries along the tokens (a scan, a
recurrence) is not counted; `uncounted` says where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn

from hooks import HookedVLM
from hooks.anatomy import Block, Site
from interp.plan.images import Pictures

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "top_k")
"""Names that configurations have for how many experts a token goes to."""


class Arithmetic:
    """What the parts of one model cost.

    Attributes:
        uncounted: what no count covers, in words.
    """

    def __init__(self, vlm: HookedVLM) -> None:
        """Reads shapes; weights may be on the meta device."""
        self.vlm = vlm
        self._rows = dict(_matrices(vlm))
        self._under: dict[str, int] = {}

    def row(self, path: str) -> int:
        """Of one row through all matrices under a path."""
        if path not in self._under:
            inside = (cost for own, cost in self._rows.items() if own == path or own.startswith(f"{path}."))
            self._under[path] = sum(inside)
        return self._under[path]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Of the decoder."""
        return self.vlm.anatomy.text.blocks

    def block(self, layer: int, queries: int, keys: int, wanted: int | None = None) -> int:
        """A block of the decoder on the last `queries` of `keys` tokens of one row.

        Args:
            layer: of the block.
            queries, keys: tokens that it runs on, and that they may look at.
            wanted: tokens whose attention, its output and MLP alone are computed; None: all.
        """
        block = self.blocks[layer]
        some = queries if wanted is None else wanted
        late = self.second(layer)
        if block.site is not None and block.site.out is not None:
            late += self.row(block.site.out)
        return (self.row(block.path) - late) * queries + late * some + attention(block.sites, some, keys)

    def second(self, layer: int) -> int:
        """The MLP of a block, one row."""
        writer = self.blocks[layer].writer("mlp", "moe")
        return 0 if writer is None else self.row(writer.body)

    def decoder(self, queries: int, keys: int) -> int:
        """All blocks, on the last `queries` of `keys` tokens of one row."""
        return sum(self.block(layer, queries, keys) for layer in range(len(self.blocks)))

    @cached_property
    def unembedding(self) -> int:
        """Of one place: all words."""
        return 2 * self.vlm.d_model * self.vlm.n_logits

    @cached_property
    def _between(self) -> int:
        """Matrices beside the blocks that see every token (embeddings of single layers, say), one row."""
        anatomy = self.vlm.anatomy
        towers = [tower.path for tower in (anatomy.vision, *anatomy.others) if tower.path]
        apart = [*towers, anatomy.projector_weights, anatomy.unembed, *anatomy.deepstack.values()]
        own = [*(block.path for block in self.blocks), *(path for path in apart if path)]
        return sum(cost for path, cost in self._rows.items() if not _is_under(path, own))

    def images(self, pictures: Pictures) -> int:
        """The vision tower and what leads from it to the decoder, on the images of some rows."""
        anatomy = self.vlm.anatomy
        tower, patches = anatomy.vision, sum(pictures.patches)
        if not tower.blocks or not patches:
            return 0
        late = [path for path in (anatomy.projector_weights, *anatomy.deepstack.values()) if path]
        early = [path for path in self._rows if _is_under(path, [tower.path]) and not _is_under(path, late)]
        inside = [block.path for block in tower.blocks]
        total = sum(self._rows[path] for path in early if _is_under(path, inside)) * patches
        total += sum(self._rows[path] for path in early if not _is_under(path, inside)) * pictures.embedded
        total += sum(self.row(path) for path in late) * sum(pictures.tokens)
        for layer, block in enumerate(tower.blocks):
            total += sum(attention(block.sites, n, n) for n in pictures.looked_at(layer))
        return total

    def forward(self, rows: int, tokens: int, pictures: Pictures, read: int) -> int:
        """A whole forward pass.

        Args:
            rows: of the batch.
            tokens: columns of it, padding included.
            pictures: its images.
            read: places whose logits are made.
        """
        decoder = rows * (self.decoder(tokens, tokens) + tokens * self._between)
        return decoder + self.images(pictures) + read * self.unembedding

    def written(self, rows: int, prompt: int, steps: int) -> int:
        """Steps of generation behind the first, each one token of every row with all keys before it."""
        linear = self.decoder(1, 0) + self._between + self.unembedding
        seen = sum(prompt + step for step in range(1, steps))
        over_keys = sum(attention(block.sites, 1, 1) for block in self.blocks)
        return rows * (max(0, steps - 1) * linear + seen * over_keys)

    @cached_property
    def uncounted(self) -> tuple[str, ...]:
        """What no count covers, in words."""
        told = []
        if scans := sum(block.writer("mixer") is not None for block in self.blocks):
            told.append(f"what {scans} mixers carry along the tokens (their matrices are counted)")
        if any(site.cross for block in self.blocks for site in block.sites):
            told.append("cross-attention, as if its keys were the tokens of the text")
        if self.vlm.anatomy.others:
            told.append(f"{len(self.vlm.anatomy.others)} towers beside the vision tower")
        return tuple(told)


def attention(sites: Iterable[Site], queries: int, keys: int) -> int:
    """Scores, and the values that they mix, of one row."""
    return sum(2 * queries * keys * site.n_heads * (site.d_head + site.d_value) for site in sites)


def _matrices(vlm: HookedVLM) -> Iterable[tuple[str, int]]:
    """Path of every module that multiplies by parameters of its own, and what one row costs there."""
    shares = dict(_shares_of_experts(vlm))
    for path, module in vlm.model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        own = [
            parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 2 or (parameter.ndim == 2 and name == "weight")
        ]
        if own:
            share = next((part for above, part in shares.items() if _is_under(path, [above])), 1.0)
            yield path, round(2 * share * sum(parameter.numel() for parameter in own))


def _shares_of_experts(vlm: HookedVLM) -> Iterable[tuple[str, float]]:
    """Path of the experts of a block, and the share of them that a token goes to."""
    config: Any = vlm.model.config.get_text_config()
    chosen = next((n for name in _CHOSEN if isinstance(n := getattr(config, name, None), int)), None)
    for block in vlm.anatomy.text.blocks:
        writer = block.writer("moe")
        if writer is None or writer.experts is None or writer.experts.chosen is None or chosen is None:
            continue
        yield writer.experts.module, chosen / writer.experts.n_experts


def _is_under(path: str, above: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in above)
