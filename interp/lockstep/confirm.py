"""A map's strongest components, confirmed: answers gained by moving them in, lost by moving them out, and by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from interp.localization.outcomes import Grader, by_function
from interp.lockstep.agreement import Followed, follow
from interp.lockstep.controls import random_components, single
from interp.lockstep.moved import EVERYWHERE, Moved, require_roles, sites
from interp.lockstep.outcomes import Questions, graded, questions
from interp.lockstep.run import Written, alone, lockstep
from interp.lockstep.sampling import Sampling
from interp.map.component_map import DIRECTIONS
from interp.pair.pair import Pair
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
    ratio_interval,
    share_of,
)


@dataclass(frozen=True)
class _Condition:
    """One set of components, chosen or drawn."""

    group: str
    draw: int  # -1: the chosen components
    components: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.group if self.draw < 0 else f"{self.group}, random {self.draw + 1}"


def confirm(
    pair: Pair,
    examples: Sequence[Example],
    components: Mapping[str, Sequence[str]] | Sequence[str],
    *,
    n_random: int = 5,
    seed: int = 0,
    when: tuple[str, ...] = EVERYWHERE,
    directions: Sequence[str] = tuple(DIRECTIONS),
    grader: Grader = grade,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
    keep: Store | None = None,
) -> xr.Dataset:
    """Answers with components moved in (RL's into IN) and out (IN's into RL) in lockstep, and with random ones.

    The examples should not be those that the components were chosen on: choosing the strongest of many is biased.

    Args:
        pair: IN and RL.
        examples: what is asked.
        components: addresses that are moved together, or several such sets by name.
        n_random: random sets of equal number and kind beside each; see `random_components`.
        seed: of the random sets.
        when: at which tokens; see `Moved`.
        directions: of "rl_to_in", "in_to_rl".
        grader: whether an answer is right.
        sampling: None for greedy.
        max_new_tokens, batch_size: of the generation.
        progress: a bar.
        keep: where it is kept what is written.

    Returns:
        right [direction condition example] (NaN: the grader cannot tell, or the example could not be run), why (the
        reason, or what is wrong with the form of an answer that counts as wrong), answer, n_moved (tokens), and, of
        donor and recipient, share_ (of the steps at which the parent would have chosen the same), prefix_ (tokens in
        common with its own trace) and whole_ (the trace is its own); own [model example] (each parent's own answers,
        right or wrong). Coordinates group, draw (-1: the chosen components), components, size on condition.

    Raises:
        FrankenlensError: before anything runs: an unknown direction, a component or role that does not exist, too few
            others of a kind for a random set, or no example that can be run.
    """
    conditions = _conditions(pair.in_, components, n_random, seed)
    for direction in directions:
        if direction not in DIRECTIONS:
            raise FrankenlensError(f"{direction!r} is no direction; choose of {', '.join(DIRECTIONS)}.")
    asked = questions(pair.builder, examples, pair.in_, max_new_tokens)
    for condition in conditions:
        sites(pair.in_, [Moved(condition.components, when)])
        require_roles([Moved(condition.components, when)], asked.runnable)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "sampling": sampling}
    models = {"in": pair.in_, "rl": pair.rl}
    shape = (len(directions), len(conditions), len(examples))
    found = _Found(shape, asked, grader)
    with tqdm(total=2 + shape[0] * shape[1], desc="confirm", disable=not progress, delay=1) as bar:
        own = {}
        for name, vlm in models.items():
            own[name] = alone(vlm, asked.runnable, keep=under(keep, name), **settings)
            bar.update()
        for d, direction in enumerate(directions):
            donor, recipient = DIRECTIONS[direction]
            for c, condition in enumerate(conditions):
                moved = Moved(condition.components, when)
                what = fingerprint(condition.components, when)[:8]
                kept = under(keep, f"{direction}-{c:04d}-{what}")
                both = models[donor], models[recipient]
                written = lockstep(*both, asked.runnable, moved, keep=kept, **settings)
                parents = {
                    "donor": follow(models[donor], written, [w.tokens for w in own[donor]], batch_size),
                    "recipient": follow(
                        models[recipient], written, [w.tokens for w in own[recipient]], batch_size
                    ),
                }
                found.put(d, c, written, parents)
                bar.update()
    return found.dataset(directions, conditions, own, seed)


class _Found:
    """The arrays that fill up."""

    def __init__(self, shape: tuple[int, int, int], asked: Questions, grader: Grader) -> None:
        self._asked, self._grader = asked, grader
        names = ["right", "n_moved"]
        names += [
            f"{what}_{parent}" for what in ("share", "prefix", "whole") for parent in ("donor", "recipient")
        ]
        self._numbers = {name: np.full(shape, np.nan) for name in names}
        self._texts = {name: np.full(shape, "", dtype=object) for name in ("why", "answer")}
        self._texts["why"][:] = np.array(asked.why, dtype=object)

    def put(
        self, d: int, c: int, written: Sequence[Written], parents: Mapping[str, Sequence[Followed]]
    ) -> None:
        for i, (row, one) in enumerate(zip(self._asked.rows, written, strict=True)):
            at = (d, c, row)
            grade, self._texts["why"][at] = graded(one, self._grader)
            self._numbers["right"][at] = np.nan_to_num(grade)  # left out only for what the models alone did
            self._texts["answer"][at] = "" if one.answer is None else one.answer
            self._numbers["n_moved"][at] = one.n_moved[0]
            for parent, followed in parents.items():
                self._numbers[f"share_{parent}"][at] = followed[i].share
                self._numbers[f"prefix_{parent}"][at] = followed[i].prefix
                self._numbers[f"whole_{parent}"][at] = followed[i].whole

    def dataset(
        self,
        directions: Sequence[str],
        conditions: Sequence[_Condition],
        own: Mapping[str, Sequence[Written]],
        seed: int,
    ) -> xr.Dataset:
        dims, examples = ("direction", "condition", "example"), self._asked.examples
        parents = np.full((len(own), len(examples)), np.nan)
        for m, written in enumerate(own.values()):
            parents[m, self._asked.rows] = [graded(one, self._grader)[0] for one in written]
        self._numbers["right"][..., np.isnan(parents).any(0)] = np.nan
        return xr.Dataset(
            {
                **{name: (dims, values) for name, values in self._numbers.items()},
                **{name: (dims, values.astype(str)) for name, values in self._texts.items()},
                "own": (("model", "example"), parents),
            },
            coords={
                "direction": list(directions),
                "condition": [one.name for one in conditions],
                "group": ("condition", [one.group for one in conditions]),
                "draw": ("condition", [one.draw for one in conditions]),
                "components": ("condition", [", ".join(one.components) for one in conditions]),
                "size": ("condition", [len(one.components) for one in conditions]),
                "model": list(own),
                "example": [example.id for example in examples],
                "task": ("example", [example.task for example in examples]),
                "cluster": ("example", [cluster_of(example) for example in examples]),
            },
            attrs={"seed": seed},
        )


def confirmation(found: xr.Dataset, correction: str = "holm", **settings) -> pd.DataFrame:
    """What `confirm` found, with intervals: one row per task ("all": together), direction and condition.

    Args:
        found: what `confirm` returns.
        correction: of the p values of the chosen sets, "holm" or "bh", over sets and directions ("all": over its own).
        settings: confidence of changes and differences.

    Returns:
        Columns function, direction, condition, group, draw, size, components; accuracy, low, high (Wilson); recipient
        and donor (own accuracies); change, change_low, change_high (against the recipient, paired), gained,
        lost, p (McNemar, exact), p_corrected; recovered, recovered_low, recovered_high (change over donor −
        recipient); random (mean accuracy of the group's random sets), above, above_low, above_high (accuracy − random,
        paired), p_above (`mean_test`), p_above_corrected; share_donor, share_recipient, prefix_donor, prefix_recipient,
        whole_donor, whole_recipient, n_moved (means); n, left_out.
    """
    rows = []
    for name, chosen in by_function(found, "task"):
        for direction in chosen["direction"].to_numpy():
            one = chosen.sel(direction=direction)
            rows += [
                {"function": name, "direction": str(direction), **_row(one, str(direction), k, settings)}
                for k in range(one.sizes["condition"])
            ]
    table = pd.DataFrame(rows)
    together, chosen = table["function"] == "all", table["draw"] < 0
    for column in ("p", "p_above"):
        table[f"{column}_corrected"] = np.nan
        for family in (together & chosen, ~together & chosen):
            values = table.loc[family, column].to_numpy(dtype=float)
            table.loc[family, f"{column}_corrected"] = adjust(values, correction)
    return table


def _row(one: xr.Dataset, direction: str, k: int, settings: Mapping) -> dict:
    donor, recipient = (one["own"].sel(model=name).to_numpy() for name in DIRECTIONS[direction])
    right = one["right"].to_numpy()[k]
    group = one["group"].to_numpy() == one["group"].to_numpy()[k]
    drawn = one["right"].to_numpy()[group & (one["draw"].to_numpy() >= 0)]
    chance = _mean(drawn) if one["draw"].to_numpy()[k] < 0 else np.full(right.shape, np.nan)
    of = clusters_of(one)
    share, test = share_of(right, of), mcnemar(right, recipient, of)
    change = change_interval(right, recipient, of, **settings)
    gap = np.where(np.isnan(right), np.nan, donor - recipient)
    recovered = ratio_interval(right - recipient, gap, clusters=of, **settings)
    above = difference_interval(right, chance, clusters=of, **settings)
    means = ("share_donor", "share_recipient", "prefix_donor", "prefix_recipient", "whole_donor")
    return {
        **{name: one[name].to_numpy()[k] for name in ("condition", "group", "draw", "size", "components")},
        **dict(zip(("accuracy", "low", "high"), share, strict=True)),
        "recipient": share_of(recipient)[0],
        "donor": share_of(donor)[0],
        **_ends("change", change),
        "gained": test.gained,
        "lost": test.lost,
        "p": test.p,
        **_ends("recovered", recovered),
        "random": mean_of(chance),
        **_ends("above", above),
        "p_above": float(mean_test(right - chance, clusters=of)),
        **{name: mean_of(one[name].to_numpy()[k]) for name in (*means, "whole_recipient", "n_moved")},
        "n": int(change.n),
        "left_out": int(np.isnan(right).sum()),
    }


def _ends(name: str, interval) -> dict[str, float]:
    ends = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: float(value) for key, value in ends.items()}


def _mean(drawn: Float[np.ndarray, "draw example"]) -> Float[np.ndarray, " example"]:
    """Mean over draws; NaN where one of them has no value, or where there are none."""
    return drawn.mean(0) if len(drawn) else np.full(drawn.shape[1:], np.nan)


def _conditions(
    vlm: HookedVLM, components: Mapping[str, Sequence[str]] | Sequence[str], n_random: int, seed: int
) -> list[_Condition]:
    if isinstance(components, str):
        raise FrankenlensError(f"components={components!r}: give a list of addresses, [{components!r}]")
    groups = components if isinstance(components, Mapping) else {"components": components}
    if not groups or not all(groups.values()):
        raise FrankenlensError("confirm needs at least one component, e.g. ['blocks.3.mlp']")
    found = []
    everything = [name for names in groups.values() for name in names]
    for name, chosen in groups.items():
        found.append(_Condition(name, -1, single(chosen)))
        drawn = random_components(vlm, chosen, n_random, seed, avoid=everything)
        found += [_Condition(name, i, one) for i, one in enumerate(drawn)]
    return found
