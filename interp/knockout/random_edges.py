"""The control of a knockout: as many attention edges, drawn at random, cut in the same layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from interp.knockout.cut import Knockout
from interp.knockout.lanes import Lane, Part
from interp.knockout.places import Unfolding
from interp.prompts import Prompt, collate


def control_kinds(prompts: Sequence[Prompt], cuts: Sequence[Knockout]) -> list[str]:
    """Per route, whether its control draws other "keys" at the same queries, or "edges" anywhere in the row.

    "none" where some prompt has not even as many others of these.
    """
    keys, anywhere = np.ones((2, len(cuts)), dtype=bool)
    for prompt in prompts:
        batch = collate([prompt])
        for number, cut in enumerate(cuts):
            edges = Unfolding(batch, (cut.source, cut.target)).edges(cut.source, cut.target)[0]
            others = _others(edges)
            keys[number] &= bool((others.sum(1) >= edges.sum(1)).all())
            anywhere[number] &= bool(others.sum() >= edges.sum())
    return np.where(keys, "keys", np.where(anywhere, "edges", "none")).tolist()


def _others(edges: Bool[Tensor, "query key"]) -> Bool[Tensor, "query key"]:
    """Causal edges that could stand in for those that are cut; a token always keeps itself."""
    return torch.ones_like(edges).tril(-1) & ~edges


def controls(
    lanes: Sequence[Lane],
    n_windows: int,
    kinds: Sequence[str],
    real: Bool[Tensor, "batch pos"],
    seeds: Sequence[tuple[int, int]],
) -> list[Lane]:
    """A lane of random edges for every lane, the same edges in all windows of a route.

    Args:
        lanes: of one knockout each, route by route.
        n_windows: of every route.
        kinds: of every route; see `control_kinds`.
        real: which columns are no padding.
        seeds: of every row.

    Returns:
        Lanes in the same order, numbered from `len(lanes)` on; none for a route without a control.
    """
    found = []
    for first in range(0, len(lanes), n_windows):
        edges, kind = lanes[first].parts[0].edges, kinds[first // n_windows]
        if kind == "none":
            continue
        drawn = torch.stack(  # once for all windows: of long prompts it is large
            [
                random_edges(edges[row], real[row], kind, np.random.default_rng((*seed, first // n_windows)))
                for row, seed in enumerate(seeds)
            ]
        )
        for lane in lanes[first : first + n_windows]:
            (part,) = lane.parts
            other = Part(drawn, part.layers, part.heads, part.lost)
            found.append(Lane(len(lanes) + lane.number, (other,)))
    return found


def random_edges(
    edges: Bool[Tensor, "query key"], real: Bool[Tensor, " pos"], kind: str, rng: np.random.Generator
) -> Bool[Tensor, "query key"]:
    """As many other edges of one row.

    Args:
        edges: that are cut.
        real: which columns are no padding.
        kind: "keys": at every query as many as are cut there; "edges": as many in all, anywhere.
        rng: what draws them.
    """
    others = (_others(edges) & real[:, None] & real[None]).cpu().numpy()
    wanted = edges.sum(1).cpu().numpy()
    drawn = np.zeros_like(others)
    if kind == "edges":
        places = np.flatnonzero(others)
        drawn.flat[rng.choice(places, int(wanted.sum()), replace=False)] = True
    else:
        for query in np.flatnonzero(wanted):
            drawn[query, rng.choice(np.flatnonzero(others[query]), wanted[query], replace=False)] = True
    return torch.from_numpy(drawn).to(edges.device)
