"""What of RL's weights brings RL's gains to IN? Grafts by region, part and dose, with controls: Table 2 of 2602.12395.

`frankenlens transfer` is the command; the pieces are in `interp.transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from experiments.bench import Bench, Planned
from experiments.frame import Command, finished
from experiments.options import Only, default
from experiments.papers import ASKED, PaperSettings, described, paper_questions, refuse_own_data
from experiments.settings import (
    CORRECTIONS,
    Correction,
    Questions,
    checkpoints,
    load_examples,
    load_triple,
)
from hooks import HookedVLM
from hooks.address import Address
from hooks.errors import FrankenlensError
from interp.fine_grained import METRICS, PAPER_N, table_2_metrics
from interp.fine_grained.paper import DESCRIBED
from interp.fine_grained.questions import NEEDS
from interp.pair.pair import Pair
from interp.plan import decisions as plans
from interp.plan.prompts import variants_of
from interp.plan.variants import proof, written_together
from interp.plan.work import Work, together
from interp.prompts import Prompt
from interp.questions.examples import fingerprint, with_looked_at
from interp.questions.tasks import PERCEPTION, REASONING
from interp.regions import Partition, parse_partition
from interp.results.forest import plot_transfer
from interp.results.page import Account, Section, told
from interp.statistics import interval_text
from interp.transfer import (
    POOLED,
    Graft,
    Together,
    Variant,
    addressed,
    answers,
    as_table_2,
    controls,
    doses,
    factors,
    orders,
    parts,
    shown_cells,
    transfer,
    transfer_table,
    unmeasured,
)
from interp.transfer.outcomes import Metric
from interp.transfer.prefixes import sharing
from interp.updates import LEAST_COSINE, LEAST_SHARE, NORM_WITHIN

GROUPS: Mapping[str, Sequence[str]] = {"perception": PERCEPTION, "reasoning": REASONING}
_TASKS = (*PERCEPTION, *REASONING)
_MEASURED = {
    False: "greedy answers",
    True: (
        "M_vis: right with the image and wrong with a black one, M_v2r: right with the image and right with a black "
        "one and a description, M_rea: right on text alone, greedy; accuracy: right as the question is asked"
    ),
}
_CONTROLS = {
    "random": "a random update as large beside every variant",
    "layers": "as many random layers beside the mixtures, which alone have this control",
}


@dataclass(frozen=True)
class TransferConfig(PaperSettings):
    """Settings of the transfer; the defaults run on the triple that ships with the package.

    Attributes:
        partition: of the decoder: paper (10/9/9 of 28 layers), code (9/9/10), or sizes such as 8/12/8.
        rest: whose vision tower, projector, embeddings, final norm and head a mixture has: in (IN's), or early (those
            of the donor of the first region, as in the paper).
        variants: orders (mixtures of regions), factors (all blocks, and each part of the rest), parts (attention,
            MLPs), region-parts (the same in every region).
        addresses: more grafts, each alone, e.g. blocks.3.attn.head.1.
        scales: RL's whole update times this; between 0 and 1 it is interpolation.
        ranks: RL's whole update at these ranks.
        controls: random (an update as large, of random direction, beside every variant), layers (as many layers, drawn
            at random, beside the mixtures), or none.
        draws: of each control.
        rounded: measure, too, what weights in half precision do not hold (scaled and low-rank updates, mostly) and is
            refused otherwise; --dtype float32 holds all of it.
        correction: of p values, over all variants of one metric and task.
        paper: Table 2 of the paper: M_vis, M_v2r and M_rea on its data (MathVista, MATH-500; downloaded, or of
            --copies), its sample of 100 each, its prompts, system message and longest reply, its partition and
            mixtures, the rest from the first donor; accuracy of the same questions stands beside them.
        n: questions, in equal shares over the synthetic tasks where no data is given.
        out: folder for transfer.csv, table_2.csv, transfer.png, transfer.nc and report.html. What each variant
            answered is kept in `finished`, and the same command goes on from there where it was killed.
    """

    n: int = default(400, paper=PAPER_N)
    partition: str = default("paper", paper="paper")
    rest: Literal["in", "early"] = default(
        "in", paper="early", only=Only("orders among --variants", lambda config: "orders" in config.variants)
    )
    variants: tuple[Literal["orders", "factors", "parts", "region-parts"], ...] = default(
        ("orders", "factors", "parts"), paper=("orders",)
    )
    addresses: tuple[str, ...] = default((), paper=())
    scales: tuple[float, ...] = default((0.5, 2.0), paper=())
    ranks: tuple[int, ...] = default((4,), paper=())
    controls: tuple[Literal["random", "layers"], ...] = ("random", "layers")
    draws: int = default(1, only=Only("--controls", lambda config: config.controls))
    rounded: bool = False
    correction: Correction = "holm"
    out: Path = Path("out/transfer")


def check(config: TransferConfig) -> None:
    """Refuse grafts that there are not, none at all, and data beside the paper's."""
    refuse_own_data(config)
    for address in config.addresses:
        Address.parse(address)
    for rank in config.ranks:
        Graft(("blocks.0",), form="low_rank", rank=rank)
    if config.draws < 1:
        raise FrankenlensError(f"--draws is {config.draws}; give at least 1, or no --controls.")
    if not (config.variants or config.addresses or config.scales or config.ranks):
        raise FrankenlensError("nothing to graft: give --variants, --addresses, --scales or --ranks.")


