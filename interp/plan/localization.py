"""What swaps of visual tokens and ablations compute: each a whole text, and the states that they put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from interp.localization.ablation import Ablation
from interp.localization.swap import Swap, names_of
from interp.plan.images import pictures_of
from interp.plan.prompts import with_trace
from interp.plan.runs import Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt


def swapped(runs: Runs, pairs: Sequence[tuple[Prompt, Prompt]], swaps: Sequence[Swap], tokens: int) -> Work:
    """`interp.localization.vision_swap` of pairs of a target's and a source's prompt, answers of so many tokens."""
    vlm, (targets, sources) = runs.vlm, ([pair[side] for pair in pairs] for side in (0, 1))
    steps = [tokens] * len(pairs)
    after, names = names_of(swaps, vlm.n_layers)
    own = runs.written("answers", targets, steps)
    states = runs.written("states of both images", sources, [1] * len(pairs)).times(1 + bool(after))
    held = 0
    for first in range(0, len(pairs), runs.batch_size):
        some = sources[first : first + runs.batch_size]
        width, pictures = max(map(len, some)), pictures_of(vlm, some)
        held = max(held, runs.footprint.kept([*after, *names], len(some), width, pictures))
    texts = together("answers", [own.times(1 + len(swaps)), runs.written("answers", sources, steps), states])
    return texts.beside("states of both images", held)


def ablated(runs: Runs, prompts: Sequence[Prompt], ablations: Sequence[Ablation], tokens: int) -> Work:
    """`interp.localization.ablate`: the clean text, what takes a component's place, and a text of every ablation."""
    own = runs.written("answers", prompts, [tokens] * len(prompts))
    pooled = [one for one in ablations if one.kind in ("mean", "resample")]
    works = [own.times(1 + len(ablations))]
    if pooled:
        longer = [with_trace(prompt, tokens) for prompt in prompts]
        works.append(replace(runs.written("means", longer, [1] * len(longer)), what="means"))
    return together("answers under ablations", works)
