"""What attribution patching computes: both models once, and the gradient of the metric in each."""

from __future__ import annotations

from collections.abc import Sequence

from interp.map.component_map import batches_of
from interp.plan.arithmetic import Arithmetic, attention
from interp.plan.images import pictures_of
from interp.plan.runs import Reads, Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt, collate


def backward(arithmetic: Arithmetic, tokens: int, keys: int) -> int:
    """Of one row, from the last block to what the first one's attention adds, the weights being frozen.

    A matrix product costs another one for its input; attention's two products cost two each.
    """
    blocks = arithmetic.blocks
    total = sum(arithmetic.row(block.path) * tokens for block in blocks)
    total += 2 * sum(attention(block.sites, tokens, keys) for block in blocks[1:])
    first = blocks[0]
    return total - (arithmetic.row(first.path) - arithmetic.second(0)) * tokens


def attributed(runs: Runs, prompts: Sequence[Prompt], reads: Reads, points: Sequence[str]) -> Work:
    """`interp.map.attribute` in both directions, without integrated gradients or neurons."""
    vlm, arithmetic, found = runs.vlm, runs.arithmetic, []
    for chosen in batches_of(prompts, runs.batch_size):
        some = [prompts[row] for row in chosen]
        batch = collate(some)
        (rows, width), n_read = batch.roles.shape, int(reads(batch).sum())
        decoder = rows * arithmetic.decoder(width, width)
        clean = arithmetic.forward(rows, width, pictures_of(vlm, some), rows + n_read)
        gradients = decoder + rows * backward(arithmetic, width, width) + 2 * n_read * arithmetic.unembedding
        flops = 2 * (clean + decoder + gradients)  # once more: that a rerun can begin at a layer is tried
        if "head" in points:
            flops += 4 * rows * width * sum(arithmetic.row(b.out) for b in arithmetic.blocks if b.site)
        stream, n = runs.footprint.stream(rows, width), vlm.n_layers
        leaves = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")
        names = [f"blocks.{layer}.{leaf}" for layer in range(n) for leaf in leaves]
        kept = runs.footprint.kept(names, rows, width, pictures_of(vlm, some))
        held = {
            "activations of both models": 2 * kept,
            "what the gradient flows back through": n * runs.footprint.forward(rows, width),
            "gradients of streams": 2 * n * stream,
            "logits that are read": 3 * runs.footprint.logits(n_read),
        }
        found.append(Work("attribution", 4, flops, held))
    return together("attribution, which chooses the senders", found)
