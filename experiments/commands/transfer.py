"""What of RL's weights brings RL's gains to IN? Grafts by region, part and dose, with controls: Table 2 of 2602.12395.

`frankenlens transfer` is the command; the pieces are in `interp.transfer`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.address import Address
from hooks.errors import FrankenlensError
from interp.localization.outcomes import Grader
from interp.pair.pair import Pair
from interp.questions.examples import Example, with_looked_at
from interp.questions.grading import grade
from interp.questions.tasks import PERCEPTION, REASONING
from interp.regions import Partition, parse_partition
from interp.results.forest import plot_transfer
from interp.results.page import Account, Section
from interp.statistics import interval_text
from interp.transfer.grafts import Graft
from interp.transfer.table import as_table_2, transfer_table
from interp.transfer.transfer import Metric, answers, transfer
from interp.transfer.variants import Variant, addressed, controls, doses, factors, orders, parts

GROUPS: Mapping[str, Sequence[str]] = {"perception": PERCEPTION, "reasoning": REASONING}
PAPER_N = 100  # questions a task
_CONTROLS = {
    "random": "a random update as large beside every variant",
    "layers": "as many random layers beside the mixtures, which alone have this control",
}


@dataclass(frozen=True)
class TransferConfig(PairSettings, DataSettings):
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
        out: folder for transfer.csv, table_2.csv, transfer.png, transfer.nc and report.html.
    """

    n: int = 400
    partition: str = "paper"
    rest: Literal["in", "early"] = "in"
    variants: tuple[Literal["orders", "factors", "parts", "region-parts"], ...] = (
        "orders",
        "factors",
        "parts",
    )
    addresses: tuple[str, ...] = ()
    scales: tuple[float, ...] = (0.5, 2.0)
    ranks: tuple[int, ...] = (4,)
    controls: tuple[Literal["random", "layers"], ...] = ("random", "layers")
    draws: int = 1
    correction: Literal["holm", "bh"] = "holm"
    paper: bool = False
    out: Path = Path("out/transfer")


def run(config: TransferConfig) -> pd.DataFrame:
    """Measure every variant and write table, figure, dataset and page, all or none.

    A run that is killed leaves what each variant answered in a folder of `out`; the same command goes on from there.

    Returns:
        The table of transfer.csv: see `interp.transfer.table.transfer_table`.

    Raises:
        FrankenlensError: settings contradict each other, the partition does not cover the model, an address names
            nothing, the models are no pair, or the data cannot be read.
    """
    config = settled(config)
    check(config)
    pair = load_pair(config, with_base=True)
    try:
        examples, dropped = load_examples(config, config.seed, (*PERCEPTION, *REASONING))
        models = pair.provenance()
        keep = config.out / f"kept-{_fingerprint(config, examples, models)}"
        section = measure(pair, examples, config, dropped, keep=keep)
        publish([section], config, config.out, models, {"examples": len(examples)})
        shutil.rmtree(keep)
    finally:
        pair.close()
    return section.tables["transfer"]


def settled(config: TransferConfig) -> TransferConfig:
    """The settings with `paper` spelt out."""
    if not config.paper:
        return config
    n = PAPER_N * len((*PERCEPTION, *REASONING)) if config.data is None else PAPER_N
    plain: dict = {"addresses": (), "scales": (), "ranks": (), "variants": ("orders",)}
    return replace(config, partition="paper", rest="early", n=n, **plain)


