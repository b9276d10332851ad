"""What a map's cells reach where nothing was learnt: the floor that a cell must lie above.

A noise pair is a recipient of the pair and the same model with an update of the norm of RL's in every tensor, but in a
random direction (`interp.decision.random_changes`): the pairs that recoveries are refused by. Its cells are patched as
those of the pair are, and read in two ways:

    same   with the pair's metric, at the pair's decisions: what an update that means nothing adds to the change that RL
           learnt
    own    at decisions that are found for the noise pair itself: what is selected is never 0 on average

The floor of a cell is the largest |mean effect| of all cells of its kind (point) at its role, over pairs and readings.
Noise moved in and noise moved out reach alike, so that pairs take the directions in turn and one floor serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from tqdm.auto import tqdm

from hooks import FrankenlensError
from interp.decision import NOISE_PAIRS, Change, changed_weights, own_decisions, random_changes
from interp.map.component_map import DIRECTIONS, MAP_POINTS, _map, roles_of
from interp.metrics import Metric
from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.decision import DecisionSet
    from interp.pair.pair import Pair

READINGS = ("same", "own")
NOISE_PROMPTS = 8
"""Prompts that a noise pair's cells are measured on; a mean over fewer prompts than the map's only raises the floor."""


@torch.no_grad()
def noise_cells(
    pair: Pair,
    decisions: DecisionSet,
    directions: Sequence[str] = tuple(DIRECTIONS),
    points: Sequence[str] = MAP_POINTS,
    roles: Sequence[str] | None = None,
    *,
    n_pairs: int = NOISE_PAIRS,
    n_prompts: int = NOISE_PROMPTS,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """The cells of pairs that learnt nothing, for `interp.map.summary.summarise`.

    One model of the pair holds the other's weights with noise in the meantime; afterwards both are as they were.

    Args:
        pair, decisions, directions, points, roles, batch_size: as given to `interp.map.component_map.component_map`.
        n_pairs: noise pairs, each in one direction; with this seed those of `interp.decision.null_pair_denominator`.
        n_prompts: of each reading, evenly spread over the decisions.
        seed: of the first noise pair.

    Returns:
        Variables noise_effect [noise_pair reading component role], means over examples in the metric's units (NaN where
        no example has such tokens, or a noise pair decides nothing otherwise), and noise_n, likewise; coordinate
        noise_direction on noise_pair.

    Raises:
        FrankenlensError: as `component_map`; fewer than one pair or prompt.
    """
    if n_pairs < 1 or n_prompts < 1:
        raise FrankenlensError(f"n_pairs is {n_pairs} and n_prompts {n_prompts}; give at least one of each")
    roles = roles_of(decisions.prompts, roles)
    rows = np.unique(np.linspace(0, len(decisions) - 1, min(n_prompts, len(decisions))).round().astype(int))
    prompts, metric = [decisions.prompts[row] for row in rows], decisions.metric.select(rows.tolist())
    models = {"in": pair.in_, "rl": pair.rl}
    found: dict[tuple[int, str, str], xr.Dataset] = {}
    changes = random_changes(pair, range(seed, seed + n_pairs))
    for number, change in enumerate(tqdm(changes, desc="noise pairs", unit="map", disable=not progress)):
        direction = directions[number % len(directions)]
        donor, recipient = DIRECTIONS[direction]
        traces = decisions.in_traces if recipient == "in" else decisions.rl_traces
        with changed_weights(models[donor].model, _noisy(models[recipient].model, change)):
            read: dict[str, tuple[Sequence[Prompt], Metric]] = {"same": (prompts, metric)}
            read["own"] = _own(models[donor], models[recipient], traces, decisions.choice, n_prompts)
            for reading, (asked, of) in read.items():
                if len(asked):
                    found[number, reading, direction] = _map(
                        models, dict.fromkeys(models, asked), of, {direction: (donor, recipient)}, points, roles,
                        batch_size, False, kinds=("donor",),
                    )  # fmt: skip
    return _together(found, n_pairs, list(directions))


def floor_of(noise: xr.Dataset, cells: xr.DataArray) -> Float[np.ndarray, "component role"]:
    """The floor of every cell: the largest |mean effect| of its point at its role, over noise pairs and readings.

    Args:
        noise: what `noise_cells` returns.
        cells: with coordinates component (and its point) and role.

    Returns:
        NaN where no noise pair has a cell of that kind.
    """
    reached = abs(noise["noise_effect"]).max(["noise_pair", "reading"])
    reached = reached.reindex({name: cells[name].to_numpy() for name in ("component", "role")})
    largest = reached.transpose("component", "role").to_numpy().copy()
    points = cells["point"].to_numpy()
    for point in np.unique(points):
        own = points == point
        largest[own] = np.fmax.reduce(largest[own], axis=0, keepdims=True)
    return largest


def _noisy(recipient: torch.nn.Module, change: Change) -> Change:
    """The recipient's weights with noise, for a model that holds others."""
    own = dict(recipient.named_parameters())
    return lambda name, weight: change(name, own[name].detach().to(weight))


def _own(now, before, traces, choice: str, n_prompts: int) -> tuple[Sequence[Prompt], Metric]:
    """Decisions of the noise pair's own, as many as are looked at."""
    chosen = list(traces)[:n_prompts] if choice == "soft" else traces
    prompts, metric = own_decisions(now, before, chosen, choice, n_prompts)
    kept = range(min(n_prompts, len(prompts)))
    return [prompts[i] for i in kept], metric.select(kept)


def _together(
    found: Mapping[tuple[int, str, str], xr.Dataset], n_pairs: int, directions: Sequence[str]
) -> xr.Dataset:
    like = next(iter(found.values()))["effect"]
    shape = (n_pairs, len(READINGS), like.sizes["component"], like.sizes["role"])
    means, n = np.full(shape, np.nan), np.zeros(shape, int)
    components = like["component"].to_numpy()
    for (number, reading, _), one in found.items():
        effect = one["effect"].isel(direction=0).reindex(component=components).to_numpy()
        at, there = (number, READINGS.index(reading)), ~np.isnan(effect)
        n[at] = there.sum(-1)
        means[at] = np.where(there, effect, 0).sum(-1) / np.where(n[at] > 0, n[at], np.nan)
    dims = ("noise_pair", "reading", "component", "role")
    taken = [directions[number % len(directions)] for number in range(n_pairs)]
    return xr.Dataset(
        {"noise_effect": (dims, means, {"units": like.attrs.get("units", "")}), "noise_n": (dims, n)},
        coords={
            "noise_pair": np.arange(n_pairs),
            "noise_direction": ("noise_pair", taken),
            "reading": list(READINGS),
            "component": components,
            "role": like["role"].to_numpy(),
        },
    )
