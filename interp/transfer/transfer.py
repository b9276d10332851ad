"""Transfer: do RL's weights, put into IN, bring RL's answers with them? Table 2 of 2602.12395; controls are variants.

`interp.transfer.variants` lists what can be put in, `interp.transfer.table` makes the table of what is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from interp.results.store import Store, alone_with
from interp.transfer.grafts import measured_graft, require_graftable
from interp.transfer.measuring import Measuring
from interp.transfer.outcomes import Metrics, Outcomes, names_of, texts_of, unknown
from interp.transfer.prefixes import sharing
from interp.transfer.variants import Variant
from interp.updates import Realized, way_out


def transfer(
    recipient: HookedVLM,
    donor: HookedVLM,
    variants: Sequence[Variant],
    metrics: Metrics,
    others: Mapping[str, HookedVLM] | None = None,
    *,
    keep: Path | None = None,
    rounded: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Every variant, in memory, on the same examples; and IN, RL and other models as they are.

    What IN and RL did decides which examples count, the same for all: one for which either has no value is left out.
    Where another model alone has none (its answer cannot be graded, say), it is not right; `why` keeps the reason.

    Variants whose metrics are known from texts (`answers`, those of `interp.fine_grained`) write them together, batch
    by batch: the features of images, and the prefill up to the first block that differs, are computed once for all that
    have these weights in common (`interp.transfer.prefixes`). The texts are those of each alone, token by token; where
    a model does not allow it, a warning says why, and each runs as a whole.

    In half precision the weights may not hold what a variant asks for. How far they do is measured for each, and one
    that is not what it says is not run but refused, by name (`interp.updates`).

    Args:
        recipient: IN; its own weights, bit for bit, afterwards.
        donor: RL.
        variants: see the functions above.
        metrics: by name.
        others: further models by name, e.g. "Base", or merges of `interp.transfer.merging`.
        keep: folder for what each model did, named by the hash of its weights as grafted; the same call goes on where
            it was killed. One folder per set of metrics: what these depend on is not looked at.
        rounded: run what would be refused, too.
        progress: a bar.

    Returns:
        right [variant example] (NaN: left out) and why [variant example], with the coordinates kind, control_of,
        norm_ratio, cosine and held (of what the weights hold to what was asked for, and the share of the entries in
        tensors that hold their own part: `interp.updates.Realized`; NaN for models), lacking (why that is not what the
        variant says; "" where it is) and refused (whether it was not run for that) [variant], metric, task and id
        [example]. The first variants are the models: others, IN, RL.

    Raises:
        FrankenlensError: before anything runs: no metrics, names that are not unique, an address that names nothing,
            models that do not align, or grafts that overlap. Of `keep`: it holds something else, another run writes to
            it, it cannot be written to, or the disk is full.
    """
    _require_sound(recipient, donor, variants, metrics, others or {})
    models = {**(others or {}), "IN": recipient, "RL": donor}
    with nullcontext() if keep is None else alone_with(keep, {"metrics": "by name"}) as store:
        rows, held = _rows(models, recipient, donor, variants, metrics, store, rounded, progress)
    lacking = [""] * len(models)
    for realized in held:
        why = realized.lacking(recipient.model.dtype)
        lacking.append(f"{why}. {way_out('' if rounded else 'rounded=True')}" if why else "")
    first = next(iter(rows.values()))
    refused = [[unknown(own, why) for own in first] for why in lacking]
    names = [*models, *(variant.name for variant in variants)]
    whole = [rows.get(name, refused[at]) for at, name in enumerate(names)]
    found = _dataset(names, names_of(metrics), whole).assign_coords(
        kind=("variant", ["model"] * len(models) + [variant.kind for variant in variants]),
        control_of=("variant", [""] * len(models) + [variant.control_of for variant in variants]),
        norm_ratio=("variant", [np.nan] * len(models) + [one.norm_ratio for one in held]),
        cosine=("variant", [np.nan] * len(models) + [one.cosine for one in held]),
        held=("variant", [np.nan] * len(models) + [one.share for one in held]),
        lacking=("variant", np.array(lacking, str)),
        refused=("variant", [bool(why) and not rounded for why in lacking]),
    )
    return _counted(found)


def _rows(
    models: Mapping[str, HookedVLM],
    recipient: HookedVLM,
    donor: HookedVLM,
    variants: Sequence[Variant],
    metrics: Metrics,
    store: Store | None,
    rounded: bool,
    progress: bool,
) -> tuple[dict[str, list[Outcomes]], list[Realized]]:
    """What each model and variant did, but for those that are refused, and what the weights hold of each variant."""
    runs = {"IN": (), **{variant.name: variant.grafts for variant in variants}}
    grouped = sharing(recipient, runs) if any(map(texts_of, metrics.values())) else []
    n_prompts = sum(len(texts.prompts) for one in metrics.values() for texts in texts_of(one))
    n_prompts += sum(not texts_of(one) for one in metrics.values())
    total = (len(models) + len(variants)) * n_prompts
    held: list[Realized] = []
    with tqdm(total=total, desc="transfer", unit="answer", disable=not progress, delay=1) as bar:
        alone = Measuring(metrics, store, bar)
        for name, vlm in models.items():
            alone.run(name, vlm, later=name in grouped)
        for variant in variants:
            with measured_graft(recipient, donor, variant.grafts) as (vlm, realized):
                held.append(realized)
                if realized.lacking(vlm.model.dtype) and not rounded:
                    bar.update(n_prompts)
                else:
                    alone.run(variant.name, vlm, later=variant.name in grouped)
        alone.together(recipient, donor, {name: runs[name] for name in grouped})
        return alone.rows(), held


def _counted(found: xr.Dataset) -> xr.Dataset:
    """The examples that both models have a value for; no variant decides what is left out. Of refused ones, none."""
    known = found["right"].sel(variant=["IN", "RL"]).notnull().all("variant")
    return found.assign(right=found["right"].fillna(0.0).where(known & ~found["refused"]))


def _require_sound(
    recipient: HookedVLM,
    donor: HookedVLM,
    variants: Sequence[Variant],
    metrics: Metrics,
    others: Mapping[str, HookedVLM],
) -> None:
    if not metrics:
        raise FrankenlensError('a transfer needs a metric, such as {"accuracy": answers(builder, examples)}')
    names = ["IN", "RL", *others, *(variant.name for variant in variants)]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise FrankenlensError(f"two variants are named {', '.join(twice)}; names must be unique")
    for variant in variants:
        try:
            require_graftable(recipient, donor, variant.grafts)
        except FrankenlensError as error:
            raise FrankenlensError(f"variant {variant.name!r}: {error}") from error


def _dataset(names: Sequence[str], metrics: Sequence[str], rows: Sequence[Sequence[Outcomes]]) -> xr.Dataset:
    first = rows[0]
    labels = [metric for metric, own in zip(metrics, first, strict=True) for _ in own.examples]
    ids = [example for own in first for example in own.examples]
    return xr.Dataset(
        {
            "right": (("variant", "example"), [[x for own in row for x in own.right] for row in rows]),
            "why": (
                ("variant", "example"),
                np.array([[x for own in row for x in own.why] for row in rows], str),
            ),
        },
        coords={
            "variant": list(names),
            "example": [f"{metric}: {one}" for metric, one in zip(labels, ids, strict=True)],
            "metric": ("example", labels),
            "task": ("example", [task for own in first for task in own.tasks]),
            "id": ("example", ids),
            "cluster": ("example", [name for own in first for name in own.clusters or own.examples]),
        },
    )
