"""What of RL's weights brings RL's gains to IN? Grafts by region, part and dose, with controls: Table 2 of 2602.12395.

`frankenlens transfer` is the command; the pieces are in `interp.transfer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from experiments.frame import Command, finished
from experiments.options import Only, a_task, default
from experiments.settings import (
    CORRECTIONS,
    Correction,
    Questions,
    QuestionSettings,
    load_examples,
    load_triple,
)
from hooks.address import Address
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.questions.examples import fingerprint, with_looked_at
from interp.questions.tasks import PERCEPTION, REASONING
from interp.regions import Partition, parse_partition
from interp.results.forest import plot_transfer
from interp.results.page import Account, Section
from interp.statistics import interval_text
from interp.transfer import (
    POOLED,
    Graft,
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

GROUPS: Mapping[str, Sequence[str]] = {"perception": PERCEPTION, "reasoning": REASONING}
PAPER_N = 100  # questions a task
_TASKS = (*PERCEPTION, *REASONING)
_CONTROLS = {
    "random": "a random update as large beside every variant",
    "layers": "as many random layers beside the mixtures, which alone have this control",
}


@dataclass(frozen=True)
class TransferConfig(QuestionSettings):
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
        correction: of p values, over all variants of one metric and task.
        paper: the paper's definition: its partition and mixtures, the rest from the first donor, n = 100 a task.
        n: questions, in equal shares over the synthetic tasks where no data is given.
        out: folder for transfer.csv, table_2.csv, transfer.png, transfer.nc and report.html. What each variant
            answered is kept in `finished`, and the same command goes on from there where it was killed.
    """

    n: int = default(400, paper=a_task(PAPER_N, _TASKS))
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
    correction: Correction = "holm"
    paper: bool = False
    out: Path = Path("out/transfer")


def check(config: TransferConfig) -> None:
    """Refuse grafts that there are not, and none at all."""
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
        FrankenlensError: no row can be read.
    """
    return Questions(*load_examples(config, config.seed, _TASKS))


def measure(pair: Pair, asked: Questions, config: TransferConfig) -> Iterator[Section]:
    """All variants of a pair.

    Raises:
        FrankenlensError: the partition does not cover the model, or an address names nothing.
    """
    partition = parse_partition(config.partition, pair.in_.n_layers)
    variants = chosen(pair, partition, config)
    metrics = {"accuracy": answers(pair.builder, asked.examples, **config.running)}
    others = {} if pair.base is None else {"Base": pair.base}
    keep = _kept(pair, asked, config)
    found = transfer(pair.in_, pair.rl, variants, metrics, others, keep=keep)
    groups = GROUPS if config.data is None else {}  # a user's tasks are his own, whatever their names
    table = transfer_table(found, groups, correction=config.correction)
    cells = shown_cells(table)
    yield Section(
        "transfer",
        "Transfer",
        finding(table, cells),
        _account(config, partition, variants, table, len(asked.examples), unmeasured(found)),
        {"transfer": table, "table_2": as_table_2(table)},
        {"transfer": plot_transfer(table, cells)},
        with_looked_at(found, asked.examples),
    )


def chosen(pair: Pair, partition: Partition, config: TransferConfig) -> list[Variant]:
    """The variants that the settings name, controls last."""
    vlm, found = pair.in_, []
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
        prompts=[pair.builder.template, pair.builder.system],
        questions=[(example.id, example.task, fingerprint(example)) for example in asked.examples],
    )


def finding(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> str:
    """RL's gain and the mixtures that carry it, in a sentence per panel."""
    sentences = []
    for metric, task in cells:
        own = table.loc[(table["metric"] == metric) & (table["task"] == task)]
        rl = own.loc[own["variant"] == "RL"].iloc[0]
        gain = interval_text(*(100 * rl[name] for name in ("change", "change_low", "change_high")))
        where = task if metric == "accuracy" and task else f"{metric} {task}".strip()
        said = f"{where}: RL − IN = {gain} points (n = {rl['n']})"
        grafts = own.loc[~own["kind"].isin(["model", "control"])]
        told = grafts.loc[grafts["p_adjusted"] < 0.05].sort_values("change", ascending=False)
        names = [
            f"{row['variant']} {interval_text(*(100 * row[c] for c in ('change', 'change_low', 'change_high')))}"
            for _, row in told.head(3).iterrows()
        ]
        count = f"{len(told)} of {len(grafts)} variants differ from IN after correction"
        sentences.append(f"{said}; {count}" + (f", most of all {'; '.join(names)}" if names else "") + ".")
    every = dict.fromkeys(zip(table["metric"], table["task"], strict=True))
    if left := [" ".join(cell).strip() for cell in every if cell not in cells]:
        sentences.append(f"In the table alone: {', '.join(left)}.")
    return " ".join(sentences)


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
        f"the rest {rest}; greedy answers; change against IN paired (95 %), exact McNemar; "
        "recovery (m − IN)/(RL − IN)"
    )
    if config.controls:
        definition += f"; controls: {', '.join(_CONTROLS[kind] for kind in dict.fromkeys(config.controls))}"
    together = table["task"].str.endswith(", mean") | (table["task"] == POOLED)
    tasks = table.loc[~together]
    sizes = sorted({int(n) for n in tasks["n"]})
    n = f"{sizes[0]} questions a task" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]} questions a task"
    tested = sum(variant.kind != "control" for variant in variants)
    correction = f"{CORRECTIONS[config.correction]} over {tested} variants, for each metric and task"
    counts = {"examples": n_examples}
    return Account(definition, n, correction, config.seed, str(partition), left_out, counts)


COMMAND = Command(TransferConfig, check, load, load_triple, measure)
