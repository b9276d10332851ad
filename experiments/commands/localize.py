"""Which layers carry a visual function? Vision-token swap, and layers left out: section 3 of 2602.12395.

`frankenlens localize` is the command; the pieces are in `interp.localization`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from experiments.contract import askable, require_readable
from experiments.frame import Command, kept
from experiments.options import Only, default, require_known
from experiments.settings import NoImages, QuestionSettings, load_examples, load_triple
from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.localization import (
    SYNTHETIC,
    FunctionPairs,
    Swap,
    ablate,
    accuracy,
    folder_pairs,
    in_one,
    layers_of,
    singles,
    suffixes,
    swap_table,
    synthetic_pairs,
    vision_swap,
    windows,
)
from interp.localization.findings import ablation_findings, swap_findings
from interp.localization.plots import plot_ablations, plot_head_ablations, plot_swaps
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import with_looked_at
from interp.questions.readers import FUNCTIONS as PAPER_FUNCTIONS
from interp.questions.tasks import TASKS, sample
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.results.store import Store, under

PAPER_N = 100  # pairs a function


def _swaps_something(config: Any) -> bool:
    return bool(config.modes) and _has_pairs(config)


def _has_pairs(config: Any) -> bool:
    return config.data is None or not config.data.is_file()


_OF_PAIRS = Only("pairs of images, which a file of questions as --data has not", _has_pairs)
_OF_SWAPS = Only("something to swap (--modes, and pairs of images)", _swaps_something)


@dataclass(frozen=True)
class LocalizeConfig(QuestionSettings):
    """Settings of functional localization; the defaults run on the triple that ships with the package.

    Attributes:
        data: folder of the paper's vision-function set (a folder per function, each with data.jsonl); or a JSONL file
            of questions, on which layers are left out but nothing is swapped; synthetic pairs where not given.
        n: pairs of images per function.
        model: base, in or rl; base, as in the paper, where it is known, else in.
        functions: of the synthetic count, exists, colour_at, shape_at, or of the paper's counting, ocr, grounding,
            recognition; all of them where none is named.
        modes: layers that see the source's image: single, suffix (every layer from k on: the paper's code), window:w.
        what: kv (keys and values) or resid (residual stream) of the visual tokens.
        resize: bring a source image to the target's size where they differ; by default such a pair is left out.
        kinds: what takes the place of a component: skip, zero, mean, resample (blocks are only ever skipped).
        parts: what is ablated: block, attn, mlp, head.
        tasks: synthetic tasks that the ablations are scored on as well, e.g. sum (Base of the shipped triple cannot
            reason).
        reply: format (the answer stands where --answer says) or whole (all that is written is graded); auto: whole for
            the vision-function set, else format.
        partition: of the decoder, for the figures: paper, code, or sizes such as 8/12/8.
        paper: the paper's definition: suffix swaps of keys and values, CR(k) over all pairs, whole layers skipped,
            n = 100 a function.
        out: folder for localize_swap.csv, localize_ablation.csv, the figures, localize.nc and report.html.
    """

    n: int = default(32, paper=PAPER_N)
    model: Literal["base", "in", "rl"] | None = None
    functions: tuple[str, ...] = ()
    modes: tuple[str, ...] = default(("single", "suffix"), paper=("suffix",), only=_OF_PAIRS)
    what: Literal["kv", "resid"] = default("kv", paper="kv", only=_OF_SWAPS)
    resize: bool = default(False, only=_OF_SWAPS)
    kinds: tuple[Literal["skip", "zero", "mean", "resample"], ...] = default(
        ("skip", "mean"), paper=("skip",)
    )
    parts: tuple[Literal["block", "attn", "mlp", "head"], ...] = default(
        ("block", "attn", "mlp"), paper=("block",)
    )
    tasks: tuple[str, ...] = default((), only=Only("--parts to leave out", lambda config: config.parts))
    reply: Literal["auto", "format", "whole"] = "auto"
    partition: str = default("paper", paper="paper")
    paper: bool = False
    out: Path = Path("out/localize")


def check(config: LocalizeConfig) -> None:
    """Refuse data, functions, tasks, modes and ablations that there are not, or that do not go together."""
    if config.data is not None and not config.data.exists():
        raise FrankenlensError(f"--data {config.data} does not exist; give a folder, or a file of questions.")
    if not _has_pairs(config) and config.functions:
        raise FrankenlensError(
            f"--functions names pairs of images; {config.data} is a file of single questions."
        )
    for name in ("images", "fields", "encoding", "split"):
        if getattr(config, name) not in (None, (), "all") and _has_pairs(config):
            raise FrankenlensError(
                f"--{name} is of a file of questions; a folder of pairs has its own: leave it out."
            )
    require_known("functions", config.functions, SYNTHETIC if config.data is None else PAPER_FUNCTIONS)
    require_known("tasks", config.tasks, TASKS)
    if not config.modes and not config.parts:
        raise FrankenlensError("nothing to do: give --modes or --parts.")
    for mode in config.modes:
        _width(mode)
    if bool(config.kinds) != bool(config.parts):
        raise FrankenlensError("--kinds and --parts go together: give both, or neither for no ablation.")
    if config.parts == ("block",) and "skip" not in config.kinds:
        raise FrankenlensError("a whole block can only be skipped: give --kinds skip, or other --parts.")


def load(config: LocalizeConfig) -> FunctionPairs:
    """Pairs of the synthetic functions, of the paper's folders, or, of a JSONL file, questions alone.

    Raises:
        FrankenlensError: the data cannot be read.
    """
    if config.data is None:
        asked = synthetic_pairs(config.functions or list(SYNTHETIC), config.n, config.seed)
    elif config.data.is_file():
        examples, left_out = load_examples(config, config.seed)
        asked = FunctionPairs([], questions=examples, left_out=left_out)
    else:
        functions = config.functions or PAPER_FUNCTIONS
        asked = folder_pairs(config.data, functions, config.n, distinct=not config.paper)
        for reason, count in asked.left_out.items():
            print(f"{config.data}: left out {count}: {reason}", file=sys.stderr)
    return asked.asking([one for task in config.tasks for one in sample(task, config.n, config.seed, "map")])


def admit(pair: Pair, asked: FunctionPairs, config: LocalizeConfig) -> FunctionPairs:
    """Pairs and questions that can be asked, if the model that is looked into writes what can be read.

    Raises:
        FrankenlensError: the pair has no such model; nothing can be asked, or too many traces cannot be read.
    """
    name, builder = _model(pair, config), _builder(pair, config, asked)
    if builder.text_only and any(example.images for example in asked.examples):
        raise NoImages(
            "These models read text alone, and pairs of images are swapped: give --data, a file of questions, of which "
            "layers are ablated."
        )
    examples, left_out = askable(builder, asked.examples)
    require_readable(pair, builder, examples, config, [name])
    return asked.only(examples, left_out)


def measure(pair: Pair, asked: FunctionPairs, config: LocalizeConfig) -> Iterator[Section]:
    """Swaps and ablations of one model of a pair.

    Raises:
        FrankenlensError: a window is wider than the model is deep.
    """
    name = _model(pair, config)
    vlm, builder = pair.models[name], _builder(pair, config, asked)
    partition = parse_partition(config.partition, vlm.n_layers)
    swaps = {mode: _swaps(mode, vlm.n_layers, config.what) for mode in config.modes} if asked.pairs else {}
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Figure] = {}
    found: list[xr.Dataset] = []
    keep = kept(pair, asked.examples, config)
    if swaps:
        results = _swapped(vlm, builder, asked, swaps, config, keep)
        among = "all" if config.paper else "differing"
        tables["localize_swap"] = swap_table(results, swaps, among, config.seed)
        figures["localize_swap"] = plot_swaps(tables["localize_swap"], partition)
        found.append(results["counterfactual"])
    if config.parts:
        found.append(_ablated(vlm, builder, asked, config, keep))
        tables["localize_ablation"] = accuracy(found[-1], seed=config.seed)
        figures |= _ablation_figures(tables["localize_ablation"], partition)
    sentences = swap_findings(tables.get("localize_swap"), partition)
    sentences += ablation_findings(tables.get("localize_ablation"), partition)
    yield Section(
        "localize",
        f"Which layers of {name.upper()} carry a visual function",
        " ".join([*sentences, *(f"{note}." for note in asked.notes)]),
        _account(config, name, partition, asked, found),
        tables,
        figures,
        with_looked_at(in_one(found), asked.examples),
    )


def _swapped(
    vlm: HookedVLM,
    builder: PromptBuilder,
    asked: FunctionPairs,
    swaps: dict[str, list[Swap]],
    config: LocalizeConfig,
    keep: Store | None,
) -> dict[str, xr.Dataset]:
    """Kind of pairs to what all swaps do to them."""
    every = list(dict.fromkeys(swap for some in swaps.values() for swap in some))
    settings: dict[str, Any] = {"resize": config.resize, **config.running}
    return {
        kind: vision_swap(vlm, builder, pairs, every, keep=under(keep, f"swap-{kind}"), **settings)
        for kind, pairs in {"counterfactual": asked.pairs, **asked.controls}.items()
    }


def _ablated(
    vlm: HookedVLM, builder: PromptBuilder, asked: FunctionPairs, config: LocalizeConfig, keep: Store | None
) -> xr.Dataset:
    every = dict.fromkeys(one for kind in config.kinds for one in layers_of(vlm, config.parts, kind))
    chosen = [one for one in every if one.kind != "skip" or "skip" in config.kinds]
    prompts = [builder.build(example) for example in asked.questions]
    own = under(keep, "ablate")
    return ablate(vlm, prompts, chosen, seed=config.seed, keep=own, **config.running)


def _builder(pair: Pair, config: LocalizeConfig, asked: FunctionPairs) -> PromptBuilder:
    if config.reply == "format" or (config.reply == "auto" and not asked.free):
        return pair.builder
    whole = TraceFormat(None, None, pair.trace_format.end_of_turn)
    own = pair.builder
    return PromptBuilder(pair.processor, whole, own.template, own.system, own.n_logits)


def _model(pair: Pair, config: LocalizeConfig) -> str:
    name = config.model or ("base" if pair.base is not None else "in")
    if name not in pair.models:
        raise FrankenlensError("--model base needs --base, the model that IN was made from.")
    return name


def _width(mode: str) -> int | None:
    """The width of a window; None for the other modes."""
    if mode in ("single", "suffix"):
        return None
    name, _, width = mode.partition(":")
    if name != "window" or not width.isdecimal() or int(width) < 1:
        raise FrankenlensError(f"--modes has {mode!r}; choose of single, suffix, window:3 (any width).")
    return int(width)


def _swaps(mode: str, n_layers: int, what: str) -> list[Swap]:
    width = _width(mode)
    if width is None:
        return singles(n_layers, what) if mode == "single" else suffixes(n_layers, what)
    if width > n_layers:
        raise FrankenlensError(f"--modes {mode}: the decoder has {n_layers} layers.")
    return windows(n_layers, width, what)


def _ablation_figures(table: pd.DataFrame, partition: Partition) -> dict[str, Figure]:
    figures = {}
    if (table["part"] != "head").any():
        figures["localize_ablation"] = plot_ablations(table, partition)
    if (table["part"] == "head").any():
        figures["localize_heads"] = plot_head_ablations(table)
    return figures


def _account(
    config: LocalizeConfig,
    model: str,
    partition: Partition,
    asked: FunctionPairs,
    found: Sequence[xr.Dataset],
) -> Account:
    parts = [
        f"{'the paper: ' if config.paper else ''}{model.upper()}, greedy; an answer is compared with its own"
    ]
    if asked.pairs:
        among = "all pairs" if config.paper else "pairs whose two clean answers differ"
        what = {"kv": "keys and values", "resid": "residual stream"}[config.what]
        parts.append(
            f"{what} of the visual tokens are the source's in the layers of the swap and the target's own behind "
            f"them, written once at prefill; shares of {among}, Wilson's intervals (95 %)"
        )
    if config.parts:
        parts.append(
            "ablations act at prefill and every step; accuracy with Wilson's interval, its change paired (bootstrap), "
            "McNemar's exact test"
        )
    n = f"{len(asked.pairs)} pairs, at most {config.n} a function" if asked.pairs else ""
    return Account(
        "; ".join(parts),
        n or f"{len(asked.questions)} questions",
        "Holm over the ablations of all functions" if config.parts else "none",
        config.seed,
        str(partition),
        _left_out(config, found),
        {"pairs": len(asked.pairs), "questions": len(asked.questions)},
    )


def _left_out(config: LocalizeConfig, found: Sequence[xr.Dataset]) -> dict[str, int]:
    left_out: Counter[str] = Counter()
    for one in found:
        left_out.update(reason for reason in one["why"].to_numpy().tolist() if reason)
        left_out.update({"outcomes that the grader cannot tell": int((one["fault"] != "").sum())})
        if "differs" in one and not config.paper:
            same = int(((one["why"] == "") & ~one["differs"]).sum())
            left_out.update({"pairs whose two clean answers are the same": same})
    return {reason: count for reason, count in left_out.items() if count}


COMMAND = Command(LocalizeConfig, check, load, load_triple, measure, admit)
