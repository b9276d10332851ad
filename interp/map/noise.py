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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.shared import shared
from interp.decision import NOISE_PAIRS, Change, changed_weights, own_decisions, random_changes
from interp.map.component_map import DIRECTIONS, MAP_POINTS, _map, roles_of
from interp.metrics import Metric
from interp.prompts import Prompt
from interp.results.store import Store, fingerprint, part

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
    keep: Store | None = None,
) -> xr.Dataset:
    """The cells of pairs that learnt nothing, for `interp.map.summary.summarise`.

    One model of the pair holds the other's weights with noise in the meantime; afterwards both are as they were.

    Args:
        pair, decisions, directions, points, roles, batch_size: as given to `interp.map.component_map.component_map`.
        n_pairs: noise pairs, each in one direction; with this seed those of `interp.decision.null_pair_denominator`.
        n_prompts: of each reading: of `same` evenly spread over the decisions, of `own` the first that the noise pair
            has among traces in random order.
        seed: of the first noise pair.
        progress: show a bar.
        keep: where it is kept what is finished, pair by pair.

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
    found = []
    changes = random_changes(pair, range(seed, seed + n_pairs))

    def measure(number: int) -> dict[str, Any]:
        direction = directions[number % len(directions)]
        traces = _spread(decisions.in_traces if DIRECTIONS[direction][1] == "in" else decisions.rl_traces)
        one = _NoisePair(
            models,
            direction,
            changes[number],
            (prompts, metric),
            traces,
            decisions.choice,
            points,
            roles,
            n_prompts,
            batch_size,
        )
        return part(keep, f"noise-{number}", one.run, fingerprint(seed + number, *one.about))

    with tqdm(total=n_pairs, desc="noise pairs", unit="map", disable=not progress) as bar:
        for _, one in shared("noise pairs", range(n_pairs), measure):
            found.append(one)
            bar.update()
    return _together(found, list(directions), roles, decisions.metric.units)


@dataclass(frozen=True)
class _NoisePair:
    """A recipient of the pair, and its like with noise in the weights of the donor, while it runs.

    Attributes:
        same: the pair's prompts and metric.
        traces: of the recipient, for decisions of the noise pair's own.
    """

    models: Mapping[str, HookedVLM]
    direction: str
    change: Change
    same: tuple[Sequence[Prompt], Metric]
    traces: Sequence[Prompt]
    choice: str
    points: Sequence[str]
    roles: Sequence[str]
    n_prompts: int
    batch_size: int

    @property
    def about(self) -> list[Any]:
        """What its cells depend on, but for the models and the change."""
        tokens = [[list(prompt.ids) for prompt in some] for some in (self.same[0], self.traces)]
        return [tokens, list(self.points), list(self.roles), self.direction, self.n_prompts, self.choice]

    def run(self) -> dict[str, Any]:
        """Components, and by reading the means over examples and how many there are [component role]."""
        donor, recipient = (self.models[name] for name in DIRECTIONS[self.direction])
        cells: dict[str, xr.Dataset] = {}
        with changed_weights(donor.model, _noisy(recipient.model, self.change)):
            of = (donor, recipient, self.traces, self.choice, self.batch_size, self.n_prompts)
            for reading, (prompts, metric) in zip(READINGS, (self.same, own_decisions(*of)), strict=True):
                if len(prompts):
                    cells[reading] = self._cells(prompts, metric)
        return _means(cells)

    def _cells(self, prompts: Sequence[Prompt], metric: Metric) -> xr.Dataset:
        of, way = dict.fromkeys(self.models, prompts), {self.direction: DIRECTIONS[self.direction]}
        settings = (self.points, self.roles, self.batch_size, False)
        return _map(self.models, of, metric, way, *settings, kinds=("donor",))


def floor_of(
    noise: xr.Dataset, cells: xr.DataArray
) -> tuple[Float[np.ndarray, "component role"], Bool[np.ndarray, "component role"]]:
    """The floor of every cell: the largest |mean effect| of its point at its role, over noise pairs and readings.

    Args:
        noise: what `noise_cells` returns.
        cells: with coordinates component (and its point) and role.

    Returns:
        The floor, NaN where no noise pair has a cell of that kind, or one is infinite; and where one is.
    """
    reached = abs(noise["noise_effect"]).max(["noise_pair", "reading"])
    reached = reached.reindex({name: cells[name].to_numpy() for name in ("component", "role")})
    largest = reached.transpose("component", "role").to_numpy().copy()
    points = cells["point"].to_numpy()
    for point in np.unique(points):
        own = points == point
        largest[own] = np.fmax.reduce(largest[own], axis=0, keepdims=True)
    endless = np.isinf(largest)
    return np.where(endless, np.nan, largest), endless


def _noisy(recipient: torch.nn.Module, change: Change) -> Change:
    """The recipient's weights with noise, for a model that holds others."""
    return lambda name, weight: change(name, recipient.get_parameter(name).detach().to(weight))


def _spread(traces: Sequence[Prompt]) -> list[Prompt]:
    """Traces in an order of their own: data come task by task, and the first few would be of one."""
    return [traces[row] for row in np.random.default_rng(0).permutation(len(traces))]


def _means(cells: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Of one noise pair: components, and by reading means over examples and how many [component role]."""
    first = next(iter(cells.values()))
    components = [str(name) for name in first["component"].to_numpy()]
    means = np.full((len(READINGS), len(components), first.sizes["role"]), np.nan)
    n = np.zeros(means.shape, int)
    for reading, one in cells.items():
        effect = one["effect"].isel(direction=0).reindex(component=components).to_numpy()
        at, there = READINGS.index(reading), ~np.isnan(effect)
        n[at] = there.sum(-1)
        sums = np.where(np.isinf(effect).any(-1), np.inf, np.where(np.isfinite(effect), effect, 0).sum(-1))
        means[at] = sums / np.where(n[at] > 0, n[at], np.nan)
    return {"components": components, "means": means, "n": n}


def _together(
    found: Sequence[Mapping[str, Any]], directions: Sequence[str], roles: Sequence[str], units: str
) -> xr.Dataset:
    components = list(found[0]["components"])
    dims = ("noise_pair", "reading", "component", "role")
    return xr.Dataset(
        {
            "noise_effect": (dims, np.stack([one["means"] for one in found]), {"units": units}),
            "noise_n": (dims, np.stack([one["n"] for one in found])),
        },
        coords={
            "noise_pair": np.arange(len(found)),
            "noise_direction": (
                "noise_pair",
                [directions[number % len(directions)] for number in range(len(found))],
            ),
            "reading": list(READINGS),
            "component": components,
            "role": list(roles),
        },
    )
