"""Dose and response: accuracy as more and more of a direction is added, beside random directions of its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from interp.localization.outcomes import Grader, by_function
from interp.lockstep.moved import EVERYWHERE
from interp.lockstep.outcomes import graded, questions
from interp.lockstep.run import alone
from interp.lockstep.sampling import Sampling
from interp.prompts import PromptBuilder
from interp.questions.examples import Example, cluster_of, clusters_of
from interp.questions.grading import grade
from interp.results.store import Store, fingerprint, under
from interp.statistics import (
    adjust,
    change_interval,
    difference_interval,
    mcnemar,
    mean_of,
    mean_test,
    share_of,
)
from interp.steering.directions import Direction, random_directions
from interp.steering.steer import Steering, steer


@dataclass(frozen=True)
class _Condition:
    direction: Direction
    group: str
    draw: int  # -1: the direction itself


def dose_response(
    vlm: HookedVLM,
    builder: PromptBuilder,
    examples: Sequence[Example],
    directions: Sequence[Direction],
    coefficients: Sequence[float] = (0.5, 1.0, 2.0),
    *,
    n_random: int = 3,
    seed: int = 0,
    when: tuple[str, ...] = EVERYWHERE,
    grader: Grader = grade,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
    keep: Store | None = None,
) -> xr.Dataset:
    """A model's answers at every coefficient of every direction, and of random directions of equal length.

    The examples should not be those that the directions were made from.

    Args:
        vlm: the model that is steered.
        builder: makes its prompts.
        examples: what is asked.
        directions: with names that differ.
        coefficients: other than 0, which is the model as it is and is always measured.
        n_random: random directions beside each.
        seed: of those.
        when: at which tokens.
        grader, sampling, max_new_tokens, batch_size, progress, keep: as in `interp.lockstep.confirm`.

    Returns:
        right [condition coefficient example], why, answer; clean [example] (the model as it is). Coordinates group,
        draw (-1: the direction itself), site, norm, share on condition.

    Raises:
        FrankenlensError: before anything runs: no directions, names that are not unique, a coefficient of 0, or no
            example that can be run.
    """
    names = [direction.name for direction in directions]
    if not names or len(set(names)) < len(names) or not coefficients or 0 in coefficients:
        raise FrankenlensError(
            f"dose_response takes directions with names that differ, not {names}, and coefficients other than 0, not "
            f"{list(coefficients)}"
        )
    asked = questions(builder, examples, vlm, max_new_tokens)
    conditions = _conditions(directions, n_random, seed)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "sampling": sampling}
    shape = (len(conditions), len(coefficients), len(examples))
    right = np.full(shape, np.nan)
    texts = {name: np.full(shape, "", dtype=object) for name in ("why", "answer")}
    texts["why"][:] = np.array(asked.why, dtype=object)
    clean = np.full(len(examples), np.nan)
    with tqdm(total=1 + shape[0] * shape[1], desc="dose", disable=not progress, delay=1) as bar:
        own = alone(vlm, asked.runnable, keep=under(keep, "clean"), **settings)
        clean[asked.rows] = [graded(one, grader)[0] for one in own]
        bar.update()
        for c, condition in enumerate(conditions):
            for k, coefficient in enumerate(coefficients):
                steering = Steering(condition.direction, coefficient, when)
                kept = under(keep, f"{c:04d}-{k:04d}-{_digest(steering)}")
                written = steer(vlm, asked.runnable, steering, keep=kept, **settings)
                for row, one in zip(asked.rows, written, strict=True):
                    right[c, k, row], texts["why"][c, k, row] = graded(one, grader)
                    texts["answer"][c, k, row] = "" if one.answer is None else one.answer
                bar.update()
    dims = ("condition", "coefficient", "example")
    return xr.Dataset(
        {
            "right": (dims, right),
            **{name: (dims, values.astype(str)) for name, values in texts.items()},
            "clean": ("example", clean),
        },
        coords={
            "condition": [one.direction.name for one in conditions],
            "group": ("condition", [one.group for one in conditions]),
            "draw": ("condition", [one.draw for one in conditions]),
            "site": ("condition", [one.direction.site for one in conditions]),
            "norm": ("condition", [one.direction.norm for one in conditions]),
            "share": ("condition", [one.direction.share for one in conditions]),
            "coefficient": list(coefficients),
            "example": [example.id for example in examples],
            "task": ("example", [example.task for example in examples]),
            "cluster": ("example", [cluster_of(example) for example in examples]),
        },
        attrs={"seed": seed, "when": ", ".join(when)},
    )


def _digest(steering: Steering) -> str:
    """A short name of what is added where."""
    vector = steering.direction.vector.double().tolist()
    return fingerprint(steering.direction.site, vector, steering.coefficient, steering.when)[:8]


def dose_table(found: xr.Dataset, correction: str = "holm", **settings) -> pd.DataFrame:
    """What `dose_response` found, with intervals: one row per task ("all": together), condition and coefficient.

    Args:
        found: what `dose_response` returns.
        correction: of the p values of the directions themselves, over directions and coefficients ("all": over its
            own).
        settings: confidence of changes and differences.

    Returns:
        Columns function, condition, group, draw, site, norm, share, coefficient; accuracy, low, high (Wilson); clean;
        change, change_low, change_high (paired), p (McNemar, exact), p_corrected; random (mean accuracy of
        the random directions at that coefficient), above, above_low, above_high (accuracy − random, paired), p_above
        (`mean_test`), p_above_corrected; n, left_out.
    """
    rows = []
    for name, chosen in by_function(found, "task"):
        for c in range(chosen.sizes["condition"]):
            for k in range(chosen.sizes["coefficient"]):
                rows.append({"function": name, **_row(chosen, c, k, settings)})
    table = pd.DataFrame(rows)
    together, own = table["function"] == "all", table["draw"] < 0
    for column in ("p", "p_above"):
        table[f"{column}_corrected"] = np.nan
        for family in (together & own, ~together & own):
            values = table.loc[family, column].to_numpy(dtype=float)
            table.loc[family, f"{column}_corrected"] = adjust(values, correction)
    return table


def _row(one: xr.Dataset, c: int, k: int, settings) -> dict:
    right, clean = one["right"].to_numpy()[c, k], one["clean"].to_numpy()
    group, draw = one["group"].to_numpy(), one["draw"].to_numpy()
    drawn = one["right"].to_numpy()[(group == group[c]) & (draw >= 0), k]
    known = draw[c] < 0 and len(drawn) > 0
    chance = drawn.mean(0) if known else np.full(right.shape, np.nan)
    of = clusters_of(one)
    accuracy, low, high = share_of(right, of)
    found = {"change": change_interval(right, clean, of, **settings)}
    found["above"] = difference_interval(right, chance, clusters=of, **settings)
    return {
        **{name: one[name].to_numpy()[c] for name in ("condition", "group", "draw", "site", "norm", "share")},
        "coefficient": float(one["coefficient"][k]),
        "accuracy": accuracy, "low": low, "high": high, "clean": share_of(clean)[0],
        **{f"{name}{end}": float(getattr(interval, at)) for name, interval in found.items()
           for end, at in (("", "value"), ("_low", "low"), ("_high", "high"))},
        "p": mcnemar(right, clean, of).p,
        "random": mean_of(chance),
        "p_above": float(mean_test(right - chance, clusters=of)),
        "n": int(found["change"].n),
        "left_out": int(np.isnan(right).sum()),
    }  # fmt: skip


def _conditions(directions: Sequence[Direction], n_random: int, seed: int) -> list[_Condition]:
    found = []
    for number, direction in enumerate(directions):
        found.append(_Condition(direction, direction.name, -1))
        drawn = random_directions(direction, n_random, seed + number)
        found += [_Condition(one, direction.name, i) for i, one in enumerate(drawn)]
    return found
