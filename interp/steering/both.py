"""Steering a pair: RL − IN added to IN, and taken away from RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import xarray as xr

from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.results.store import Store, under
from interp.steering.directions import Direction, differences, mean_difference, principal_directions
from interp.steering.dose import dose_response, dose_table


def pair_directions(
    pair: Pair,
    examples: Sequence[Example],
    site: str,
    when: tuple[str, ...],
    max_new_tokens: int = 128,
    batch_size: int = 32,
    keep: Store | None = None,
) -> list[Direction]:
    """RL − IN at a site along RL's own greedy traces: its mean, and its first principal direction.

    Args:
        pair: IN and RL.
        examples: what RL writes its traces to.
        site, when: as in `interp.steering.differences`.
        max_new_tokens, batch_size: as everywhere.
        keep: where it is kept what RL writes.
    """
    prompts = [pair.builder.build(example) for example in examples]
    written = greedy(pair.rl, prompts, max_new_tokens, batch_size, keep=keep)
    traces = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
    found = differences(pair, traces, site, when, batch_size)
    return [mean_difference(found, site), *principal_directions(found, site, 1)]


def steer_both(
    pair: Pair,
    examples: Sequence[Example],
    directions: Sequence[Direction],
    coefficients: Sequence[float],
    *,
    correction: str = "holm",
    seed: int = 0,
    keep: Store | None = None,
    **settings: Any,
) -> tuple[xr.Dataset, pd.DataFrame]:
    """IN with the directions added, RL with them taken away, at every coefficient.

    Args:
        pair: IN and RL.
        examples: what is asked; not those that the directions were made from.
        directions, coefficients: as in `dose_response`; RL gets the coefficients with the other sign.
        correction: as in `dose_table`, for each model.
        seed: of the random directions.
        keep: where it is kept what is written.
        settings: the rest, as in `dose_response`.

    Returns:
        The two datasets of `dose_response` in one, their names and dimensions beginning with steered_IN and steered_RL;
        and the two tables of `dose_table` in one, with a column model.
    """
    tables, kept = [], []
    for name, vlm, sign in (("IN", pair.in_, 1.0), ("RL", pair.rl, -1.0)):
        signed, own = [sign * coefficient for coefficient in coefficients], under(keep, name)
        dose = dose_response(vlm, pair.builder, examples, directions, signed, seed=seed, keep=own, **settings)
        tables.append(dose_table(dose, correction).assign(model=name))
        dims = {"condition": f"steered_{name}", "coefficient": f"coefficient_{name}"}
        renamed = dose.reset_coords(["group", "draw", "site", "norm", "share"]).rename(dims)
        kept.append(renamed.rename({one: f"steered_{name}_{one}" for one in renamed.data_vars}))
    merged = kept[0].merge(kept[1], join="outer", compat="no_conflicts")
    return merged, pd.concat(tables, ignore_index=True)
