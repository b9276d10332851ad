"""Which layers carry a visual function? Vision-token swap, and layers left out: section 3 of 2602.12395.

`frankenlens localize` is the command; the pieces are in `interp.localization`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from experiments.function_pairs import FunctionPairs, load_function_pairs, require_functions
from experiments.settings import DataSettings, PairSettings, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.localization import (
    Swap,
    ablate,
    accuracy,
    layer_contributions,
    layers_of,
    outcome_shares,
    singles,
    suffixes,
    vision_swap,
    windows,
)
from interp.localization.findings import ablation_findings, swap_findings
from interp.localization.plots import CONTRIBUTION, plot_ablations, plot_head_ablations, plot_swaps
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import with_looked_at
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section

PAPER_N = 100  # pairs a function


@dataclass(frozen=True)
class LocalizeConfig(PairSettings, DataSettings):
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

    n: int = 32
    model: Literal["base", "in", "rl"] | None = None
    functions: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("single", "suffix")
    what: Literal["kv", "resid"] = "kv"
    resize: bool = False
    kinds: tuple[Literal["skip", "zero", "mean", "resample"], ...] = ("skip", "mean")
    parts: tuple[Literal["block", "attn", "mlp", "head"], ...] = ("block", "attn", "mlp")
    tasks: tuple[str, ...] = ()
    reply: Literal["auto", "format", "whole"] = "auto"
    partition: str = "paper"
    paper: bool = False
    out: Path = Path("out/localize")


def run(config: LocalizeConfig) -> Section:
    """Swap, leave out, and write tables, figures, dataset and page, all or none.

    Returns:
        The section of the page, with all tables.

    Raises:
        FrankenlensError: settings contradict each other, the model is not known, or the data cannot be read.
    """
    config = settled(config)
    check(config)
    asked = load(config)
    pair = load_pair(config, with_base=True)
    try:
        section = measure(pair, asked, config)
        counts = {"pairs": len(asked.pairs), "questions": len(asked.questions)}
        publish([section], config, config.out, pair.provenance(), counts)
    finally:
        pair.close()
    return section


def settled(config: LocalizeConfig) -> LocalizeConfig:
    """The settings with `paper` spelt out."""
    if not config.paper:
        return config
    return replace(
        config, n=PAPER_N, modes=("suffix",), what="kv", kinds=("skip",), parts=("block",), partition="paper"
    )


def check(config: LocalizeConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    require_functions(config.data, config.functions, config.tasks)
    if config.data is not None and not config.data.exists():
        raise FrankenlensError(f"--data {config.data} does not exist; give a folder or a JSONL file.")
    if not config.modes and not config.parts:
        raise FrankenlensError("nothing to do: give --modes or --parts.")
    for mode in config.modes:
        _width(mode)
    if bool(config.kinds) != bool(config.parts):
        raise FrankenlensError("--kinds and --parts go together: give both, or neither for no ablation.")
    if config.parts == ("block",) and "skip" not in config.kinds:
        raise FrankenlensError("a whole block can only be skipped: give --kinds skip, or other --parts.")


def load(config: LocalizeConfig) -> FunctionPairs:
    """Pairs, controls and questions that the settings name.

    Raises:
        FrankenlensError: the data cannot be read.
    """
    return load_function_pairs(config, config.functions, config.tasks, config.seed, distinct=not config.paper)


def measure(pair: Pair, asked: FunctionPairs, config: LocalizeConfig) -> Section:
    """Swaps and ablations of one model of a pair, as a section of a page.

    Raises:
        FrankenlensError: the pair has no such model, or a window is wider than it is deep.
    """
    config = settled(config)
    name = config.model or ("base" if pair.base is not None else "in")
    if name not in pair.models:
        raise FrankenlensError("--model base needs --base, the model that IN was made from.")
    vlm, builder = pair.models[name], _builder(pair, config, asked)
    partition = parse_partition(config.partition, vlm.n_layers)
    swaps = {mode: _swaps(mode, vlm.n_layers, config.what) for mode in config.modes} if asked.pairs else {}
    running: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Figure] = {}
    found: list[xr.Dataset] = []
    if swaps:
        every = [swap for mode in swaps.values() for swap in mode]
        results = {
            kind: vision_swap(
                vlm, builder, pairs, list(dict.fromkeys(every)), resize=config.resize, **running
            )
            for kind, pairs in {"counterfactual": asked.pairs, **asked.controls}.items()
        }
        tables["localize_swap"] = swap_table(results, swaps, config)
        figures["localize_swap"] = plot_swaps(tables["localize_swap"], partition)
        found.append(results["counterfactual"])
    if config.parts:
        ablations = list(
            dict.fromkeys(a for kind in config.kinds for a in layers_of(vlm, config.parts, kind))
        )
        if "skip" not in config.kinds:
            ablations = [ablation for ablation in ablations if ablation.kind != "skip"]
        prompts = [builder.build(example) for example in asked.questions]
        ablated = ablate(vlm, prompts, ablations, seed=config.seed, **running)
        tables["localize_ablation"] = accuracy(ablated, seed=config.seed)
        figures |= _ablation_figures(tables["localize_ablation"], partition)
        found.append(ablated)
    account = _account(config, name, partition, asked, found)
    sentences = swap_findings(tables.get("localize_swap"), partition)
    sentences += ablation_findings(tables.get("localize_ablation"), partition)
    text = " ".join([*sentences, *(f"{note}." for note in asked.notes)])
    title = f"Which layers of {name.upper()} carry a visual function"
    dataset = with_looked_at(_merged(found), asked.examples)
    return Section("localize", title, text, account, tables, figures, dataset)


def swap_table(
    results: dict[str, xr.Dataset], swaps: dict[str, list[Swap]], config: LocalizeConfig
) -> pd.DataFrame:
    """Rows of `outcome_shares` for every mode and kind of pairs, and CR(k) − CR(k+1) of the suffixes."""
    tables = []
    for mode, some in swaps.items():
        names = [swap.name for swap in some]
        for kind, found in results.items():
            own = found.sel(swap=names)
            among = "all" if config.paper or kind != "counterfactual" else "differing"
            tables.append(outcome_shares(own, among).assign(mode=mode, pairs=kind))
            if mode == "suffix" and kind == "counterfactual":
                parts = layer_contributions(own, among, seed=config.seed).rename(columns={"layer": "first"})
                parts = parts.assign(mode=mode, pairs=kind, outcome=CONTRIBUTION, last=parts["first"])
                tables.append(parts.assign(swap=[names[k] for k in parts["first"]], what=config.what))
    table = pd.concat(tables, ignore_index=True)
    front = ["mode", "pairs", "function", "first", "last", "outcome", "value", "low", "high", "n", "left_out"]
    return table.loc[:, [*front, *(name for name in table if name not in front)]]


def _builder(pair: Pair, config: LocalizeConfig, asked: FunctionPairs) -> PromptBuilder:
    if config.reply == "format" or (config.reply == "auto" and not asked.free):
        return pair.builder
    whole = TraceFormat(None, None, pair.trace_format.end_of_turn)
    return PromptBuilder(pair.processor, whole, pair.builder.template, pair.builder.system)


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
    left_out = Counter(asked.left_out)
    for one in found:
        left_out.update(reason for reason in one["why"].to_numpy().tolist() if reason)
        left_out.update({"outcomes that the grader cannot tell": int((one["fault"] != "").sum())})
        if "differs" in one and not config.paper:
            same = int(((one["why"] == "") & ~one["differs"]).sum())
            left_out.update({"pairs whose two clean answers are the same": same})
    correction = "Holm over the ablations of all functions" if config.parts else "none"
    kept = {reason: count for reason, count in left_out.items() if count}
    n = f"{len(asked.pairs)} pairs, at most {config.n} a function" if asked.pairs else ""
    n = n or f"{len(asked.questions)} questions"
    return Account("; ".join(parts), n, correction, config.seed, str(partition), kept)


def _merged(found: Sequence[xr.Dataset]) -> xr.Dataset:
    """Swaps and ablations in one dataset; what both have is named apart."""
    renamed = []
    for one in found:
        if "ablation" in one.dims:
            one = one.rename(
                {
                    "example": "question",
                    "clean": "clean_right",
                    "why": "why_question",
                    "fault": "fault_ablation",
                }
            )
        renamed.append(one)
    merged = xr.merge(renamed, combine_attrs="drop_conflicts", join="outer", compat="no_conflicts")
    assert isinstance(merged, xr.Dataset)
    return merged
