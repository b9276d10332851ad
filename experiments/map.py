"""Which components carry what RL changed? The component map of a pair, from checkpoints to a page.

`frankenlens map` is the command; the pieces are `interp.decision`, `interp.component_map` and `interp.summary`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import xarray as xr

from experiments import embedded
from hooks.errors import FrankenlensError
from interp.component_map import DIRECTIONS, MAP_POINTS, component_map
from interp.decision import (
    Choice,
    DecisionSet,
    find_decisions,
    null_pair_denominator,
    recovery_refused,
    two_by_two,
)
from interp.examples import Example
from interp.pair import Pair
from interp.patching import POINTS
from interp.plots import denominator_text, plot_map
from interp.readers import read_jsonl
from interp.report import save_report
from interp.results import provenance, publishing, save_dataset, save_table
from interp.roles import TraceFormat
from interp.summary import strongest, summarise
from interp.tasks import REASONING, sample

LISTED = 20  # rows that could not be read, named one by one


@dataclass(frozen=True)
class MapConfig:
    """Settings of the component map; the defaults run on the pair that ships with the package.

    Attributes:
        in_: IN, a folder or a repository id; the shipped one where neither IN nor RL is given.
        rl: RL, or the folder of a PEFT adapter of IN.
        base: the model IN was made from; only checked and recorded.
        data: JSONL with question, answer and image in each row; the synthetic reasoning tasks where not given.
        images: folder that relative image paths start from; by default that of the data.
        n: prompts to look at.
        direction: rl_to_in (sufficient?), in_to_rl (necessary?) or both.
        points: what is patched, of resid_pre, attn_out, mlp_out, head, z, vision, projector.
        decision: decisive, first or soft: see `interp.decision.find_decisions`.
        reasoning: what stands before and after the reasoning in generated text.
        answer: what stands before the answer, and after it unless it runs to the end of the turn.
        max_new_tokens: longest generated text.
        out: folder for map.nc, map.csv, map.png and report.html.
        batch_size: prompts a forward.
        seed: of the synthetic examples, the bootstrap and the random updates.
        device_map: as in transformers and accelerate ("auto", "cuda", ...).
        dtype: as in transformers; auto keeps the checkpoint's own.
    """

    in_: Annotated[str | None, tyro.conf.arg(name="in")] = None
    rl: str | None = None
    base: str | None = None
    data: Path | None = None
    images: Path | None = None
    n: int = 160
    direction: Literal["both", "rl_to_in", "in_to_rl"] = "both"
    points: tuple[str, ...] = MAP_POINTS
    decision: Choice = "decisive"
    reasoning: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, ...] = ("answer",)
    max_new_tokens: int = 128
    out: Path = Path("out/map")
    batch_size: int = 32
    seed: int = 0
    device_map: str | None = None
    dtype: str = "auto"


def run(config: MapConfig) -> xr.Dataset:
    """Make the map and write map.nc, map.csv, map.png and report.html, all or none.

    Returns:
        The dataset of map.nc: see `interp.summary` for its variables.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, or no
            prompt qualifies.
    """
    check(config)
    with publishing(config.out) as staging:
        pair = load_pair(config)
        try:
            examples, dropped = load_examples(config)
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
    if (config.in_ is None) != (config.rl is None):
        raise FrankenlensError("--in and --rl go together: give both, or neither for the pair that ships.")
    if config.images is not None and config.data is None:
        raise FrankenlensError("--images is the folder of the images of --data; give --data as well.")
    for name in ("n", "batch_size", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise FrankenlensError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give at least 1.")
    if len(config.answer) not in (1, 2):
        raise FrankenlensError(
            rf"--answer has {len(config.answer)} values; give what stands before the answer, and what stands after "
            r"it unless it runs to the end of the turn: --answer '\boxed{' '}'."
        )
    for point in config.points:
        if point not in POINTS:
            raise FrankenlensError(f"--points has {point!r}; choose of {', '.join(POINTS)}.")
    if not config.points:
        raise FrankenlensError(f"--points is empty; choose of {', '.join(POINTS)}.")


def load_pair(config: MapConfig) -> Pair:
    """The pair that the settings name; the shipped one where they name none."""
    in_, rl = config.in_, config.rl
    if in_ is None or rl is None:
        in_, rl = str(embedded.path("in")), str(embedded.path("rl"))
    before, *after = config.answer
    trace_format = TraceFormat(config.reasoning, (before, after[0] if after else None))
    return Pair.from_pretrained(
        in_, rl, config.base, dtype=config.dtype, device_map=config.device_map, trace_format=trace_format
    )


def load_examples(config: MapConfig) -> tuple[list[Example], dict[str, int]]:
    """At most `n` examples, and reason -> number of those that were left out.

    Without data: the reasoning tasks in equal shares, from the split that training never saw.

    Raises:
        FrankenlensError: no row can be read.
    """
    if config.data is None:
        tasks = len(REASONING)
        sizes = [config.n // tasks + (i < config.n % tasks) for i in range(tasks)]
        drawn = (sample(task, size, config.seed, "map") for task, size in zip(REASONING, sizes, strict=True))
        return [example for some in drawn for example in some], {}
    examples, report = read_jsonl(config.data, config.images)
    if report.failures:
        print(report, file=sys.stderr)
    if not examples:
        raise FrankenlensError(
            f"No row of {config.data} can be read; row {report.failures[0].row}: {report.failures[0].reason}."
        )
    dropped = {f"row {failure.row}: {failure.reason}": 1 for failure in report.failures[:LISTED]}
    if len(report.failures) > LISTED:
        dropped["further rows that cannot be read"] = len(report.failures) - LISTED
    if len(examples) > config.n:
        dropped[f"rows beyond the first {config.n} (--n)"] = len(examples) - config.n
    return examples[: config.n], dropped


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
