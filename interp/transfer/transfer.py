"""Transfer: do RL's weights, put into IN, bring RL's answers with them? Table 2 of 2602.12395; controls are variants.

`interp.transfer.variants` lists what can be put in, `interp.transfer.table` makes the table of what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.extras import MissingPackage
from interp.localization.outcomes import Grader
from interp.pair.generation import greedy
from interp.pair.pair import weights_sha256
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example, cluster_of
from interp.questions.grading import Ungraded, grade
from interp.results.lock import locked
from interp.results.store import Store, fingerprint
from interp.transfer.grafts import measured_graft, require_graftable
from interp.transfer.variants import Variant
from interp.updates import Realized, way_out

NO_ANSWER = "no answer can be read"


@dataclass(frozen=True)
class Outcomes:
    """What one model did on the examples of a metric.

    Attributes:
        examples: ids, the same ones in the same order for every model.
        tasks: one per example; "" where there is only one.
        right: 1 or 0; NaN where the example could not be measured, and `why` says why not.
        why: the reason of a NaN, or what is wrong with the form of an answer that counts as wrong; "" otherwise.
        clusters: which examples hang together (`interp.questions.examples.cluster_of`); none: each stands alone.
    """

    examples: tuple[str, ...]
    tasks: tuple[str, ...]
    right: tuple[float, ...]
    why: tuple[str, ...]
    clusters: tuple[str, ...] = ()


Metric = Callable[[HookedVLM], Outcomes]
"""Runs a model and grades what it did."""


@dataclass(frozen=True)
class Together:
    """Several metrics of the same answers of a model.

    Attributes:
        names: of the metrics.
        measure: runs a model; name to what it did.
    """

    names: tuple[str, ...]
    measure: Callable[[HookedVLM], Mapping[str, Outcomes]]


Metrics = Mapping[str, Metric | Together]
"""By name; that of a `Together` does not matter."""


def answers(
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    grader: Grader = grade,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> Metric:
    """The metric "is the greedy answer right?".

    Prompts are built once, so that every variant gets the same ones. A prompt that cannot be built, or a grader that
    cannot tell, has no value, and `transfer` says what becomes of it; an answer that is not there is wrong, as it is
    for the user.

    Raises:
        FrankenlensError: no examples, or none that a prompt can be made of.
    """
    prompts: dict[int, Prompt] = {}
    unbuilt = [""] * len(examples)
    for row, example in enumerate(examples):
        try:
            prompts[row] = builder.build(example)
        except FrankenlensError as error:
            unbuilt[row] = str(error)
    if not prompts:
        raise FrankenlensError(f"no prompt can be made: {unbuilt[0] if unbuilt else 'there are no examples'}")

    clusters = tuple(cluster_of(example) for example in examples)

    def measure(vlm: HookedVLM) -> Outcomes:
        right, why = [float("nan")] * len(examples), list(unbuilt)
        written = greedy(vlm, list(prompts.values()), max_new_tokens, batch_size)
        for (row, prompt), ids in zip(prompts.items(), written, strict=True):
            answer = builder.read_trace(prompt.with_tokens(ids)).answer
            if answer is None:
                cut_off = len(ids) == max_new_tokens and ids[-1] not in builder.end_ids
                why[row] = f"{NO_ANSWER}: cut off at {max_new_tokens} tokens" if cut_off else NO_ANSWER
            try:
                right[row] = float(grader(answer, prompt.example))
            except Ungraded as error:
                why[row] = str(error)
            except MissingPackage:
                raise
            except Exception as error:  # a grader may be the user's code
                why[row] = f"the grader failed: {type(error).__name__}: {error}"
        ids, tasks = zip(*((example.id, example.task) for example in examples), strict=True)
        return Outcomes(ids, tasks, tuple(right), tuple(why), clusters)

    return measure


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
    rows: list[list[Outcomes]] = []
    size = len(models) + len(variants)
    with (
        nullcontext() if keep is None else locked(keep),
        tqdm(total=size, desc="transfer", disable=not progress, delay=1) as bar,
    ):
        store = None if keep is None else Store(keep, {"metrics": "by name"})
        for name, vlm in models.items():
            rows.append(_measured(name, vlm, metrics, rows[:1], store))
            bar.update()
        held: list[Realized] = []
        lacking = [""] * len(models)
        for variant in variants:
            with measured_graft(recipient, donor, variant.grafts) as (vlm, realized):
                held.append(realized)
                why = realized.lacking(vlm.model.dtype)
                lacking.append(f"{why}. {way_out('' if rounded else 'rounded=True')}" if why else "")
                if why and not rounded:
                    rows.append([_unknown(own, lacking[-1]) for own in rows[0]])
                else:
                    rows.append(_measured(variant.name, vlm, metrics, rows[:1], store))
            bar.update()
    names = [*models, *(variant.name for variant in variants)]
    found = _dataset(names, _names(metrics), rows).assign_coords(
        kind=("variant", ["model"] * len(models) + [variant.kind for variant in variants]),
        control_of=("variant", [""] * len(models) + [variant.control_of for variant in variants]),
        norm_ratio=("variant", [np.nan] * len(models) + [one.norm_ratio for one in held]),
        cosine=("variant", [np.nan] * len(models) + [one.cosine for one in held]),
        held=("variant", [np.nan] * len(models) + [one.share for one in held]),
        lacking=("variant", np.array(lacking, str)),
        refused=("variant", [bool(why) and not rounded for why in lacking]),
    )
    return _counted(found)


def _counted(found: xr.Dataset) -> xr.Dataset:
    """The examples that both models have a value for; no variant decides what is left out. Of refused ones, none."""
    known = found["right"].sel(variant=["IN", "RL"]).notnull().all("variant")
    return found.assign(right=found["right"].fillna(0.0).where(known & ~found["refused"]))


def _unknown(like: Outcomes, why: str) -> Outcomes:
    """Of a variant that was not run."""
    n = len(like.examples)
    return Outcomes(like.examples, like.tasks, (float("nan"),) * n, (why,) * n, like.clusters)


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


def _measured(
    name: str,
    vlm: HookedVLM,
    metrics: Metrics,
    before: Sequence[Sequence[Outcomes]],
    keep: Store | None,
) -> list[Outcomes]:
    found = list(_run(vlm, metrics).values()) if keep is None else _kept(keep, vlm, metrics)
    expected = before[0] if before else found
    for metric, own, other in zip(_names(metrics), found, expected, strict=True):
        if own.examples != other.examples:
            raise FrankenlensError(
                f"metric {metric!r} returned other examples for {name} than for the first model"
            )
    return found


def _names(metrics: Metrics) -> list[str]:
    """Every metric, those that are measured together among them."""
    each = ((one.names if isinstance(one, Together) else (name,)) for name, one in metrics.items())
    return [name for names in each for name in names]


def _run(vlm: HookedVLM, metrics: Metrics) -> dict[str, Outcomes]:
    """What a model does on each metric."""
    found: dict[str, Outcomes] = {}
    for name, one in metrics.items():
        found |= one.measure(vlm) if isinstance(one, Together) else {name: one(vlm)}
    return found


def _kept(keep: Store, vlm: HookedVLM, metrics: Metrics) -> list[Outcomes]:
    """Read what was measured of these very weights, or measure and keep it: a part for what is measured together."""
    weights = weights_sha256(vlm.model)
    found: dict[str, Outcomes] = {}
    for name, one in metrics.items():
        alone = {name: one}
        own = fingerprint(_names(alone))
        part = keep.part(f"{weights}-{own[:8]}", lambda: _plain(_run(vlm, alone)), own)  # noqa: B023
        found |= {
            metric: Outcomes(*(tuple(column) for column in columns)) for metric, columns in part.items()
        }
    return [found[name] for name in _names(metrics)]


def _plain(found: Mapping[str, Outcomes]) -> dict[str, Any]:
    return {name: astuple(own) for name, own in found.items()}


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
