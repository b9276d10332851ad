"""Which components carry what RL changed? The component map of a pair, from checkpoints to a page.

`frankenlens map` is the command; the pieces are `interp.decision`, `interp.map.component_map` and `interp.map.summary`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, require_sound
from hooks.errors import FrankenlensError
from interp.decision import (
    Choice,
    DecisionSet,
    find_decisions,
    null_pair_denominator,
    recovery_refused,
    two_by_two,
)
from interp.map.component_map import DIRECTIONS, MAP_POINTS, component_map
from interp.map.components import POINTS
from interp.map.plots import denominator_text, plot_map
from interp.map.report import save_report
from interp.map.summary import strongest, summarise
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.results.files import provenance, publishing, save_dataset, save_table


@dataclass(frozen=True)
class MapConfig(PairSettings, DataSettings):
    """Settings of the component map; the defaults run on the pair that ships with the package.

    Attributes:
        direction: rl_to_in (sufficient?), in_to_rl (necessary?) or both.
        points: what is patched, of resid_pre, attn_out, mlp_out, head, z, vision, projector.
        decision: decisive, first or soft: see `interp.decision.find_decisions`.
        out: folder for map.nc, map.csv, map.png and report.html.
    """

    direction: Literal["both", "rl_to_in", "in_to_rl"] = "both"
    points: tuple[str, ...] = MAP_POINTS
    decision: Choice = "decisive"
    out: Path = Path("out/map")


def run(config: MapConfig) -> xr.Dataset:
    """Make the map and write map.nc, map.csv, map.png and report.html, all or none.

    Returns:
        The dataset of map.nc: see `interp.map.summary` for its variables.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, or no
            prompt qualifies.
    """
    check(config)
    with publishing(config.out) as staging:
        pair = load_pair(config)
        try:
            examples, dropped = load_examples(config, config.seed)
            summary, decisions = measure(pair, examples, config)
            counts = {"examples": len(examples), "decisions": len(decisions)}
            settings = asdict(config)
            made = provenance(pair.provenance(), settings, counts, dropped)
        finally:
            pair.close()
        summary.attrs["provenance"] = json.dumps(made)
        save_dataset(summary, staging / "map.nc")
        save_table(summary, staging / "map.csv")
        plot_map(summary).savefig(staging / "map.png", dpi=150)
        save_report(summary, staging / "report.html")
    _tell(summary, decisions, config.out)
    return summary


def check(config: MapConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    for point in config.points:
        if point not in POINTS:
            raise FrankenlensError(f"--points has {point!r}; choose of {', '.join(POINTS)}.")
    if not config.points:
        raise FrankenlensError(f"--points is empty; choose of {', '.join(POINTS)}.")


def measure(pair: Pair, examples: list[Example], config: MapConfig) -> tuple[xr.Dataset, DecisionSet]:
    """Find the decisions, patch, and put intervals, controls and the 2x2 together.

    Raises:
        FrankenlensError: no prompt qualifies; the message says why not.
    """
    decisions = find_decisions(
        pair,
        examples,
        config.decision,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        progress=True,
    )
    if not len(decisions):
        raise FrankenlensError(_none_qualifies(decisions))
    directions = list(DIRECTIONS) if config.direction == "both" else [config.direction]
    effects = component_map(pair, decisions, directions, config.points, batch_size=config.batch_size)
    nulls = null_pair_denominator(pair, decisions, config.seed, config.batch_size)
    refused = recovery_refused(decisions, nulls)
    summary = summarise(effects, nulls=nulls, refused=refused, seed=config.seed)
    if config.decision != "soft":
        summary["two_by_two"] = two_by_two(pair, decisions, config.batch_size)
    summary.attrs["decisions"] = json.dumps(decisions.summary())
    return summary, decisions


def _none_qualifies(decisions: DecisionSet) -> str:
    found = decisions.summary()
    reasons = [f"{n}: {reason}" for reason, n in found["excluded"].items()]
    for model, faults in found["unparsed"].items():
        reasons += [f"{n} of {model.upper()}'s traces do not parse: {fault}" for fault, n in faults.items()]
    return (
        f"None of {found['n_prompts']} prompts qualifies for the decision {found['choice']!r} ({'; '.join(reasons)}). "
        "Give more prompts (--n), another --decision, or the delimiters that the pair writes (--reasoning, --answer)."
    )


def _tell(summary: xr.Dataset, decisions: DecisionSet, out: Path) -> None:
    """The outcome in a few lines."""
    print(f"{len(decisions)} of {decisions.n_prompts} prompts qualify; {denominator_text(summary)}")
    if summary.attrs["refused"]:
        print(f"No recovery is given: {summary.attrs['refused']}.")
    else:
        for direction in summary["direction"].to_numpy():
            best = strongest(summary, str(direction), 3)
            found = (
                f"{row['component']} at {row['role']} {row['recovery']:.2f}"
                for row in best.to_dict("records")
            )
            print(f"{DIRECTIONS_IN_WORDS[str(direction)]}: {', '.join(found)}")
    print(f"{out}: map.nc, map.csv, map.png, report.html")


DIRECTIONS_IN_WORDS = {"rl_to_in": "RL into IN", "in_to_rl": "IN into RL"}
