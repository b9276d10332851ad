"""What variants of a transfer compute that write together: what they have in common once, the rest each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hooks.selfcheck import opening_inputs
from interp.map.component_map import batches_of
from interp.plan.images import Pictures, pictures_of
from interp.plan.runs import Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt
from interp.transfer.grafts import Graft
from interp.transfer.prefixes import BLOCKS, Step, in_order, path_of, steps
from interp.transfer.replays import PROOF_STEPS


def written_together(
    runs: Runs, what: str, variants: Mapping[str, Sequence[Graft]], prompts: Sequence[Prompt], n_steps: int
) -> Work:
    """`interp.transfer.writing.Writing.written`, where the model allows it.

    Args:
        runs: of the recipient.
        what: it is, in words.
        variants: name to what is put in; those of `interp.transfer.prefixes.sharing`.
        prompts: what is continued.
        n_steps: tokens that each writes after each.
    """
    order = _steps(runs, variants)
    found = []
    for rows in batches_of(prompts, runs.batch_size):
        some = [prompts[row] for row in rows]
        alone = runs.written(what, some, [n_steps] * len(some))
        pictures = pictures_of(runs.vlm, some)
        for step, kept in zip(order, _kept(runs, order, some, pictures), strict=True):
            spared = _spared(runs, step, len(some), max(map(len, some)), pictures)
            work = Work(what, alone.runs, alone.flops - spared, alone.held)
            found.append(work.beside("what variants have in common on a batch", kept))
    return together(what, found)


def proof(runs: Runs, variants: Mapping[str, Sequence[Graft]]) -> Work:
    """`interp.transfer.replays.proved`, on the prompt that the model is opened with."""
    what, vlm = "whether variants can write together", runs.vlm
    prompt = Prompt.from_inputs(
        vlm.opening or opening_inputs(vlm.model, vlm.processor), image_token_id=vlm.image_token_id
    )
    levels = sorted({level for step in _steps(runs, variants) for level in step.levels})
    each = [Step("", 0, True, ()), *(Step("", BLOCKS + level, False, ()) for level in levels or [0])]
    pictures = pictures_of(vlm, [prompt])
    alone = runs.written(what, [prompt], [PROOF_STEPS])
    spared = sum(_spared(runs, step, 1, len(prompt), pictures) for step in each)
    return Work(what, len(each) * alone.runs, len(each) * alone.flops - spared, alone.held, scales=False)


def _steps(runs: Runs, variants: Mapping[str, Sequence[Graft]]) -> list[Step]:
    paths = {name: path_of(runs.vlm, grafts) for name, grafts in variants.items()}
    return steps(in_order(paths), paths)


def _spared(runs: Runs, step: Step, rows: int, width: int, pictures: Pictures) -> int:
    """FLOPs of a step that were done before it."""
    arithmetic = runs.arithmetic
    blocks = sum(arithmetic.block(layer, width, width) for layer in range(step.start))
    return rows * blocks + (arithmetic.images(pictures) if step.has_front else 0)


def _kept(runs: Runs, order: Sequence[Step], prompts: Sequence[Prompt], pictures: Pictures) -> Iterator[int]:
    """Bytes that are kept of a batch while each step runs."""
    vlm, footprint = runs.vlm, runs.footprint
    rows, width = len(prompts), max(map(len, prompts))
    features = footprint.stream(1, sum(pictures.tokens)) * (1 + len(vlm.anatomy.deepstack))
    mask = rows * width * width if len(set(map(len, prompts))) > 1 else 0
    levels: set[int] = set()
    has_front = False
    for step in order:
        levels = {level for level in levels if level <= step.start} | set(step.levels)
        has_front = (has_front and step.has_front) or step.keeps_front
        streams = footprint.stream(rows, width) * (1 + len(levels)) + mask if levels else 0
        keys = footprint.keys(rows, width) * max(levels, default=0) // max(1, vlm.n_layers)
        yield streams + keys + features * has_front
