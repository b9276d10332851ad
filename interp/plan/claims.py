"""What a test of claims computes: components moved as activations in sweeps, or as weights in models that read or
answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from interp.hypotheses.measure import Moved, activation_components, moved_cell
from interp.map.component_map import DIRECTIONS, batches_of
from interp.map.components import cached_names
from interp.plan.images import pictures_of
from interp.plan.maps import Undone, swept
from interp.plan.runs import Reads, Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt, collate
from interp.prompts.pairing import PatchBatch

BOTH = ("donor", "control")
"""What is put in a component's place."""


def activations(
    runs: Runs, prompts: Sequence[Prompt], reads: Reads, wanted: Sequence[Moved], at_tokens: bool
) -> Work:
    """Components moved as activations, each beside its control, all those of a direction in one sweep a batch."""
    vlm, found = runs.vlm, []
    sets = {moved: activation_components(vlm, moved[3]) for moved in wanted}
    names = cached_names(vlm, [one for some in sets.values() for one in some])
    undone = Undone(vlm)
    for chosen in batches_of(prompts, runs.batch_size):
        some = [prompts[row] for row in chosen]
        batch, pictures = collate(some), pictures_of(vlm, some)
        ready, (rows, width) = PatchBatch(batch, reads(batch)), batch.roles.shape
        clean = runs.arithmetic.forward(rows, width, pictures, rows + int(ready.reads.sum()))
        kept = {"activations of both models": 2 * runs.footprint.kept(names, rows, width, pictures)}
        held = {**kept, "a forward pass": runs.footprint.forward(rows, width)}
        found.append(Work("clean", 2, 2 * clean, held))
        for direction in DIRECTIONS:
            made = [
                moved_cell(undone, undone, ready, sets[moved], moved[1], which, 0)
                for moved in wanted
                if moved[2] == direction
                for which in BOTH
            ]
            cells = [
                replace(one, kind="random" if one.kind == "control" else one.kind) for one in made if one
            ]
            if cells:
                sweep = swept(runs, ready, cells, at_tokens)
                found.append(replace(sweep, held={**kept, **sweep.held}))
    return together("components moved as activations", found)


def weights(runs: Runs, prompts: Sequence[Prompt], reads: Reads, wanted: Sequence[Moved]) -> Work:
    """Components moved as weights, each beside its control: the decisions once more."""
    read = runs.read("decisions", prompts, reads)
    return replace(read.times(len(BOTH) * len(wanted)), what="components moved as weights")


def accuracies(runs: Runs, prompts: Sequence[Prompt], tokens: int, wanted: Sequence[Moved]) -> Work:
    """Answers of every model that claims are about, and under each of its grafts."""
    once = runs.written("answers", prompts, [tokens] * len(prompts))
    models = len({moved[2] for moved in wanted}) + len(BOTH) * len(wanted)
    return replace(once.times(models), what="answers with components moved as weights")
