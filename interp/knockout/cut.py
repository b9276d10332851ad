"""A knockout as a user states it: whose information does not reach whom, in which layers."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import Block
from interp import regions
from interp.knockout.places import Place, place_label, require_patches, require_place

TOWERS = ("text", "vision")
MASSES = ("renormalized", "lost")


@dataclass(frozen=True, eq=False)
class Knockout:
    """Attention edges that are cut. The arrow follows the information: `source` are the keys, `target` the queries.

    An edge of a token to itself is cut too where the token is both. Source: 2304.14767; on VLMs 2411.18620.

    Attributes:
        source, target: a role, "all", "decision" (each row's last token; while generating, every token whose next one
            is decided), "before reasoning" or "before answer" (the token that predicts its first word), a token
            counted from the row's first (negative: from the row's end), a function of the batch, or a tuple of these.
            In the vision tower: "all", a patch counted from each image's first, or `region(...)`.
        layers: first and last, inclusive; one layer; a set of layers; None: all of the tower.
        heads: the query heads that are cut, in each of the layers; None: all.
        tower: "text" or "vision".
        mass: "renormalized": the edge is masked before the softmax, and its share goes to the other keys; "lost": its
            share is set to zero after the softmax.

    Raises:
        FrankenlensError: an unknown tower, mass or role, layers that run backwards, no layers, or no heads.

    Example:
        >>> fl.Knockout("image", "reasoning", layers=(3, 5), heads=(0, 2)).name
        'image -> reasoning @ 3-5 heads 0,2'
    """

    source: Place
    target: Place
    layers: tuple[int, int] | int | AbstractSet[int] | None = None
    heads: tuple[int, ...] | None = None
    tower: str = "text"
    mass: str = "renormalized"

    def __post_init__(self) -> None:
        for given, choices, what in ((self.tower, TOWERS, "tower"), (self.mass, MASSES, "mass")):
            if given not in choices:
                raise FrankenlensError(
                    f"knockout: there is no {what} {given!r}; choose {' or '.join(choices)}"
                )
        for place in (self.source, self.target):
            (require_place if self.tower == "text" else require_patches)(place)
        if self.layers is not None and (not self.layers_in(10**6) or min(self.layers_in(10**6)) < 0):
            raise FrankenlensError(
                f"{self.edges}: layers {self.layers!r} are none; give first <= last from 0"
            )
        if self.heads is not None and not self.heads:
            raise FrankenlensError(f"{self.edges}: heads=() cuts nothing; leave heads out to cut all of them")

    def layers_in(self, n_layers: int) -> frozenset[int]:
        """The layers that are cut in a tower of `n_layers`."""
        if self.layers is None:
            return frozenset(range(n_layers))
        if isinstance(self.layers, int):
            return frozenset({self.layers})
        if isinstance(self.layers, tuple):
            return frozenset(range(self.layers[0], self.layers[1] + 1))
        return frozenset(self.layers)

    @property
    def edges(self) -> str:
        """E.g. `image -> question`."""
        return f"{place_label(self.source)} -> {place_label(self.target)}"

    @property
    def name(self) -> str:
        """E.g. `image -> question @ 3-5 heads 0,2 lost`."""
        parts = [self.edges, *(["in vision"] if self.tower == "vision" else []), "@", layers_label(self)]
        parts += [f"heads {','.join(map(str, self.heads))}"] if self.heads is not None else []
        return " ".join([*parts, *(["lost"] if self.mass == "lost" else [])])


Cut = Knockout | tuple[Knockout, ...]
"""One knockout, or several at once."""


def together(cut: Cut) -> tuple[Knockout, ...]:
    """The knockouts of a cut."""
    return cut if isinstance(cut, tuple) else (cut,)


def cut_name(cut: Cut) -> str:
    """What a cut is called in a result."""
    return " & ".join(one.name for one in together(cut))


def layers_label(cut: Knockout) -> str:
    """E.g. `3`, `3-5`, `1,4,7`, `all`."""
    if cut.layers is None:
        return "all"
    layers = sorted(cut.layers_in(0))
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def singles(cut: Knockout, n_layers: int) -> list[Knockout]:
    """The cut in each layer alone."""
    return _in_runs(cut, regions.singles(n_layers))


def suffixes(cut: Knockout, n_layers: int) -> list[Knockout]:
    """For each layer k, the cut in every layer from k on."""
    return _in_runs(cut, regions.suffixes(n_layers))


def windows(cut: Knockout, n_layers: int, width: int) -> list[Knockout]:
    """The cut in every run of `width` neighbouring layers.

    Raises:
        FrankenlensError: a width that the tower does not hold.

    Example:
        >>> [cut.name for cut in fl.knockout.windows(fl.Knockout("image", "decision"), 4, 3)]
        ['image -> decision @ 0-2', 'image -> decision @ 1-3']
    """
    return _in_runs(cut, regions.windows(n_layers, width))


def around(cut: Knockout, n_layers: int, width: int) -> list[Knockout]:
    """For each layer, the cut in the `width` layers around it; fewer at either end (2304.14767, 2411.18620: width 9).

    Raises:
        FrankenlensError: a width that the tower does not hold.

    Example:
        >>> [cut.layers for cut in fl.knockout.around(fl.Knockout("image", "decision"), 4, 3)]
        [(0, 1), (0, 2), (1, 3), (2, 3)]
    """
    return _in_runs(cut, regions.around(n_layers, width))


def _in_runs(cut: Knockout, runs: Sequence[regions.Span]) -> list[Knockout]:
    return [replace(cut, layers=run) for run in runs]


def blocks_of(vlm: HookedVLM, cut: Knockout) -> Sequence[Block]:
    """The blocks of the cut's tower."""
    return (vlm.anatomy.text if cut.tower == "text" else vlm.anatomy.vision).blocks


