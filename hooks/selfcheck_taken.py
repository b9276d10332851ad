"""Proofs that a model is what it is taken for: of a structure that was proved before, or of a type that says it all.

What depends on the code alone (which module makes queries, where the stream is split) was proved on the first model of
its structure. What depends on weights is proved on each: own values written back, sums, attention, gradients. A type
that is taken at its word has nothing behind it, so what its names say is held against the numbers too, in the model's
own precision: that its factors are 1 is known of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooks.anatomy.precise import eps_of, within_rounding
from hooks.layout import readings
from hooks.opened import Opened
from hooks.selfcheck import undisturbed, without_effect
from hooks.selfcheck_attention import Bare, bare_run
from hooks.selfcheck_experts import unproved_contributions
from hooks.selfcheck_once import Once, at_once
from hooks.selfcheck_sums import split_from_the_stream
from hooks.selfcheck_writes import Writes, why_not


def holds(vlm: Opened, inputs: Mapping[str, Any], proved: bool) -> dict[str, str] | None:
    """The points that nothing depends on in this model, with the reason; None where it is not what it is taken for.

    Args:
        vlm: the model, opened as what it is taken for; its points are laid out as its tensors are.
        inputs: what it is run on.
        proved: whether another model of this structure was watched and proved.
    """
    with undisturbed(vlm.model):
        runs: list[Bare] = []
        if why_not(lambda: runs.append(bare_run(vlm, inputs))):
            return None  # watching it says with what it does not run
        (bare,) = runs
        shown = [name for name, point in vlm.hook_points.items() if point.place != "expert_out"]
        once = at_once(vlm, inputs, bare, shown)
        if once is None or len(once.shapes) < len(shown):
            return None
        points, odd = readings(vlm, once.shapes)
        if odd or any(point.relaid != vlm.hook_points[name].relaid for name, point in points.items()):
            return None
        if not proved and not _as_named(vlm, bare, once):
            return None
        if not proved and split_from_the_stream(vlm, inputs, list(once.seen)):
            return None
        vlm.hook_points = points
        proof = Writes(vlm, inputs, bare.logits)
        absent = without_effect(proof, shown, once.seen, once.live)
        live = set(shown) - set(absent)
        return absent | unproved_contributions(vlm, inputs, live, bare.logits, proof.allowed)


@torch.no_grad()
def _as_named(vlm: Opened, bare: Bare, once: Once) -> bool:
    """Whether embedding, stream, final norm and unembedding hold the numbers that their names promise."""
    last = {name: calls[-1] for name, calls in once.seen.items()}
    entered, added = last.get("hook_embed"), vlm.anatomy.deepstack
    if entered is None or not torch.equal(entered, last["blocks.0.hook_resid_pre"]):
        return False
    for layer in range(vlm.n_layers - 1):
        behind, before = last[f"blocks.{layer}.hook_resid_post"], last[f"blocks.{layer + 1}.hook_resid_pre"]
        if (layer in added) == torch.equal(behind, before):
            return False
    return _reads_out(vlm, last[f"blocks.{vlm.n_layers - 1}.hook_resid_post"], bare.logits)


def _reads_out(vlm: Opened, stream: Tensor, logits: Tensor) -> bool:
    """Whether the last token's logits are what the final norm and the unembedding make of the last stream."""
    norm, unembed = vlm.module(vlm.anatomy.final_norm), vlm.module(vlm.anatomy.unembed)
    made = vlm.anatomy.after_unembedding(unembed(norm(stream[:, -1:]))).double()
    own = logits[:, -1:].double()
    return made.shape == own.shape and within_rounding(made - own, own.abs(), eps_of(logits))
