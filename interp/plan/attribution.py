"""What attribution patching computes: both models once, and the gradient of the metric in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from interp.map.component_map import batches_of
from interp.plan.arithmetic import Arithmetic, attention
from interp.plan.images import pictures_of
from interp.plan.runs import Reads, Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt, PromptBatch, collate


def backward(arithmetic: Arithmetic, tokens: int, keys: int, layer: int = 0) -> int:
    """Of one row, from the last block back to what a layer's attention adds, the weights being frozen.

    A matrix product costs another one for its input; attention's two products cost two each.
    """
    behind = range(layer + 1, len(arithmetic.blocks))
    total = sum(arithmetic.row(arithmetic.blocks[one].path) * tokens for one in behind)
    total += 2 * sum(attention(arithmetic.blocks[one].sites, tokens, keys) for one in behind)
    return total + arithmetic.second(layer) * tokens


def attributed(
    runs: Runs, prompts: Sequence[Prompt], reads: Reads, points: Sequence[str], directions: int = 2
) -> Work:
    """`interp.map.attribute` without integrated gradients or neurons."""
    arithmetic, found = runs.arithmetic, []
    for batch in _batches(runs, prompts):
        (rows, width), n_read = batch.roles.shape, int(reads(batch).sum())
        decoder = rows * arithmetic.decoder(width, width)
        gradients = decoder + rows * backward(arithmetic, width, width) + 2 * n_read * arithmetic.unembedding
        flops = _clean(runs, batch, n_read) + directions * (decoder + gradients + _heads(runs, batch, points))
        found.append(Work("attribution", 2 + directions, flops, _held(runs, batch, n_read)))
    return together("attribution, which chooses the senders", found)


def integrated(
    runs: Runs, prompts: Sequence[Prompt], reads: Reads, points: Sequence[str], steps: int
) -> Work:
    """The same in one direction with gradients on the way: a rerun and its gradient for every step, layer and stream.

    The way begins behind the layer's attention, or behind its MLP.
    """
    arithmetic, found = runs.arithmetic, []
    streams = [one for one in ("head", "mlp_out") if one in points]
    for batch in _batches(runs, prompts):
        (rows, width), n_read = batch.roles.shape, int(reads(batch).sum())
        decoder = rows * arithmetic.decoder(width, width)
        ways = 0
        for layer in range(len(arithmetic.blocks)):
            again = sum(arithmetic.block(one, width, width) for one in range(layer, len(arithmetic.blocks)))
            for stream in streams:
                back = backward(arithmetic, width, width, layer) - (stream == "mlp_out") * (
                    arithmetic.second(layer) * width
                )
                ways += rows * (again + back) + 2 * n_read * arithmetic.unembedding
        flops = _clean(runs, batch, n_read) + decoder + steps * ways + _heads(runs, batch, points)
        n = steps * len(streams) * len(arithmetic.blocks)
        found.append(Work("integrated gradients", 2 + n, flops, _held(runs, batch, n_read)))
    return together("integrated gradients", found)


def _batches(runs: Runs, prompts: Sequence[Prompt]) -> Iterator[PromptBatch]:
    return (collate([prompts[row] for row in rows]) for rows in batches_of(prompts, runs.batch_size))


def _clean(runs: Runs, batch: PromptBatch, n_read: int) -> int:
    """Both models, their metric read; that a rerun can begin at a layer is tried with each direction's recipient."""
    rows, width = batch.roles.shape
    return 2 * runs.arithmetic.forward(rows, width, pictures_of(runs.vlm, batch.prompts), rows + n_read)


def _heads(runs: Runs, batch: PromptBatch, points: Sequence[str]) -> int:
    """What heads write in both models."""
    rows, width = batch.roles.shape
    outs = sum(runs.arithmetic.row(block.out) for block in runs.arithmetic.blocks if block.site)
    return 2 * rows * width * outs if "head" in points else 0


def _held(runs: Runs, batch: PromptBatch, n_read: int) -> dict[str, int]:
    (rows, width), n = batch.roles.shape, runs.vlm.n_layers
    leaves = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")
    names = [f"blocks.{layer}.{leaf}" for layer in range(n) for leaf in leaves]
    kept = runs.footprint.kept(names, rows, width, pictures_of(runs.vlm, batch.prompts))
    return {
        "activations of both models": 2 * kept,
        "what the gradient flows back through": n * runs.footprint.forward(rows, width),
        "gradients of streams": 2 * n * runs.footprint.stream(rows, width),
        "logits that are read": 3 * runs.footprint.logits(n_read),
    }