def cut_layers(vlm: HookedVLM, cut: Knockout) -> frozenset[int]:
    """The layers of a cut that attend; in hybrids the others carry tokens by a mixer, which no cut of edges reaches."""
    blocks = blocks_of(vlm, cut)
    return frozenset(layer for layer in cut.layers_in(len(blocks)) if blocks[layer].site is not None)


def require_cuts(vlm: HookedVLM, cuts: Sequence[Cut]) -> None:
    """Refuse layers and heads that the model does not have, before anything runs.

    Raises:
        FrankenlensError: names the cut by its row, and what there is.
    """
    if not cuts or not all(map(together, cuts)):
        raise FrankenlensError("a knockout needs at least one cut")
    if any(one.tower == "text" for cut in cuts for one in together(cut)):
        for capability in ("positions", "some attention"):
            vlm.require(capability, "attention knockout")
    for row, cut in enumerate(cuts):
        for one in together(cut):
            blocks = blocks_of(vlm, one)
            layers = one.layers_in(len(blocks))
            if max(layers) >= len(blocks):
                raise FrankenlensError(
                    f"cut {row} ({one.name}): the {one.tower} tower has layers 0-{len(blocks) - 1}"
                )
            attending = cut_layers(vlm, one)
            if not attending:
                raise FrankenlensError(f"cut {row} ({one.name}): none of its layers attends")
            for layer in sorted(attending):
                point = f"{'vision.' if one.tower == 'vision' else ''}blocks.{layer}.attn.hook_attn_scores"
                if point in vlm.absent:
                    raise FrankenlensError(f"cut {row} ({one.name}): {point} is absent: {vlm.absent[point]}")
                wrong = [head for head in one.heads or () if not 0 <= head < blocks[layer].n_heads]
                if wrong:
                    raise FrankenlensError(
                        f"cut {row} ({one.name}): there is no head {wrong[0]} in layer {layer}, which has heads "
                        f"0-{blocks[layer].n_heads - 1}"
                    )