def load(config: TransferConfig) -> Questions:
    """Questions of perception as well as of reasoning.

    Raises:
        Unreachable: the paper's data cannot be had.
        FrankenlensError: no row can be read.
    """
    if config.paper:
        return paper_questions(config, config.seed, METRICS)
    return Questions(*load_examples(config, config.seed, _TASKS))


def measure(pair: Pair, asked: Questions, config: TransferConfig) -> Iterator[Section]:
    """All variants of a pair.

    Raises:
        FrankenlensError: the partition does not cover the model, or an address names nothing.
    """
    partition = parse_partition(config.partition, pair.in_.n_layers)
    variants = chosen(pair.in_, partition, config)
    metrics = _metrics(pair, asked, config)
    others = {} if pair.base is None else {"Base": pair.base}
    keep = _kept(pair, asked, config)
    found = transfer(pair.in_, pair.rl, variants, metrics, others, keep=keep, rounded=config.rounded)
    own = config.data is not None or config.paper  # a user's tasks are his own, whatever their names
    groups = {} if own else GROUPS
    table = transfer_table(found, groups, correction=config.correction)
    cells = shown_cells(table)
    said = told(finding(table, cells))
    yield Section(
        "transfer",
        "Transfer",
        said[0],
        _account(config, partition, variants, table, len(asked.examples), unmeasured(found)),
        {"transfer": table, "table_2": as_table_2(table)},
        {"transfer": plot_transfer(table.loc[~table["refused"]], cells)},
        with_looked_at(found, asked.examples),
        details=said[1],
    )


def _metrics(pair: Pair, asked: Questions, config: TransferConfig) -> Mapping[str, Metric | Together]:
    """Accuracy; of the paper, what its Table 2 has, with accuracy beside it."""
    if not config.paper:
        return {"accuracy": answers(pair.builder, asked.examples, **config.running)}
    examples = described(pair, asked.examples, **config.running)
    own = {name: [example for example in examples if example.task == name] for name in METRICS}
    measured = {name: some for name, some in own.items() if some}
    return {"": table_2_metrics(pair.builder, measured, template=DESCRIBED, **config.running)}


