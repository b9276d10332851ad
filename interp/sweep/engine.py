"""`sweep`: any interventions x prompts x metrics, as one labelled array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import batched, in_parts
from hooks.memory import limit, memory_limit, parse_bytes
from hooks.shared import agreed, shared
from interp.metrics import Metric
from interp.metrics.logits import sparing_logits
from interp.metrics.reading import Reading
from interp.prompts import Prompt, collate
from interp.prompts.pairing import beside, image_shapes, partners
from interp.results.digest import digest
from interp.results.store import Store, alone_with, fingerprint
from interp.sweep.activations import activation_of, kept_for
from interp.sweep.batch import BatchSweep
from interp.sweep.intervention import Bound, Intervention, Means, Others, bind, has_tokens, mean_key, validate
from interp.sweep.places import LEADING, Where, of_vision, where_label, where_mask
from interp.sweep.within import in_halves, rows_fitting

SHARD = 512  # interventions
Shard = tuple[list[int] | None, Float[np.ndarray, "..."]]
"""Interventions, by number, and what was measured under each; None: under none."""


def sweep(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    metrics: Metric | Mapping[str, Metric],
    *,
    donor: HookedVLM | None = None,
    donor_prompts: Sequence[Prompt] | None = None,
    batch_size: int = 16,
    max_memory: int | str | None = None,
    out: Path | str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Every intervention on every prompt, measured.

    An intervention is computed from the layer and the token on that it can change, many at once. Where a model does
    not allow that, a warning says what is done instead; the numbers are the same.

    Args:
        recipient: the opened model that is acted on.
        prompts: what it reads.
        interventions: see `Intervention`.
        metrics: one, or several by name.
        donor: where `replace` without a value takes activations from; by default the recipient.
        donor_prompts: what the donor reads, row by row with the same roles and image sizes; by default `prompts`.
        batch_size: prompts that run together.
        max_memory: bytes, or such as "2GiB", for stored activations and for what runs at once; by default what
            `memory_limit` allows.
        out: folder that finished parts are kept in; the same call goes on where it was killed. One run at a time.
        progress: show a bar with rate and time left.

    Returns:
        Variables value [metric intervention example], the metric under the intervention, NaN where it touches no token
        of the example, and clean [metric example]; coordinates label, hook, kind, layer, index, where.

    Raises:
        FrankenlensError: an intervention that cannot act where it is asked to, a metric that reads a token that is
            not there, prompts that do not line up, a budget too small for one row; before anything runs. Of `out`: it
            holds another sweep, another run writes to it, it cannot be written to, or the disk is full.

    Example:
        >>> prompts = [pair.builder.build(one) for one in fl.tasks.sample("sum", 2, seed=0, split="map")]
        >>> metric = fl.LogitDifference(torch.tensor([10, 10]), torch.tensor([11, 11]))
        >>> zeros = [fl.Intervention("blocks.5.attn.hook_z", "zero", index=head) for head in range(pair.rl.n_heads)]
        >>> dict(fl.sweep(pair.rl, prompts, zeros, metric, progress=False)["value"].sizes)
        {'metric': 1, 'intervention': 4, 'example': 2}
    """
    named = dict(metrics) if isinstance(metrics, Mapping) else {metrics.name: metrics}
    given = donor_prompts if donor_prompts is not None else prompts
    _require(recipient, prompts, given, interventions, named, donor is not None or donor_prompts is not None)
    source = donor if donor is not None else recipient
    budget = limit() if max_memory is None else parse_bytes(max_memory)
    given_by = _cached(source, [i for i in interventions if i.value is None], ("replace",))
    kept = [(source, given_by), (recipient, _cached(recipient, interventions, ("resample", "mean", "skip")))]
    width = max(map(len, prompts))
    parts = _parts(prompts, rows_fitting(recipient, kept, width, batch_size, budget))
    about = {} if out is None else _about(recipient, source, interventions, named)
    values = np.full((len(named), len(interventions), len(prompts)), np.nan)
    clean = np.full((len(named), len(prompts)), np.nan)
    borrowing = any(i.kind == "resample" for i in interventions)
    partner = partners(prompts) if borrowing else torch.full((len(prompts),), -1)
    with (
        nullcontext() if out is None else alone_with(out, about) as store,
        memory_limit(budget),
        tqdm(desc="sweep", unit="run", disable=not progress, delay=1) as bar,
    ):
        parts = _begun(store, parts, fingerprint(batch_size, [list(prompt.ids) for prompt in prompts]))
        means = _kept_means(store, recipient, prompts, interventions, parts, progress)
        bar.reset(len(parts) * len(interventions))

        halves: dict[int, list[Sequence[int]]] = {}  # of a batch that there was no memory for at once
        begun: dict[tuple[int, ...], _Part] = {}  # the one that was run last

        def part_of(rows: Sequence[int]) -> _Part:
            if (known := begun.pop(tuple(rows), None)) is not None:
                return known
            begun.clear()
            return _Part(
                recipient, source, [prompts[r] for r in rows], [given[r] for r in rows], interventions,
                [metric.select(rows) for metric in named.values()], means, budget,
                partner[list(rows)], beside(prompts, rows, partner),
            )  # fmt: skip

        def measure(unit: tuple[int, int]) -> list[tuple[Sequence[int], list[Shard]]]:
            """One shard of one batch."""
            number, shard = unit

            def run(rows: Sequence[int], name: str) -> list[Shard]:
                part = part_of(rows)
                found = list(part.shards(store, name, shard, bar))
                begun[tuple(rows)] = part
                return found

            found: list[tuple[Sequence[int], list[Shard]]] = []
            for some in halves.get(number, [parts[number]]):
                found += in_halves(number, parts[number], some, run)
            halves[number] = [rows for rows, _ in found]
            return found

        shards = range(-(-len(interventions) // SHARD))
        units = [(number, shard) for number in range(len(parts)) for shard in shards]
        for _, measured in shared("sweep", units, measure, near=lambda unit: unit[0]):
            for rows, found in measured:
                for chosen, value in found:
                    if chosen is None:
                        clean[:, rows] = value
                    else:
                        values[:, np.array(chosen)[:, None], np.array(rows)] = value
    return _dataset(values, clean, named, interventions, [p.example.id for p in prompts], recipient)


class _Part:
    """One batch of a sweep; models run only if a shard is missing."""

    def __init__(
        self,
        recipient: HookedVLM,
        donor: HookedVLM,
        prompts: Sequence[Prompt],
        given: Sequence[Prompt],
        interventions: Sequence[Intervention],
        metrics: Sequence[Metric],
        means: Means,
        max_memory: int | None,
        partner: Int[Tensor, " batch"],
        others: Sequence[Prompt],
    ) -> None:
        self.recipient, self.donor, self.given = recipient, donor, given
        self.interventions, self.max_memory, self.means = interventions, max_memory, means
        self.n_metrics = len(metrics)
        self.batch = collate(prompts).to(recipient.device)
        self.others = others
        beside_it = Others(self._other, (partner >= 0).to(recipient.device))
        self._of_others: Mapping[str, Tensor] = {}
        self.reading = Reading(metrics, self.batch)
        self._cache: Mapping[str, Tensor] = {}
        self._sweep: BatchSweep | None = None
        self.bound: list[Bound] = [
            bind(i, recipient, self.batch, self._donated, self._own, means, beside_it) for i in interventions
        ]

    def shards(
        self, store: Store | None, name: str, number: int, bar: tqdm
    ) -> Iterator[tuple[list[int] | None, Float[np.ndarray, "..."]]]:
        """(Interventions of a shard, values); before the first shard (None, values without an intervention)."""
        chosen = self._order()[number * SHARD : (number + 1) * SHARD]
        todo: list[tuple[str, list[int] | None, Callable[[], np.ndarray]]] = [
            (f"{number:04d}", chosen, lambda: self._values(chosen, bar))
        ]
        if not number:
            todo.insert(0, ("clean", None, self._clean))
        for part, own, compute in todo:
            found = None if store is None else store.load(f"{name}-{part}", self._of)
            if found is None:
                found = compute()
                if store is not None:
                    store.save(f"{name}-{part}", found, self._of)
            else:
                bar.update(len(own or ()))
            yield own, found

    def _order(self) -> list[int]:
        """By reach, as far as it is known without running anything: the same in every run of a sweep."""

        def key(number: int) -> tuple[int, int, int, int]:
            edit = self.bound[number].edits[0]
            first = edit.first_column()
            return (-1 if first is None else first, *edit.start, number)

        return sorted(range(len(self.bound)), key=key)

    @property
    def sweep(self) -> BatchSweep:
        """Made when it is first needed."""
        if self._sweep is None:
            self._cache = self._donor_run()
            self._of_others = self._run_of_others()
            self._sweep = BatchSweep(
                self.recipient,
                self.batch,
                self.reading,
                [bound.edits for bound in self.bound],
                _cached(self.recipient, self.interventions, ("skip",)),
                self.max_memory,
            )
        return self._sweep

    def _clean(self) -> np.ndarray:
        return self.sweep.clean.double().cpu().numpy()

    def _values(self, chosen: list[int], bar: tqdm) -> np.ndarray:
        place = {number: i for i, number in enumerate(chosen)}
        values = np.full((self.n_metrics, len(chosen), len(self.batch)), np.nan)
        with self.recipient.exclusive("a sweep"):  # one use, however many runs
            for number, found in self.sweep.run(chosen):
                touched = self.bound[number].rows.cpu().numpy()
                values[:, place[number], touched] = found.double().cpu().numpy()[:, touched]
                bar.update()
        return values

    def _donor_run(self) -> Mapping[str, Tensor]:
        names = _cached(self.donor, [i for i in self.interventions if i.value is None], ("replace",))
        if not names:
            return {}
        batch = collate(self.given).to(self.donor.device)
        if not bool(batch.with_image.any()):  # nothing fires there, and nothing is touched
            names = [name for name in names if not of_vision(name)]
        with torch.no_grad(), sparing_logits(self.donor) as extra:
            return self.donor.run_with_cache(batch.inputs, names, use_cache=False, **extra)[1]

    def _run_of_others(self) -> Mapping[str, Tensor]:
        names = _cached(self.recipient, self.interventions, ("resample",))
        if not self.others or not names:
            return {}
        if not bool(self.batch.with_image.any()):
            names = [name for name in names if not of_vision(name)]
        inputs = collate(self.others).to(self.recipient.device).inputs
        with torch.no_grad(), sparing_logits(self.recipient) as extra:
            cache = self.recipient.run_with_cache(inputs, names, use_cache=False, **extra)[1]
        # a module that is called once an image leaves as many: one behind the other, as an edit of it sees them
        return {name: torch.cat(list(cache.calls(name))) for name in names}

    def _other(self, hook: str, index: int | None) -> Tensor:
        return activation_of(self.recipient, lambda name: self._of_others[name], hook, index)

    def _donated(self, hook: str, index: int | None) -> Tensor:
        return activation_of(self.donor, lambda name: self._cache[name], hook, index)

    def _own(self, hook: str, index: int | None) -> Tensor:
        return activation_of(self.recipient, self.sweep.activation, hook, index)

    @cached_property
    def _of(self) -> str:
        """Of everything that the batch's numbers depend on and the sweep's manifest does not name."""
        digest = sha256()
        for prompt in [*self.batch.prompts, *self.given, *self.others]:
            digest.update(prompt.example.id.encode())
            for name, tensor in sorted(prompt.inputs.items()):
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        for mean in self.means.values():  # over all prompts of the sweep
            digest.update(mean.cpu().contiguous().numpy().tobytes())
        seen: set[int] = set()
        for intervention in self.interventions:
            for where in (intervention.where, intervention.source):
                if where is not None and callable(where) and id(where) not in seen:
                    seen.add(id(where))
                    digest.update(where(self.batch).cpu().numpy().tobytes())
        return digest.hexdigest()


def _cached(vlm: HookedVLM, interventions: Sequence[Intervention], kinds: Sequence[str]) -> list[str]:
    hooks = [
        i.hook.replace("resid_post", "resid_pre") if i.kind == "skip" else i.hook
        for i in interventions
        if i.kind in kinds
    ]
    return kept_for(vlm, hooks)


def _begun(store: Store | None, parts: list[list[int]], of: str) -> list[list[int]]:
    """The batches that a sweep was begun in: today there may be memory for others, whose parts would be other parts."""
    return agreed("batches", lambda: parts) if store is None else store.part("batches", lambda: parts, of)


def _kept_means(
    store: Store | None,
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    parts: Sequence[list[int]],
    progress: bool,
) -> Means:
    """`_means`, as they were when the sweep was begun: sums in other batches differ in their last bits."""
    keys = list(dict.fromkeys(mean_key(i) for i in interventions if i.kind == "mean"))
    if store is None or not keys:
        return _means(vlm, prompts, interventions, parts, progress)
    of = fingerprint([list(prompt.ids) for prompt in prompts], parts)
    kept = {key: store.load(f"mean-{n:04d}", of) for n, key in enumerate(keys)}
    if any(one is None for one in kept.values()):
        made = _means(vlm, prompts, interventions, parts, progress)
        kept = {key: mean.cpu().numpy() for key, mean in made.items()}
        for n, key in enumerate(keys):
            if key in kept:  # else no prompt has such tokens
                store.save(f"mean-{n:04d}", kept[key], of)
    return {key: torch.from_numpy(one).to(vlm.device) for key, one in kept.items()}


def _means(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    parts: Sequence[Sequence[int]],
    progress: bool,
) -> Means:
    """The mean activation of every `mean` intervention's point, over its tokens in all prompts."""
    wanted = {mean_key(i): i.where for i in interventions if i.kind == "mean"}
    if not wanted:
        return {}
    sums: dict[tuple[str, Where], Tensor] = {}
    counts: dict[tuple[str, Where], int] = dict.fromkeys(wanted, 0)
    hooks = list(dict.fromkeys(hook for hook, _ in wanted))

    def of_rows(rows: Sequence[int]) -> list[tuple[tuple[str, Where], Tensor, int]]:
        """Sums over these rows, and how many tokens they are of."""
        found = []
        batch = collate([prompts[row] for row in rows]).to(vlm.device)
        there = [hook for hook in hooks if bool(batch.with_image.any()) or not of_vision(hook)]
        with torch.no_grad(), sparing_logits(vlm) as extra:
            _, cache = vlm.run_with_cache(batch.inputs, there, use_cache=False, **extra)
        for key, where in wanted.items():
            if key[0] not in there:
                continue
            point = vlm.point(key[0])
            if has_tokens(point):
                chosen = cache[key[0]][where_mask(where, batch).to(vlm.device)].double()
            else:
                lead = sum(axis in LEADING for axis in point.axes)
                chosen = cache[key[0]].flatten(0, lead - 1).double()
            found.append((key, chosen.sum(0), len(chosen)))
        return found

    for part in tqdm(parts, desc="means", disable=not progress, delay=1):
        for _, found in in_parts(part, len(part), of_rows):
            for key, total, n in found:
                sums[key] = sums[key] + total if key in sums else total
                counts[key] += n
    return {key: total / max(1, counts[key]) for key, total in sums.items()}


def _require(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    given: Sequence[Prompt],
    interventions: Sequence[Intervention],
    metrics: Mapping[str, Metric],
    has_donor: bool,
) -> None:
    if not prompts or not interventions or not metrics:
        raise FrankenlensError("a sweep needs at least one prompt, one intervention and one metric.")
    vlm.require("positions", "a sweep")
    for intervention in interventions:
        validate(intervention, vlm, has_donor)
        if of_vision(intervention.hook) and not any(prompt.has_image for prompt in prompts):
            raise FrankenlensError(f"{intervention.hook} is of images, and none of these prompts holds one.")
    if len(given) != len(prompts):
        raise FrankenlensError(f"{len(given)} donor prompts for {len(prompts)} prompts; they go row by row.")
    for row, (one, other) in enumerate(zip(prompts, given, strict=True)):
        if one.roles != other.roles or image_shapes(one) != image_shapes(other):
            raise FrankenlensError(
                f"row {row} ({one.example.id} / {other.example.id}): donor and recipient prompt must have the same "
                "roles at the same positions and images of the same size."
            )
    batch_of_all = [(row, prompt) for row, prompt in enumerate(prompts)]
    for name, metric in metrics.items():
        rows = getattr(metric, "n_rows", None)
        if rows is not None and rows != len(prompts):
            raise FrankenlensError(
                f"metric {name!r} was made for {rows} prompts and {len(prompts)} are given; use metric.select(rows)."
            )
        for row, prompt in batch_of_all:
            one = collate([prompt])
            if not bool(metric.select([row]).reads(one).any()):
                raise FrankenlensError(
                    f"metric {name!r} reads no token of prompt {row} ({prompt.example.id}, {len(prompt)} tokens)."
                )


def _parts(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Row numbers by batch; equal lengths and roles stand together."""
    order = sorted(
        range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].roles, image_shapes(prompts[i]), i)
    )
    return [list(some) for some in batched(order, batch_size)]


def _about(
    recipient: HookedVLM,
    donor: HookedVLM,
    interventions: Sequence[Intervention],
    metrics: Mapping[str, Metric],
) -> dict[str, Any]:
    from interp.pair.pair import weights_sha256

    first = weights_sha256(recipient.model)
    return {
        "recipient": first,
        "donor": first if donor is recipient else weights_sha256(donor.model),
        "interventions": [
            [
                i.hook,
                i.kind,
                i.index,
                where_label(i.where),
                digest(i.value),
                i.source and where_label(i.source),
            ]
            for i in interventions
        ],
        "metrics": {
            name: [
                type(m).__name__,
                digest({f.name: getattr(m, f.name) for f in fields(m)} if is_dataclass(m) else vars(m)),
            ]
            for name, m in metrics.items()
        },
    }


def _dataset(
    values: Float[np.ndarray, "metric intervention example"],
    clean: Float[np.ndarray, "metric example"],
    metrics: Mapping[str, Metric],
    interventions: Sequence[Intervention],
    examples: list[str],
    vlm: HookedVLM,
) -> xr.Dataset:
    layers = [vlm.hook_points[i.hook].layer for i in interventions]
    return xr.Dataset(
        {
            "value": (("metric", "intervention", "example"), values),
            "clean": (("metric", "example"), clean),
        },
        coords={
            "metric": list(metrics),
            "units": ("metric", [metric.units for metric in metrics.values()]),
            "intervention": np.arange(len(interventions)),
            "label": ("intervention", [i.name for i in interventions]),
            "hook": ("intervention", [i.hook for i in interventions]),
            "kind": ("intervention", [i.kind for i in interventions]),
            "layer": ("intervention", [-1 if layer is None else layer for layer in layers]),
            "index": ("intervention", [-1 if i.index is None else i.index for i in interventions]),
            "where": ("intervention", [where_label(i.where) for i in interventions]),
            "example": examples,
        },
    )
