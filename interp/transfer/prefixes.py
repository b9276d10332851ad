"""What variants have in common: as far as their weights are the same, a prompt is the same in them, to the last bit.

A model runs in stages: its front (vision tower, projector and whatever else stands before the decoder), its embedding,
its blocks one by one. Variants are put in the order of a tree whose branches are the weights of the stages, so that
each runs what it has in common with the one before it not at all, and only what the next ones need is ever kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from hooks import HookedVLM
from interp.transfer.grafts import Graft, slices_of

FRONT, EMBED, BLOCKS = 0, 1, 2
"""Stages: the front, the embedding, and from 2 on the blocks."""

Path = tuple[frozenset[Hashable], ...]
"""What is put into each stage: equal entries are equal weights."""


def path_of(vlm: HookedVLM, grafts: Sequence[Graft]) -> Path:
    """What grafts put into each stage; what stands behind the blocks (final norm, unembedding) is in none.

    A weight that several stages use belongs to the first of them, and one that is in no known part to the front.

    Raises:
        FrankenlensError: as `interp.transfer.grafts.slices_of`.
    """
    stages = _stages(vlm)
    found: list[set[Hashable]] = [set() for _ in range(BLOCKS + vlm.n_layers)]
    for graft, pieces in slices_of(vlm, grafts):
        how = (graft.form, graft.coefficient, graft.rank, graft.seed)
        for piece in pieces:
            if (stage := stages[piece.parameter]) < len(found):
                found[stage].add((piece.parameter, piece.dim, piece.start, piece.length, how))
    return tuple(map(frozenset, found))


def _stages(vlm: HookedVLM) -> dict[str, int]:
    """The first stage that each parameter and buffer is used in; behind the last one, what comes after the blocks."""
    anatomy, end = vlm.anatomy, BLOCKS + vlm.n_layers
    places = {block.path: BLOCKS + layer for layer, block in enumerate(anatomy.text.blocks)}
    places |= {path: end for path in (anatomy.final_norm, anatomy.unembed) if path}
    places |= {anatomy.embed: EMBED} if anatomy.embed else {}
    model = vlm.model
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, int] = {}
    for name, tensor in own:
        at = next((stage for path, stage in places.items() if name.startswith(f"{path}.")), FRONT)
        first[id(tensor)] = min(at, first.get(id(tensor), at))
    return {name: first[id(tensor)] for name, tensor in own}


def common(one: Path, other: Path) -> int:
    """Stages, from the first on, that are the same in both."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def sharing(vlm: HookedVLM, runs: Mapping[str, Sequence[Graft]]) -> list[str]:
    """The runs that have something to share with others, each behind the one that it has most in common with.

    Something is the features of images, or the first block. Low-rank grafts are left out: they are put in for every
    batch anew, and theirs is a decomposition of every matrix.

    Args:
        vlm: the recipient.
        runs: name to what is put in, nothing for the recipient as it is.
    """
    paths = {
        name: path_of(vlm, grafts) for name, grafts in runs.items() if all(one.rank is None for one in grafts)
    }
    least = FRONT + 1 if vlm.anatomy.vision.blocks else BLOCKS + 1
    chosen = {
        name: path
        for name, path in paths.items()
        if any(common(path, other) >= least for key, other in paths.items() if key != name)
    }
    return in_order(chosen)


def in_order(paths: Mapping[str, Path]) -> list[str]:
    """Runs in the order of the tree: those that begin alike follow one another, the recipient's own way first."""
    numbers: list[dict[frozenset[Hashable], int]] = []
    keys: dict[str, tuple[int, ...]] = {}
    for name, path in paths.items():
        numbers += [{frozenset(): 0} for _ in range(len(path) - len(numbers))]
        each = zip(numbers, path, strict=True)
        keys[name] = tuple(known.setdefault(stage, len(known)) for known, stage in each)
    return sorted(paths, key=lambda name: keys[name])


@dataclass(frozen=True)
class Step:
    """What one run takes from those before it, and leaves to those behind it.

    Attributes:
        name: of the run.
        common: stages that it has in common with the run before it.
        keeps_front: whether it leaves what its front gives out.
        levels: blocks behind which it leaves the stream, and the keys and values of all up to there.
    """

    name: str
    common: int
    keeps_front: bool
    levels: tuple[int, ...]

    @property
    def start(self) -> int:
        """Blocks that it does not run on the prompt."""
        return max(0, self.common - BLOCKS)

    @property
    def has_front(self) -> bool:
        """Whether its front does not run."""
        return self.common > FRONT


def steps(names: Sequence[str], paths: Mapping[str, Path]) -> list[Step]:
    """Runs one after the other, in the order of `in_order`."""
    found = []
    for at, name in enumerate(names):
        before = common(paths[names[at - 1]], paths[name]) if at else 0
        after = [common(paths[name], paths[other]) for other in names[at + 1 :]]
        levels = {one - BLOCKS for one in after if one > BLOCKS}
        known = {level for level in levels if level <= before - BLOCKS}
        found.append(
            Step(name, before, before <= FRONT < max(after, default=0), tuple(sorted(levels - known)))
        )
    return found