def chosen(vlm: HookedVLM, partition: Partition, config: TransferConfig) -> list[Variant]:
    """The variants that the settings name, controls last."""
    found: list[Variant] = []
    partition.require(vlm.n_layers)
    if "orders" in config.variants:
        found += orders(partition, vlm, "early" if config.rest == "early" else "recipient")
    if "factors" in config.variants:
        found += factors(vlm)
    if "parts" in config.variants or "region-parts" in config.variants:
        found += parts(vlm, partition if "region-parts" in config.variants else None)
    found += addressed(config.addresses) + doses(vlm, config.scales, config.ranks)
    beside = {"random": found, "layers": [variant for variant in found if variant.kind == "order"]}
    for kind in dict.fromkeys(config.controls):
        found = found + controls(beside[kind], partition, [kind], config.draws, config.seed)
    return found


def _kept(pair: Pair, asked: Questions, config: TransferConfig) -> Path:
    """Where it is kept what each variant answered, by all that an answer depends on beside the grafts."""
    names = ("reasoning", "answer", "max_new_tokens", "batch_size", "device_map", "dtype")
    return finished(
        config.out,
        models=pair.provenance(),
        settings={name: getattr(config, name) for name in names},
        prompts=[pair.builder.template, pair.builder.system, pair.builder.instruction],
        metrics="paper" if config.paper else "accuracy",
        questions=[(example.id, example.task, fingerprint(example)) for example in asked.examples],
    )


def finding(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> list[str]:
    """RL's gain and the mixtures that carry it, in a sentence per panel, and what is in the table alone."""
    sentences = []
    for metric, task in cells:
        own = table.loc[(table["metric"] == metric) & (table["task"] == task)]
        rl = own.loc[own["variant"] == "RL"].iloc[0]
        gain = interval_text(*(100 * rl[name] for name in ("change", "change_low", "change_high")))
        where = task if metric == "accuracy" and task else f"{metric} {task}".strip()
        said = f"{where}: RL − IN = {gain} points (n = {rl['n']})"
        grafts = own.loc[~own["kind"].isin(["model", "control"]) & ~own["refused"]]
        sure = grafts.loc[grafts["p_adjusted"] < 0.05].sort_values("change", ascending=False)
        names = [
            f"{row['variant']} {interval_text(*(100 * row[c] for c in ('change', 'change_low', 'change_high')))}"
            for _, row in sure.head(3).iterrows()
        ]
        count = f"{len(sure)} of {len(grafts)} variants differ from IN after correction"
        beside = own.loc[own["kind"] == "control"]
        apart = int(((beside["change_low"] > 0) | (beside["change_high"] < 0)).sum())
        count += f" (of {len(beside)} controls {apart} have an interval without 0)" if len(beside) else ""
        sentences.append(f"{said}; {count}" + (f", most of all {'; '.join(names)}" if names else "") + ".")
    every = dict.fromkeys(zip(table["metric"], table["task"], strict=True))
    if left := [" ".join(cell).strip() for cell in every if cell not in cells]:
        sentences.append(f"In the table alone: {', '.join(left)}.")
    return [*sentences, *_refusals(table)]


def _refusals(table: pd.DataFrame) -> list[str]:
    """What the weights do not hold: a sentence on what was refused, one on what was measured all the same."""
    once = table.drop_duplicates("variant")
    sides = {"Refused, not run": once["refused"], "Run although it is not what it says": ~once["refused"]}
    told = []
    for what, side in sides.items():
        names = [
            f"{row['variant']}: {row['lacking']}"
            for _, row in once.loc[side & (once["lacking"] != "")].iterrows()
        ]
        told += [f"{what}: {'; '.join(names)}"] if names else []
    return told


def _account(
    config: TransferConfig,
    partition: Partition,
    variants: Sequence[Variant],
    table: pd.DataFrame,
    n_examples: int,
    left_out: Mapping[str, int],
) -> Account:
    rest = "IN's" if config.rest == "in" else "that of the first region's donor (the paper's confound)"
    definition = (
        f"{'the paper: ' if config.paper else ''}RL's weights in IN, decoder blocks spliced by region, "
        f"the rest {rest}; {_MEASURED[config.paper]}; change against IN paired (95 %), exact McNemar; "
        "recovery (m − IN)/(RL − IN)"
    )
    definition += (
        "; norm_ratio and cosine: of the update that the weights hold in their type to the one asked for, refused "
        f"beyond {1 - NORM_WITHIN:g}-{1 + NORM_WITHIN:g} or below {LEAST_COSINE:g} (of random updates, the norm alone) "
        f"in all, or in the tensors of more than {1 - LEAST_SHARE:.0%} of the entries"
    )
    if config.controls:
        definition += f"; controls: {', '.join(_CONTROLS[kind] for kind in dict.fromkeys(config.controls))}"
    together = table["task"].str.endswith(", mean") | (table["task"] == POOLED)
    tasks = table.loc[~together]
    sizes = sorted({int(n) for n in tasks["n"]})
    if config.paper:
        definition += f"; {ASKED}"
    n = f"{sizes[0]} questions a task" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]} questions a task"
    refused = set(table.loc[table["refused"], "variant"])
    tested = sum(variant.kind != "control" and variant.name not in refused for variant in variants)
    left_out = {**left_out, **({"variants that the weights do not hold": len(refused)} if refused else {})}
    correction = f"{CORRECTIONS[config.correction]} over {tested} variants, for each metric and task"
    counts = {"examples": n_examples}
    return Account(definition, n, correction, config.seed, str(partition), left_out, counts)


