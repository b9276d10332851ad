"""The component map as a section of a page: the figure, the strongest components with their controls, the decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.map.plots import DIRECTIONS, denominator_text, plot_map
from interp.map.summary import ALPHA, cell_table, headline, in_words, now_and_before, strongest
from interp.questions.examples import clusters_of
from interp.results.page import Account, Digest, Section
from interp.statistics import MIN_SHOWN, Interval, interval_text, mean_interval

WORDS = {"rl_to_in": "RL into IN", "in_to_rl": "IN into RL"}
"""What is moved where, in a sentence."""
TOLD = 3  # components that the finding names


def map_section(summary: xr.Dataset, k: int = 10, seed: int | None = None) -> Section:
    """What a page says of a map, with map.csv and map.nc.

    Args:
        summary: what `interp.map.summary.summarise` returns, with the attribute `decisions` (`DecisionSet.summary`, as
            JSON) where they are those of a pair, and the variable `two_by_two` (`interp.decision.two_by_two`) where
            there is one.
        k: how many components of each direction are listed.
        seed: of everything random.
    """
    decisions = json.loads(summary.attrs["decisions"]) if "decisions" in summary.attrs else None
    digests = [*_strongest(summary, k), _denominators(summary)]
    digests += [_now_and_before(summary)] if "two_by_two" in summary else []
    digests += [_decided(decisions)] if decisions else []
    return Section(
        "map",
        "Which components carry what RL changed",
        _finding(summary, decisions),
        _account(summary, decisions, seed),
        figures={"map": plot_map(summary)},
        dataset=summary,
        cells=cell_table(summary),
        digests=digests,
    )


def _finding(summary: xr.Dataset, decisions: Mapping[str, Any] | None) -> str:
    """How much there is to explain, and what explains most of it in each direction."""
    lines = [f"{denominator_text(summary)}."]
    if decisions:
        found = f"{decisions['n_qualify']} of {decisions['n_prompts']} prompts qualify"
        lines = [f"{found} (decision: {decisions['choice']}). {lines[0]}"]
    if summary.attrs["refused"]:
        refusal = f"No recovery is given: {summary.attrs['refused']}. A recovery is a share of that difference; where"
        refusal += (
            " it cannot be told from that of a pair that learnt nothing, noise too would draw a full map."
        )
        return "\n".join([*lines, refusal])
    lines += [_strongest_in_words(summary, str(one)) for one in summary["direction"].to_numpy()]
    return "\n".join(lines)


def _strongest_in_words(summary: xr.Dataset, direction: str) -> str:
    """How many cells are beyond control, and the strongest of these with what they are compared with."""
    one = summary.sel(direction=direction)
    found, n = int(one["beyond"].sum()), int((one["n"] > 0).sum())
    line = f"{WORDS.get(direction, direction)}: {found} of {n} cells are beyond control"
    rows = strongest(summary, direction, TOLD)
    told = (
        f"{row['component']} at {row['role']} {_text(row, 'recovery')} (random directions as large: "
        f"{_text(row, 'random_recovery')}; {_floor(summary, direction, row)}, "
        f"{in_words(row['p_specific'], row['p_general'])})"
        for row in rows.loc[rows["beyond"]].to_dict("records")
    )
    text = "; ".join(told)
    return f"{line}{'; strongest: ' + text if text else ''}."


def _floor(summary: xr.Dataset, direction: str, row: Mapping[Any, Any]) -> str:
    if "floor" not in row:
        return "noise pairs: not run"
    share = float(row["floor"]) / abs(float(summary["denominator"].sel(direction=direction)))
    return f"noise pairs reach {share:.2g}"


def _account(summary: xr.Dataset, decisions: Mapping[str, Any] | None, seed: int | None) -> Account:
    level = f"{100 * summary.attrs['confidence']:.0f} %"
    definition = (
        f"activation patching of one component at the tokens of one role, {summary.attrs['metric']}, "
        f"{summary.attrs['units']}; recovery = (patched − recipient) / (donor − recipient), ratio of sums over "
        f"examples; {level} intervals over examples (those of one cluster are one), each for its own cell, none of "
        f"fewer than {MIN_SHOWN}; beyond control: |mean effect| above that of random directions with the norm of the "
        f"donor's difference at each token (swap test, one-sided p at most {ALPHA:g}){_noise_in_words(summary)}; other "
        "controls: the donor's difference on another example with the same roles, and the recipient's own activation"
    )
    n = f"{int(summary['n'].max())} examples"
    counts = {}
    if decisions:
        n = f"{decisions['n_qualify']} decisions ({decisions['choice']}) of {decisions['n_prompts']} prompts"
        counts = {"examples": decisions["n_prompts"], "decisions": decisions["n_qualify"]}
    left_out = _left_out(decisions) | json.loads(summary.attrs.get("lacking", "{}"))
    return Account(definition, n, "none", seed, left_out=left_out, counts=counts)


def _noise_in_words(summary: xr.Dataset) -> str:
    if "floor" not in summary:
        return ", no noise pairs being run"
    n = summary.sizes["noise_pair"]
    return (
        f" and above the largest of its kind in {n} noise pairs (an update of RL's norm in every tensor, in a random "
        f"direction; {int(summary['noise_n'].max())} prompts each)"
    )


def _left_out(decisions: Mapping[str, Any] | None) -> dict[str, int]:
    """Reason to number: of prompts without a decision, of traces that do not parse."""
    if decisions is None:
        return {}
    found = {f"no decision: {reason}": n for reason, n in decisions["excluded"].items()}
    for model, reasons in decisions["unparsed"].items():
        found |= {f"{model.upper()}'s trace does not parse: {reason}": n for reason, n in reasons.items()}
    if decisions["n_unstable_positions"]:
        drawn = " or would choose another token than its trace has" if "given_traces" in decisions else ""
        found[f"positions where RL is tied to rounding{drawn}"] = decisions["n_unstable_positions"]
    return found


def _denominators(summary: xr.Dataset) -> Digest:
    """What a recovery of 1 is worth, beside pairs that learnt nothing."""
    what, own = headline(summary)
    rows: list[tuple[str, Interval]] = [(what, own)]
    for name in summary["null"].to_numpy() if "null" in summary.dims else ():
        rows.append((f"learnt nothing: {name}", _interval(summary.sel(null=name), "null_denominator")))
    table = pd.DataFrame(rows, columns=["pair", summary.attrs["units"]])
    return Digest("What a recovery of 1 is worth", table)


def _strongest(summary: xr.Dataset, k: int) -> list[Digest]:
    """The strongest components of each direction; where recovery is refused, their effects."""
    directions = [str(name) for name in summary["direction"].to_numpy()]
    digests = []
    for direction in directions:
        rows = strongest(summary, direction, k)
        table = pd.DataFrame({"component": rows["component"], "tokens": rows["role"]})
        if summary.attrs["refused"]:
            table[f"effect, {summary.attrs['units']}"] = _intervals(rows, "effect_mean")
            table["n"] = rows["n"]
        else:
            table["recovery"], table["n"] = _intervals(rows, "recovery"), rows["n"]
            table["beyond control"] = np.where(rows["beyond"], "yes", "no")
            table["random directions"] = _intervals(rows, "random_recovery")
            if "floor" in rows:
                table["noise pairs"] = rows["floor"] / abs(
                    float(summary["denominator"].sel(direction=direction))
                )
            table["other example"] = _intervals(rows, "control_other_recovery")
            table["n, other"] = rows["control_other_n"]
            table["its change moves"] = [
                in_words(*both) for both in zip(rows["p_specific"], rows["p_general"], strict=True)
            ]
        if "control_self" in rows:
            table["itself"] = rows["control_self"]
        title = DIRECTIONS.get(direction, direction)
        digests.append(Digest(f"{title} The {len(rows)} strongest", table, _selected(summary, direction)))
    return digests


def _selected(summary: xr.Dataset, direction: str) -> str:
    n_cells = int((summary["n"].sel(direction=direction) > 0).sum())
    return (
        f"Each component at the tokens where it lies farthest above its controls. Of the {n_cells} cells of the "
        "direction some miss 0 by chance, and the strongest are biased upward. Beyond control: more than random "
        "directions as large as the donor's difference, whatever their sign, and more than any cell of its kind in "
        "noise pairs. Other example: the donor's difference there, added here; its change moves: this example's own, "
        "beside it. Itself: the largest absolute effect of the recipient's own activation, "
        f"{summary.attrs['units']}, which must be 0."
    )


def _now_and_before(summary: xr.Dataset) -> Digest:
    """The 2x2 of weights at the decision and keys and values of the prefix."""
    two_by_two = summary["two_by_two"]
    clusters = clusters_of(two_by_two.to_dataset(name="metric"))
    rows = []
    for weights in ("in", "rl"):
        values = (two_by_two.sel(weights=weights, prefix=prefix).to_numpy() for prefix in ("in", "rl"))
        rows.append((weights.upper(), *(mean_interval(each, clusters=clusters)[()] for each in values)))
    found = {name: interval_text(x.value, x.low, x.high) for name, x in now_and_before(two_by_two).items()}
    return Digest(
        f"Now or before? Mean {summary.attrs['metric']}, {summary.attrs['units']}",
        pd.DataFrame(rows, columns=["weights at the decision", "IN's prefix", "RL's prefix"]),
        f"Now (RL's weights on IN's keys and values): {found['now']}. Before (IN's weights on RL's): "
        f"{found['before']}. Beyond their sum: {found['together']}.",
    )


def _decided(decisions: Mapping[str, Any]) -> Digest:
    """Where RL decides otherwise, and on which tokens."""
    rows = {
        "prompts that qualify": f"{decisions['n_qualify']} of {decisions['n_prompts']}",
        "RL's and IN's next tokens differ somewhere": str(decisions["n_diverge"]),
        "right": f"IN {decisions['n_in_correct']}, RL {decisions['n_rl_correct']}",
    }
    if index := decisions["trace_index"]:
        at = {name: int(value + 1) for name, value in index.items()}
        rows["decided token of RL's trace"] = (
            f"median: no. {at['median']}; middle half {at['quarter']} to {at['three_quarters']}, last {at['max']}"
        )
        rows["its role"] = ", ".join(f"{role} {count}" for role, count in decisions["roles"].items())
    pairs = [f"{pair['rl']} for {pair['in']} × {pair['n']}" for pair in decisions["token_pairs"]]
    if pairs:
        rows["commonest tokens, RL's for IN's"] = ", ".join(pairs)
    return Digest(
        f"The decisions ({decisions['choice']})", pd.DataFrame(list(rows.items()), columns=["what", "found"])
    )


def _intervals(rows: pd.DataFrame, name: str) -> list[Interval]:
    return [_interval(row, name) for row in rows.to_dict("records")]


def _interval(source: Mapping[Any, Any] | xr.Dataset, name: str) -> Interval:
    value, low, high = (np.asarray(float(source[name + suffix])) for suffix in ("", "_low", "_high"))
    return Interval(value, low, high, np.asarray(0))


def _text(row: Mapping[Any, Any], name: str) -> str:
    return interval_text(*(row[name + suffix] for suffix in ("", "_low", "_high")))
