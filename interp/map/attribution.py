"""Attribution patching: every component's patch effect estimated from gradients, not measured.

AtP (Nanda 2023; Kramar et al. 2403.00745): effect of a component ~ gradient of the metric on the recipient's run
. (donor's activation - recipient's), two forwards and one backward for all components together. Integrated gradients
(Sundararajan et al. 1703.01365; Marks et al. 2403.19647): that gradient averaged over `steps` midpoints of the way from
the recipient's activation to the donor's. The way is walked by one layer's whole attention output, MLP output or
residual stream at a time, all tokens together: for these the estimates of all tokens add up to the exact effect, for
single heads, neurons and roles they are shares of it. `verify` says how far off the strongest are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import Role, Writer
from hooks.batches import fitting, forward_bytes, in_parts, logits_bytes
from hooks.engine import HookContext, as_added, head_results
from hooks.memory import point_bytes
from hooks.plain import matrix
from hooks.weights import d_mlp
from interp.map.batch import rows_at_once
from interp.map.cells import Donor, cells_of, run_cells
from interp.map.component_map import DIRECTIONS, batches_of, roles_of
from interp.map.components import Component, cached_names, components
from interp.metrics.reading import Metric, Reading
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.pairing import PatchBatch
from interp.questions.examples import cluster_of, with_looked_at
from interp.sweep.activations import activation_of
from interp.sweep.rerun import CleanRun

if TYPE_CHECKING:
    from interp.decision import DecisionSet
    from interp.pair.pair import Pair

ATTRIBUTED = ("resid_pre", "attn_out", "cross_attn_out", "mixer_out", "mlp_out", "head", "expert")
BY_DEFAULT = ATTRIBUTED[:-1]
"""Attributed where nothing else is asked for; experts, of which there may be thousands, only by name."""
_STREAM = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "cross_attn_out": "hook_cross_attn_out",
    "mixer_out": "hook_mixer_out",
    "mlp_out": "hook_mlp_out",
    "head": "hook_attn_out",
    "expert": "hook_mlp_out",
}
"""The stream whose gradient a component's change meets."""