def work(bench: Bench, config: TransferConfig) -> Iterator[Work]:
    """What `transfer` computes, counted and not run; grafts that half precision does not hold are not run either."""
    variants = chosen(bench.vlm, parse_partition(config.partition, bench.vlm.n_layers), config)
    runs, grafts = bench.runs(), {"IN": (), **{variant.name: variant.grafts for variant in variants}}
    grouped = {name: grafts[name] for name in sharing(bench.vlm, grafts)}
    models = (3 if checkpoints(config)[2] else 2) - ("IN" in grouped)
    if config.paper:
        yield from _described(bench)
    asked, steps = list(_asked(bench, config)), bench.trace_tokens
    each = (runs.written("answers", some, [steps] * len(some)).times(scale) for some, scale in asked)
    once = together("answers of one model", each)
    yield replace(once, what=f"answers of {models} models").times(models)
    if grouped:
        yield proof(runs, grouped)
        what = f"answers of {len(grouped)} that write together"
        shared = (written_together(runs, what, grouped, some, steps).times(scale) for some, scale in asked)
        yield plans.set_aside(together(what, shared), runs)
    if alone := sum(variant.name not in grouped for variant in variants):
        grafted = replace(once, what=f"answers of {alone} variants alone").times(alone)
        yield plans.set_aside(grafted, runs)


def _described(bench: Bench) -> Iterator[Work]:
    prompts = bench.prompts
    yield (
        bench.runs()
        .written("descriptions by IN", prompts, [bench.trace_tokens] * len(prompts))
        .times(bench.scale)
    )


def _asked(bench: Bench, config: TransferConfig) -> Iterator[tuple[Sequence[Prompt], float]]:
    """Prompts that one model is asked, and how many each stands for; of the paper each metric's variants."""
    if not config.paper:
        yield bench.prompts, bench.scale
        return
    own = variants_of(bench.prompts, bench.trace_tokens)
    for variant in (variant for metric in METRICS for variant in NEEDS[metric]):
        if own[variant]:
            yield own[variant], config.n / len(own[variant])


def assumed(bench: Bench, config: TransferConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    if config.paper:
        yield f"descriptions of {bench.trace_tokens} tokens; black images as large as the others"


COMMAND = Command(
    TransferConfig,
    check,
    load,
    load_triple,
    measure,
    plan=Planned(work, base=True, assumed=assumed),
    on_ray=True,
)
