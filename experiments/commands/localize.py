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

from experiments.bench import Planned
from experiments.commands.localize_parts import ablations_of, assumed, has_pairs, swaps_of, width_of, work
from experiments.contract import askable, require_readable
from experiments.frame import Command, kept
from experiments.options import Only, default, either, require_known
from experiments.papers import PaperSettings
from experiments.settings import IMAGE, NoImages, is_public, load_examples, load_triple
from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.whereabouts import absent
from interp.fine_grained.paper import BOXED, INSTRUCTION, SKIP_TOKENS, SWAP_TOKENS, SYSTEM, TAGGED
from interp.localization import (
    SYNTHETIC,
    FunctionPairs,
    Swap,
    ablate,
    accuracy,
    folder_pairs,
    in_one,
    swap_table,
    synthetic_pairs,
    vision_swap,
    with_changes,
)
from interp.localization.findings import ablation_findings, headline, swap_findings
from interp.localization.pairs import Pairs
from interp.localization.plots import plot_ablations, plot_head_ablations, plot_swaps
from interp.localization.together import COUNTERFACTUAL
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import with_looked_at
from interp.questions.readers import FUNCTIONS as PAPER_FUNCTIONS
from interp.questions.readers.draw import Split
from interp.questions.readers.hub import Unreachable
from interp.questions.tasks import TASKS, sample
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.results.store import Store, under

PAPER_N = 100  # pairs a function
_CHANGED = {
    "graded": "changed: no longer the model's own answer, by the example's grader",
    "text": (
        "changed: grounding, IoU with the source's box above 0.5; recognition, the answer is No; else the answer "
        "differs (the paper's text)"
    ),
    "code": (
        "changed: the words differ, case and punctuation at the end aside, and of long texts neither holds the other "
        "(the paper's released code)"
    ),
}


def _swaps_something(config: Any) -> bool:
    return bool(config.modes) and has_pairs(config)


def _is_asked(ours: Any, papers: Any) -> Any:
    """For `default`: the paper has words of its own around questions, not around pairs of images."""
    return lambda config: ours if has_pairs(config) else papers(config) if callable(papers) else papers


def _papers_system(config: Any) -> str | None:
    """None for Base; its message for the others."""
    by_default = config.base is not None or config.in_ is None  # then Base is looked into
    is_base = config.model == "base" or (config.model is None and by_default)
    return None if is_base else either("system", *SYSTEM.values())(config)


_OF_PAIRS = Only("pairs of images, which questions as --data have not", has_pairs)
_OF_SWAPS = Only("something to swap (--modes, and pairs of images)", _swaps_something)


@dataclass(frozen=True)
class LocalizeConfig(PaperSettings):
    """Settings of functional localization; the defaults run on the triple that ships with the package.

    Attributes:
        data: folder of the paper's vision-function set (a folder per function, each with data.jsonl); or a JSONL file
            of questions, or gsm8k or math-500 (Fig. 4b), on which layers are left out but nothing is swapped; synthetic
            pairs where not given.
        n: pairs of images per function.
        model: base, in or rl; base, as in the paper, where it is known, else in.
        functions: of the synthetic count, exists, colour_at, shape_at, or of the paper's counting, ocr, grounding,
            recognition; all of them where none is named.
        modes: layers that see the source's image: single, suffix (every layer from k on: the paper's code), window:w.
        what: kv (keys and values) or resid (residual stream) of the visual tokens.
        change: what counts as a changed answer: graded (no longer the model's own, by the example's grader), text (the
            paper's text: for grounding the source's box is met, for recognition the answer is No, else the answer
            differs), code (the released code: the words differ).
        resize: bring a source image to the target's size where they differ; by default such a pair is left out.
        kinds: what takes the place of a component: skip, zero, mean, resample (blocks are only ever skipped).
        parts: what is ablated: block, attn, mlp, head.
        tasks: synthetic tasks that the ablations are scored on as well, e.g. sum (Base of the shipped triple cannot
            reason).
        reply: format (the answer stands where --answer says) or whole (all that is written is graded); auto: whole for
            the vision-function set, else format.
        partition: of the decoder, for the figures: paper, code, or sizes such as 8/12/8.
        paper: the paper's definition. On its vision-function set: suffix swaps of keys and values, CR(k) over all
            pairs, answers changed as its text has it (--change code: as its released code does), at most 64 new
            tokens. On gsm8k or math-500: whole layers skipped, its sample (seed 123), its prompts, at most 2,048 new
            tokens. n = 100 a function or data set.
        out: folder for localize_swap.csv, localize_ablation.csv, the figures, localize.nc and report.html.
    """

    n: int = default(32, paper=PAPER_N)
    split: Split = default("all", paper="all")  # noqa: RUF009
    answer: tuple[str, ...] = default(("answer",), paper=_is_asked(None, either("answer", BOXED, TAGGED)))
    max_new_tokens: int = default(128, paper=_is_asked(SWAP_TOKENS, SKIP_TOKENS))
    system: str | None = default(None, paper=_is_asked(None, _papers_system))
    instruction: str = default("", paper=_is_asked("", INSTRUCTION))
    model: Literal["base", "in", "rl"] | None = None
    functions: tuple[str, ...] = ()
    modes: tuple[str, ...] = default(("single", "suffix"), paper=("suffix",), only=_OF_PAIRS)
    what: Literal["kv", "resid"] = default("kv", paper="kv", only=_OF_SWAPS)
    change: Literal["graded", "text", "code"] = default(
        "graded", paper=either("change", "text", "code"), only=_OF_SWAPS
    )
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
    out: Path = Path("out/localize")