def check(config: TransferConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    for address in config.addresses:
        Address.parse(address)
    for rank in config.ranks:
        Graft(("blocks.0",), form="low_rank", rank=rank)
    if config.draws < 1:
        raise FrankenlensError(f"--draws is {config.draws}; give at least 1, or no --controls.")
    if not (config.variants or config.addresses or config.scales or config.ranks):
        raise FrankenlensError("nothing to graft: give --variants, --addresses, --scales or --ranks.")


def measure(
    pair: Pair,
    examples: Sequence[Example],
    config: TransferConfig,
    dropped: Mapping[str, int] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    grader: Grader = grade,
    keep: Path | None = None,
) -> Section:
    """All variants of a pair, as a section of a page.

    Args:
        pair: IN, RL and perhaps Base; as they were, afterwards.
        examples: of the metric "accuracy".
        config: the settings.
        dropped: reason to number of examples that could not be read.
        metrics: instead of "accuracy", e.g. M_vis, M_v2r and M_rea by name.
        grader: of "accuracy".
        keep: see `interp.transfer.transfer`.

    Raises:
        FrankenlensError: as `run`.
    """
    config = settled(config)
    partition = parse_partition(config.partition, pair.in_.n_layers)
    variants = chosen(pair, partition, config)
    if metrics is None:
        settings = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
        metrics = {"accuracy": answers(pair.builder, examples, grader=grader, **settings)}
    others = {} if pair.base is None else {"Base": pair.base}
    found = transfer(pair.in_, pair.rl, variants, metrics, others, keep=keep)
    table = transfer_table(found, GROUPS, correction=config.correction, seed=config.seed)
    cells = panels(table)
    left_out = {**(dropped or {}), **_left_out(found)}
    figure = plot_transfer(table, cells)
    tables = {"transfer": table, "table_2": as_table_2(table)}
    account = _account(config, partition, variants, table, left_out)
    figures, data = {"transfer": figure}, with_looked_at(found, examples)
    return Section("transfer", "Transfer", finding(table, cells), account, tables, figures, dataset=data)


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


def panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (metric, task) that the figure shows: means of groups where there are any, otherwise up to four."""
    cells = list(dict.fromkeys(zip(table["metric"], table["task"], strict=True)))
    return [cell for cell in cells if cell[1].endswith(", mean")] or cells[:4]


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
    return " ".join(sentences)


def _fingerprint(config: TransferConfig, examples: Sequence[Example], models: Mapping[str, object]) -> str:
    """Of all that an answer depends on, beside the grafts."""
    digest = hashlib.sha256(json.dumps(models, sort_keys=True, default=str).encode())
    for name in ("reasoning", "answer", "max_new_tokens", "batch_size", "device_map", "dtype"):
        digest.update(f"{name} {getattr(config, name)!r}\n".encode())
    for example in examples:
        digest.update(repr((example.id, example.question, example.answer, example.task)).encode())
        for image in example.images:
            digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _left_out(found: xr.Dataset) -> dict[str, int]:
    """Reason to number of examples that some variant has no value for."""
    missing, why = found["right"].isnull().to_numpy(), found["why"].to_numpy()
    rows, places = missing.nonzero()
    once = {(int(place), str(why[row, place])) for row, place in zip(rows, places, strict=True)}
    return dict(Counter(reason for _, reason in sorted(once)))


def _account(
    config: TransferConfig,
    partition: Partition,
    variants: Sequence[Variant],
    table: pd.DataFrame,
    left_out: Mapping[str, int],
) -> Account:
    rest = "IN's" if config.rest == "in" else "that of the first region's donor (the paper's confound)"
    names = list(dict.fromkeys(table["metric"]))
    graded = "greedy answers" if names == ["accuracy"] else ", ".join(names)
    definition = (
        f"{'the paper: ' if config.paper else ''}RL's weights in IN, decoder blocks spliced by region, "
        f"the rest {rest}; {graded}; change against IN paired (bootstrap, 95 %), exact McNemar; "
        "recovery (m − IN)/(RL − IN)"
    )
    if config.controls:
        definition += f"; controls: {', '.join(_CONTROLS[kind] for kind in dict.fromkeys(config.controls))}"
    tasks = table.loc[~table["task"].str.endswith(", mean")]
    sizes = sorted({int(n) for n in tasks["n"]})
    n = f"{sizes[0]} questions a task" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]} questions a task"
    tested = sum(variant.kind != "control" for variant in variants)
    name = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[config.correction]
    correction = f"{name} over {tested} variants, for each metric and task"
    return Account(definition, n, correction, config.seed, str(partition), left_out)