def attribute(
    pair: "Pair",
    decisions: "DecisionSet",
    directions: Sequence[str] = tuple(DIRECTIONS),
    points: Sequence[str] = BY_DEFAULT,
    roles: Sequence[str] | None = None,
    steps: int = 0,
    neurons: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Estimate the component map of a pair.

    Args:
        pair: IN and RL, opened.
        decisions: what is measured, and the prompts up to each decision.
        directions: "rl_to_in", "in_to_rl".
        points: of `ATTRIBUTED`. A head's activation is its result, through its own model's W_O; an expert's what it
            contributes, weighted by its own model's router.
        roles: as in `component_map`.
        steps: 0 for AtP; otherwise points on the way of integrated gradients, each a forward and a backward pass per
            layer and stream.
        neurons: also estimate every neuron: the donor's activation of it through the recipient's W_down.
        batch_size: prompts a forward.

    Returns:
        Variables effect [direction component role example] (estimate of patched - recipient, in the metric's units, NaN
        where an example has no such token), recipient and donor [direction example]; with `neurons` also
        neuron_effect and neuron_se [direction block neuron role], mean over examples and its standard error.

    Raises:
        FrankenlensError: an unknown direction, point or role; no decision qualifies; gradients do not flow.
    """
    unknown = [d for d in directions if d not in DIRECTIONS]
    if unknown:
        raise FrankenlensError(f"{unknown[0]!r} is no direction; choose of {', '.join(DIRECTIONS)}.")
    decisions.require_some()
    prompts = {"in": decisions.prompts, "rl": decisions.prompts}
    ways = {d: DIRECTIONS[d] for d in directions}
    models = {"in": pair.in_, "rl": pair.rl}
    found = _attribute(
        models, prompts, decisions.metric, ways, points, roles, steps, neurons, batch_size, progress
    )
    return with_looked_at(found, decisions.examples)


def attribute_within(
    vlm: HookedVLM,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    metric: Metric,
    points: Sequence[str] = BY_DEFAULT,
    roles: Sequence[str] | None = None,
    steps: int = 0,
    neurons: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Estimate what `interp.map.patch` measures: one model, activations of clean prompts into corrupt ones.

    Args and returns are those of `attribute`; prompts go row by row with the same roles at the same positions.

    Raises:
        FrankenlensError: the prompts do not line up.
    """
    if [p.roles for p in clean] != [p.roles for p in corrupt]:
        raise FrankenlensError("clean and corrupt prompts must have the same roles at the same positions.")
    models, prompts = {"clean": vlm, "corrupt": vlm}, {"clean": clean, "corrupt": corrupt}
    ways = {"clean_to_corrupt": ("clean", "corrupt")}
    return _attribute(models, prompts, metric, ways, points, roles, steps, neurons, batch_size, progress)


def verify(
    attributed: xr.Dataset,
    pair: "Pair",
    decisions: "DecisionSet",
    top_k: int = 30,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Measure the cells of largest mean |estimate| exactly.

    Args:
        attributed: of `attribute`, on the same pair and decisions.
        pair: IN and RL, opened.
        decisions: as given to `attribute`.
        top_k: cells of each direction.
        batch_size: prompts a forward.

    Returns:
        Variables estimate and exact [direction rank] (means over examples), component and role [direction rank];
        spearman [direction] between the two, worst_miss [direction], the largest |estimate - exact|.
    """
    directions = attributed.direction.values.tolist()
    roles = attributed.role.values.tolist()
    names = attributed.component.values.tolist()
    wanted = components(pair.in_, list(dict.fromkeys(attributed.point.values.tolist())))
    means = attributed.effect.mean("example").values
    models = {"in": pair.in_, "rl": pair.rl}
    shape = (len(directions), min(top_k, means[0].size))
    sums, counts = np.zeros(shape), np.zeros(shape)
    chosen = [_strongest(mean, shape[1]) for mean in means]
    size = rows_at_once(models, wanted, max(map(len, decisions.prompts)), ["donor"], batch_size)
    parts = list(batches_of(decisions.prompts, size))
    with tqdm(
        total=len(parts) * shape[0] * shape[1], desc="verifying", unit="run", disable=not progress
    ) as bar:

        def measure(rows: Sequence[int]) -> list[tuple[int, int, Float[np.ndarray, " row"]]]:
            """By direction and rank."""
            select, measured = decisions.metric.select(rows), []
            ready, donors = {}, {}
            for name, vlm in models.items():
                batch = collate([decisions.prompts[i] for i in rows]).to(vlm.device)
                ready[name] = PatchBatch(batch, select.reads(batch))
                donors[name] = Donor(vlm, batch, cached_names(vlm, wanted), select)
            for d, direction in enumerate(directions):
                donor, recipient = DIRECTIONS[direction]
                ends = donors[donor], donors[recipient]
                cells = cells_of(*ends, ready[recipient], wanted, roles, ["donor"])
                by_place = {(names.index(wanted[c.component].name), c.role): c for c in cells}
                places = [
                    (rank, by_place[place]) for rank, place in enumerate(chosen[d]) if place in by_place
                ]
                found = run_cells(models[recipient], ready[recipient], select, [c for _, c in places], bar)
                measured += [(d, rank, values) for (rank, _), values in zip(places, found, strict=True)]
            return measured

        for part in parts:
            for _, measured in in_parts(part, len(part), measure):
                for d, rank, values in measured:
                    sums[d, rank] += np.nansum(values)
                    counts[d, rank] += np.isfinite(values).sum()
    exact = sums / counts
    estimate = np.array(
        [[mean[place] for place in places] for mean, places in zip(means, chosen, strict=True)]
    )
    return xr.Dataset(
        {
            "estimate": (("direction", "rank"), estimate),
            "exact": (("direction", "rank"), exact),
            "component": (("direction", "rank"), [[names[c] for c, _ in places] for places in chosen]),
            "role": (("direction", "rank"), [[roles[r] for _, r in places] for places in chosen]),
            "spearman": (
                "direction",
                [_rank_correlation(a, b) for a, b in zip(estimate, exact, strict=True)],
            ),
            "worst_miss": ("direction", np.abs(estimate - exact).max(1)),
        },
        coords={"direction": directions},
        attrs={"units": attributed.attrs["units"], "method": attributed.attrs["method"]},
    )


def _rank_correlation(a: Float[np.ndarray, " cell"], b: Float[np.ndarray, " cell"]) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    found: tuple[float, float] = tuple(spearmanr(a[known], b[known]))
    return float(found[0])


def _strongest(mean: Float[np.ndarray, "component role"], top_k: int) -> list[tuple[int, int]]:
    order = np.argsort(-np.nan_to_num(np.abs(mean), nan=-1.0), axis=None)[:top_k]
    places = np.stack(np.unravel_index(order, mean.shape), axis=1)
    return [(int(c), int(r)) for c, r in places if np.isfinite(mean[c, r])]


@torch.no_grad()
def _attribute(
    models: Mapping[str, HookedVLM],
    prompts: Mapping[str, Sequence[Prompt]],
    metric: Metric,
    directions: Mapping[str, tuple[str, str]],
    points: Sequence[str],
    roles: Sequence[str] | None,
    steps: int,
    neurons: bool,
    batch_size: int,
    progress: bool,
) -> xr.Dataset:
    first = next(iter(prompts.values()))
    if not first:
        raise FrankenlensError("no prompts are given, so there is nothing to attribute.")
    unknown = [point for point in points if point not in ATTRIBUTED]
    if unknown:
        raise FrankenlensError(f"{unknown[0]!r} cannot be attributed; choose of {', '.join(ATTRIBUTED)}.")
    if steps < 0:
        raise FrankenlensError(f"steps is {steps}; give 0 for AtP, or the number of points on the way")
    some = next(iter(models.values()))
    some.require("positions", "attribution patching")
    wanted, names = _attributable(some, points), roles_of(first, roles)
    effect = np.full((len(directions), len(wanted), len(names), len(first)), np.nan)
    ends = np.full((2, len(directions), len(first)), np.nan)
    if neurons:
        some.require("neurons", "attribution to neurons")
        if any(_apart(block.writer("mlp")) for block in some.anatomy.text.blocks):
            raise FrankenlensError(
                f"attribution to neurons needs an MLP whose output is added as it is; {type(some.model).__name__} puts "
                "a norm or a factor between. Leave neurons out; attribute(points=('mlp_out',)) works."
            )
    moments = _Moments(some, len(directions), len(names)) if neurons else None
    parts = list(batches_of(first, _rows_at_once(models, max(map(len, first)), batch_size)))
    streams = list(dict.fromkeys([*(_STREAM[point] for point in points), *(["hook_mlp_out"] * neurons)]))
    with tqdm(total=len(parts) * len(directions), desc="attributing", disable=not progress, delay=2) as bar:

        def measure(rows: Sequence[int]) -> _Moments | None:
            """Fills in these rows; what is summed over rows is given back."""
            select = metric.select(rows)
            sums = None if moments is None else _Moments(some, len(directions), len(names))
            runs = {
                name: _Run(vlm, collate([prompts[name][i] for i in rows]).to(vlm.device), select)
                for name, vlm in models.items()
            }
            for d, (donor, recipient) in enumerate(directions.values()):
                run = runs[recipient]
                gradients = run.gradients(runs[donor], streams, steps)
                masks = torch.stack([run.where(name) for name in names])
                for c, component in enumerate(wanted):
                    change = _change(runs[donor], run, component.hook, component.head)
                    stream = f"blocks.{component.layer}.{_STREAM[component.point]}"
                    of_token = (gradients[stream] * change).flatten(2).sum(-1)  # over parallel streams too
                    effect[d, c][:, rows] = _by_role(of_token, masks)
                if sums is not None:
                    sums.add(d, runs[donor], run, gradients, masks)
                ends[0, d, rows], ends[1, d, rows] = run.metric, runs[donor].metric
                bar.update()
            return sums

        for part in parts:
            for _, sums in in_parts(part, len(part), measure):
                if moments is not None and sums is not None:
                    moments.take(sums)
    dims, units = ("direction", "component", "role", "example"), {"units": metric.units}
    return xr.Dataset(
        {
            "effect": (dims, effect, units),
            "recipient": (("direction", "example"), ends[0], units),
            "donor": (("direction", "example"), ends[1], units),
            **({} if moments is None else moments.variables(units)),
        },
        coords={
            "direction": list(directions),
            "component": [c.name for c in wanted],
            "role": names,
            "example": [p.example.id for p in first],
            "cluster": ("example", [cluster_of(p.example) for p in first]),
            "point": ("component", [c.point for c in wanted]),
            "layer": ("component", [-1 if c.layer is None else c.layer for c in wanted]),
            "head": ("component", [-1 if c.head is None else c.head for c in wanted]),
        },
        attrs={
            "metric": metric.name,
            "units": metric.units,
            "method": f"integrated gradients, {steps} steps" if steps else "AtP",
        },
    )


def _rows_at_once(models: Mapping[str, HookedVLM], width: int, batch_size: int) -> int:
    """Prompts that run together: of each, both models' clean activations, and all that a gradient goes back through.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    tokens, sizes = {"input_ids": torch.empty(1, width, device="meta")}, []
    for vlm in models.values():
        kept = sum(point_bytes(vlm, vlm.point(name), tokens) for name in _kept(vlm))
        one_of_heads = 4 * width * vlm.n_heads * vlm.d_model
        of_row = len(models) * kept + (vlm.n_layers + 1) * forward_bytes(vlm, width) + one_of_heads
        sizes.append(fitting(vlm, batch_size, of_row, "attribution", 2 * logits_bytes(vlm, width)))
    return min(sizes)


def _kept(vlm: HookedVLM) -> list[str]:
    """Activations of a clean run that attribution reads."""
    leaves = (
        *dict.fromkeys(_STREAM.values()),
        *("attn.hook_z", "mlp.hook_post", "mlp.hook_expert_in", "mlp.hook_router_weights"),
    )
    names = [f"blocks.{i}.{leaf}" for i in range(vlm.n_layers) for leaf in leaves]
    return [name for name in names if name in vlm.hook_points]


def _attributable(vlm: HookedVLM, points: Sequence[str]) -> list[Component]:
    """The components; heads and experts only where what they give out is added to the stream as it is."""
    wanted = components(vlm, points)
    roles: dict[str, Role] = {"head": "attn", "expert": "moe"}
    for point, role in roles.items():
        writers = {layer: block.writer(role) for layer, block in enumerate(vlm.anatomy.text.blocks)}
        reasons = {
            f"puts a norm or a factor between its {point}s and the stream": [
                layer for layer, writer in writers.items() if _apart(writer)
            ],
            f"adds what its {point}s give out to the stream in a way that was not found": [
                layer for layer, writer in writers.items() if writer is None
            ],
        }
        for why, layers in reasons.items():
            if not any(one.point == point and one.layer in layers for one in wanted):
                continue
            warnings.warn(
                f"{type(vlm.model).__name__} {why}, so the gradient of the stream says nothing of single {point}s: "
                "they are left out; component_map measures them.",
                stacklevel=4,
            )
            wanted = [one for one in wanted if one.point != point or one.layer not in layers]
    return wanted


def _apart(writer: Writer | None) -> bool:
    """Whether something lies between what a part's heads or experts give out and the stream."""
    if writer is None:
        return False
    between = writer.experts is not None and not writer.experts.added
    return writer.module != writer.body or writer.coefficient != 1.0 or between


def _by_role(of_token: Float[Tensor, "batch pos"], masks: Tensor) -> Float[np.ndarray, "role batch"]:
    """Sums over each role's tokens, NaN where a row has none."""
    sums = torch.where(masks, of_token.double(), 0.0).sum(-1)
    return sums.masked_fill(~masks.any(-1), torch.nan).cpu().numpy()


def _change(donor: _Run, recipient: _Run, hook: str, head: int | None) -> Float[Tensor, "batch pos d_model"]:
    """Donor's activation - recipient's."""
    return donor.activation(hook, head) - recipient.activation(hook, head).to(recipient.vlm.device)


class _Run:
    """A clean run of one model, and gradients of the metric in it."""

    def __init__(self, vlm: HookedVLM, batch: PromptBatch, metric: Metric) -> None:
        self.vlm, self.batch, self._reading = vlm, batch, Reading([metric], batch)
        with torch.inference_mode(False), torch.no_grad():
            self._clean = CleanRun(vlm, batch.inputs, _kept(vlm), self._reading.columns)
            self.metric = self._reading(self._clean.logits)[0].double().cpu().numpy()
        self.cache = self._clean.cache
        self._results: dict[str, Tensor] = {}

    def where(self, role: str) -> Tensor:
        """The tokens of a role, as in the component map."""
        return self._reading.reads if role == "decision" else self.batch.mask(role)

    def activation(self, hook: str, head: int | None) -> Float[Tensor, "batch pos d_model"]:
        """An activation; a head's result is made by this model's own W_O, an expert's contribution by its experts."""
        if head is None:
            return self.cache[hook]
        if hook.endswith("hook_expert_out"):
            with torch.no_grad():
                return activation_of(self.vlm, lambda name: self.cache[name], hook, head)
        if hook not in self._results:  # all heads of a layer are asked for in turn
            z = self.cache[hook.replace("hook_result", "hook_z")]
            point = self.vlm.hook_points[hook]
            results = head_results(self.vlm.module(point.module), z)
            self._results = {hook: as_added(self.vlm.model, point, results)}
        return self._results[hook][:, :, head]

    def gradients(
        self, donor: _Run, streams: Sequence[str], steps: int
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Gradient of the metric, summed over rows, at every stream: here, or averaged on the way to the donor's."""
        offered = self.vlm.hook_points
        names = [f"blocks.{i}.{leaf}" for i in range(self.vlm.n_layers) for leaf in streams]
        names = [name for name in names if name in offered]
        with _differentiable(self.vlm):
            if not steps:
                return self._at(names, {})
            found = {}
            for name in names:
                change = (donor.cache[name] - self.cache[name]).detach()
                total = torch.zeros_like(change)
                for step in range(steps):
                    here = self.cache[name] + (step + 0.5) / steps * change
                    total += self._at([name], {name: here})[name]
                found[name] = total / steps
            return found

    def _at(self, names: Sequence[str], written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taps: dict[str, Tensor] = {}

        def tap(activation: Tensor, hook: HookContext) -> Tensor:
            value = written.get(hook.name, activation)
            taps[hook.name] = value if value.requires_grad else value.detach().clone().requires_grad_()
            return taps[hook.name]

        logits = self._clean.rerun([(name, tap) for name in names], gradients=True)
        total = self._reading(logits).sum()
        if not total.requires_grad:
            raise FrankenlensError(
                f"no gradient of the metric flows through {type(self.vlm.model).__name__} (quantized?); "
                "measure exactly, with component_map."
            )
        return dict(zip(taps, torch.autograd.grad(total, list(taps.values())), strict=True))


@contextmanager
def _differentiable(vlm: HookedVLM) -> Iterator[None]:
    """Gradients on, for activations only; parameters are frozen meanwhile, so none of them gains a `.grad`."""
    with vlm.exclusive("gradients"):
        flags = {parameter: parameter.requires_grad for parameter in vlm.model.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


class _Moments:
    """Mean and spread over examples of every neuron's estimate; no example is kept."""

    def __init__(self, vlm: HookedVLM, directions: int, roles: int) -> None:
        width = max(d_mlp(vlm.model, block) for block in vlm.anatomy.text.blocks)
        shape = (directions, vlm.n_layers, width, roles)
        self._sum, self._square, self._n = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def add(
        self, d: int, donor: _Run, recipient: _Run, gradients: Mapping[str, Tensor], masks: Tensor
    ) -> None:
        """One batch."""
        for layer, block in enumerate(recipient.vlm.anatomy.text.blocks):
            down = recipient.vlm.module(block.mlp_out)
            name = f"blocks.{layer}.mlp.hook_post"
            weight = matrix(down, "attribution of neurons")
            through = gradients[f"blocks.{layer}.hook_mlp_out"]
            through = through @ weight.to(through)
            of_token = (through * (donor.cache[name] - recipient.cache[name])).double()
            for r, mask in enumerate(masks):
                rows = mask.any(-1)
                of_row = torch.where(mask[..., None], of_token, 0.0).sum(1)[rows].cpu().detach().numpy()
                self._sum[d, layer, :, r] += of_row.sum(0)
                self._square[d, layer, :, r] += (of_row**2).sum(0)
                self._n[d, layer, :, r] += len(of_row)

    def take(self, others: _Moments) -> None:
        """Those of other rows, added."""
        self._sum += others._sum
        self._square += others._square
        self._n += others._n

    def variables(self, units: dict[str, str]) -> dict[str, tuple]:
        """Mean and its standard error; NaN without examples."""
        dims = ("direction", "block", "neuron", "role")
        n = np.where(self._n > 0, self._n, np.nan)
        mean = self._sum / n
        spread = np.sqrt(np.maximum(0, self._square / n - mean**2) / np.where(n > 1, n - 1, np.nan))
        return {"neuron_effect": (dims, mean, units), "neuron_se": (dims, spread, units)}