def check(config: LocalizeConfig) -> None:
    """Refuse data, functions, tasks, modes and ablations that there are not, or that do not go together."""
    if config.data is None and config.paper:
        raise Unreachable(
            "--paper swaps the images of the paper's vision-function set and skips layers on GSM8K and MATH-500, and "
            "nothing stands in for them: give --data, the folder of the set, gsm8k or math-500."
        )
    if config.data is not None and not (config.data.exists() or is_public(str(config.data))):
        give = "a folder of the paper's vision-function set, a file of questions, gsm8k or math-500"
        raise FrankenlensError(absent(Path(config.data), "file or folder", give, "--data"))
    if not has_pairs(config) and config.functions:
        raise FrankenlensError(f"--functions names pairs of images; {config.data} holds single questions.")
    for name in ("images", "fields", "encoding", "split", "cluster"):
        if getattr(config, name) not in (None, (), "all", IMAGE) and has_pairs(config):
            raise FrankenlensError(
                f"--{name} is of a file of questions; a folder of pairs has its own: leave it out."
            )
    require_known("functions", config.functions, SYNTHETIC if config.data is None else PAPER_FUNCTIONS)
    require_known("tasks", config.tasks, TASKS)
    if not config.modes and not config.parts:
        raise FrankenlensError("nothing to do: give --modes or --parts.")
    for mode in config.modes:
        width_of(mode)
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
    elif not has_pairs(config):
        examples, left_out = load_examples(config, config.seed, legacy=config.paper)
        asked = FunctionPairs([], questions=examples, left_out=left_out)
    else:
        functions = config.functions or PAPER_FUNCTIONS
        asked = folder_pairs(config.data, functions, config.n, not config.paper, **config.access)
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
    swaps = {mode: swaps_of(mode, vlm.n_layers, config.what) for mode in config.modes} if asked.pairs else {}
    tables: dict[str, pd.DataFrame] = {}
    figures: dict[str, Figure] = {}
    found: list[xr.Dataset] = []
    keep = kept(pair, asked.examples, config)
    if swaps:
        results = _swapped(vlm, builder, asked, swaps, config, keep)
        among = "all" if config.paper else "differing"
        results = {
            kind: with_changes(found, _pairs_of(asked, kind), config.change)
            for kind, found in results.items()
        }
        tables["localize_swap"] = swap_table(results, swaps, among)
        figures["localize_swap"] = plot_swaps(tables["localize_swap"], partition)
        found.append(results[COUNTERFACTUAL])
    if config.parts:
        found.append(_ablated(vlm, builder, asked, config, keep))
        tables["localize_ablation"] = accuracy(found[-1])
        figures |= _ablation_figures(tables["localize_ablation"], partition)
    of = tables.get("localize_swap"), tables.get("localize_ablation")
    sentences = [*swap_findings(of[0], partition), *ablation_findings(of[1], partition)]
    yield Section(
        "localize",
        f"Which layers of {name.upper()} carry a visual function",
        " ".join(headline(*of, partition)) or "Nothing could be told from these questions.",
        _account(config, name, partition, asked, found),
        tables,
        figures,
        with_looked_at(in_one(found), asked.examples),
        details=" ".join([*sentences, *(f"{note}." for note in asked.notes)]),
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
        for kind, pairs in {COUNTERFACTUAL: asked.pairs, **asked.controls}.items()
    }


def _pairs_of(asked: FunctionPairs, kind: str) -> Pairs:
    return asked.pairs if kind == COUNTERFACTUAL else asked.controls[kind]


def _ablated(
    vlm: HookedVLM, builder: PromptBuilder, asked: FunctionPairs, config: LocalizeConfig, keep: Store | None
) -> xr.Dataset:
    chosen = ablations_of(vlm, config)
    prompts = [builder.build(example) for example in asked.questions]
    own = under(keep, "ablate")
    return ablate(vlm, prompts, chosen, seed=config.seed, keep=own, **config.running)


def _builder(pair: Pair, config: LocalizeConfig, asked: FunctionPairs) -> PromptBuilder:
    if config.reply == "format" or (config.reply == "auto" and not asked.free):
        return pair.builder
    whole = TraceFormat(None, None, pair.trace_format.end_of_turn)
    own = pair.builder
    return PromptBuilder(pair.processor, whole, own.template, own.system, own.n_logits, own.instruction)


def _model(pair: Pair, config: LocalizeConfig) -> str:
    name = config.model or ("base" if pair.base is not None else "in")
    if name not in pair.models:
        raise FrankenlensError("--model base needs --base, the model that IN was made from.")
    return name


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
            f"them, written once at prefill; shares of {among}, Wilson's intervals (95 %); {_CHANGED[config.change]}"
        )
    if config.parts:
        parts.append(
            "ablations act at prefill and every step; accuracy with Wilson's interval, its change paired, "
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


COMMAND = Command(
    LocalizeConfig,
    check,
    load,
    load_triple,
    measure,
    admit,
    Planned(work, base=True, assumed=assumed, asks=False),
)
