"""What did each stage of training change, where, and in how many directions? From the checkpoints' files alone.

`frankenlens compare` is the command; the pieces are in `interp.comparison`. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.settings import PairSettings, checkpoints, publish, require_sound
from hooks.errors import FrankenlensError
from interp.comparison import (
    Checkpoint,
    align,
    by_address,
    compare,
    every_address,
    layers,
    regions,
    spectra,
    trends,
    with_regions,
)
from interp.comparison.addresses import owned
from interp.comparison.aggregate import TRENDS
from interp.comparison.plots import STAGES, plot_directions, plot_energy, plot_spectra
from interp.comparison.workers import in_threads
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.statistics import interval_text

_NOT_IN_CSV = ["log_spectrum", "log_spectrum_random"]


@dataclass(frozen=True)
class CompareConfig(PairSettings):
    """Settings of the comparison; the defaults run on the triple that ships with the package.

    Attributes:
        partition: of the decoder: paper (thirds, the first ones larger), code (cuts at n//3 and 2n//3), or sizes such
            as 8/12/8.
        spectra: singular values of every update (minutes for 7B; without, it is as fast as reading the files).
        subspace: dimensions of W's principal subspace; 0 leaves subspaces out, which for 7B take longest.
        regions: further addresses with a row in compare_addresses.csv, e.g. blocks.9-18.mlp; every layer, attention,
            MLP and head has one anyway.
        paper: draw the mean of the matrices' norms, as the paper's released code does, not the norm of the update.
        out: folder for the tables (compare.csv, one row per tensor and stage; compare_layers.csv, compare_regions.csv,
            compare_addresses.csv, compare_spectra.csv), the figures and report.html.
    """

    partition: str = "paper"
    spectra: bool = True
    subspace: int = 16
    regions: tuple[str, ...] = ()
    paper: bool = False
    out: Path = Path("out/compare")


def run(config: CompareConfig) -> pd.DataFrame:
    """Compare and write the tables, figures and report.html, all or none.

    Returns:
        One row per tensor and stage: see `interp.comparison.compare`.

    Raises:
        FrankenlensError: settings contradict each other, a checkpoint cannot be read, the checkpoints do not align, or
            an address names nothing.
    """
    check(config)
    opened = open_checkpoints(config)
    section = measure(opened, config)
    names = list(opened)
    sizes = [sum(one.entries for one in opened[name].tensors.values()) for name in names]
    made = in_threads(lambda name: opened[name].provenance(), names, sizes, "hashes")
    table = section.tables["compare"]
    publish([section], config, config.out, dict(zip(names, made, strict=True)), {"tensors": _tensors(table)})
    return table


def check(config: CompareConfig) -> None:
    """Refuse settings that contradict each other, before a file is opened.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    if config.subspace < 0:
        raise FrankenlensError(f"--subspace is {config.subspace}; give at least 1, or 0 to leave it out.")


def open_checkpoints(config: CompareConfig) -> dict[str, Checkpoint]:
    """IN, RL and, where it is known, Base; names, shapes, partition and addresses are checked, no weight is read.

    Raises:
        FrankenlensError: see `run`.
    """
    in_, rl, base = checkpoints(config)
    opened = {"in": Checkpoint(in_), "rl": Checkpoint(rl)}
    if base is not None:
        opened["base"] = Checkpoint(base)
    align(*opened.values())
    _partition(opened["in"], config)
    owned(opened["in"], config.regions)
    return opened


def measure(opened: dict[str, Checkpoint], config: CompareConfig) -> Section:
    """Tables and figures of opened checkpoints (`open_checkpoints`)."""
    given = opened["in"], opened["rl"], opened.get("base")
    partition = _partition(opened["in"], config)
    table = compare(*given, spectra=config.spectra, subspace=config.subspace or None, seed=config.seed)
    addresses = dict.fromkeys([*every_address(opened["in"]), *config.regions])
    by_layer, by_region = layers(table), regions(table, partition)
    tables = {
        "compare": table.drop(columns=_NOT_IN_CSV, errors="ignore"),
        "compare_regions": by_region,
        "compare_layers": by_layer,
        "compare_addresses": by_address(table, *given, addresses=list(addresses)),
    }
    norm = "mean_norm" if config.paper else "fro_norm"
    figures = {
        "compare_energy": plot_energy(by_layer, partition, norm),
        "compare_directions": plot_directions(by_layer, partition),
    }
    findings = [_energy_found(by_region, stage) for stage in STAGES if stage in set(table["stage"])]
    if config.spectra:
        long = spectra(table)
        found = trends(with_regions(long, partition), ["region"], seed=config.seed)
        tables |= {"compare_trends": found, "compare_spectra": long}
        figures["compare_spectra"] = plot_spectra(long, partition, config.seed)
        findings += [
            _spectra_found(found, stage, partition) for stage in STAGES if stage in set(table["stage"])
        ]
    account = Account(
        _definition(config),
        f"{_tensors(table)} tensors, all of the model; intervals are over the matrices of a region",
        seed=config.seed,
        partition=str(partition),
        left_out=_left_out(opened, table),
    )
    title = "What training changed in the weights"
    return Section("compare", title, " ".join(findings), account, tables, figures)


def _partition(checkpoint: Checkpoint, config: CompareConfig) -> Partition:
    return parse_partition(config.partition, len(checkpoint.anatomy.text.blocks))


def _tensors(table: pd.DataFrame) -> int:
    return table["param_name"].nunique()


def _definition(config: CompareConfig) -> str:
    norm = (
        "mean Frobenius norm of a layer's matrices, as in the released code of 2602.12395"
        if config.paper
        else "Frobenius norm of a group's update, the root of the sum of squares over its tensors"
    )
    parts = [f"{norm}; relative to W_IN's in both stages"]
    parts += ["log(σ_i / σ_1) of each matrix's update"] if config.spectra else []
    outside = f"principal subspaces of W before the stage, {config.subspace} dimensions a side"
    return "; ".join([*parts, *([outside] if config.subspace else [])])


def _left_out(opened: dict[str, Checkpoint], table: pd.DataFrame) -> dict[str, int]:
    found = {
        f"names in {name.upper()}'s files that are no parameter": len(one.ignored)
        for name, one in opened.items()
    }
    found["tied to another tensor, counted once"] = len(opened["in"].ties)
    if "n_untrusted" in table:
        found["singular values that are not exact to 1e-4"] = int(table["n_untrusted"].sum())
    return {reason: n for reason, n in found.items() if n}


def _energy_found(by_region: pd.DataFrame, stage: str) -> str:
    some: Any = by_region.loc[by_region["stage"] == stage]
    total, size = ((some[name] ** 2).sum() ** 0.5 for name in ("fro_norm", "reference_norm"))
    rounding = (some["rounding_norm"] ** 2).sum() ** 0.5
    if not total:
        return f"{STAGES[stage]} is zero."
    shares = ", ".join(
        f"{row.region} {100 * row.energy_share:.1f} % (of entries {100 * row.entries_share:.1f} %)"
        for row in some.itertuples()
        if row.energy_share >= 0.0005
    )
    same, random = (
        (some[name] * some["n"]).sum() / some["n"].sum() for name in ("sparsity", "sparsity_random")
    )
    return (
        f"{STAGES[stage]} has norm {total:.3g}, {total / size:.2g} of W_IN's (rounding to bfloat16 alone: "
        f"{rounding / size:.2g}). Energy: {shares}. Unchanged in bfloat16: {100 * same:.1f} % of the entries "
        f"(Gaussian update of that norm: {100 * random:.1f} %)."
    )


def _spectra_found(found: pd.DataFrame, stage: str, partition: Partition) -> str:
    rank = TRENDS[1]
    some = found[(found["stage"] == stage) & (found["rank"] == rank)]
    rows: Sequence[Any] = [row for row in some.itertuples() if row.region in partition.regions]
    if not rows:
        return f"{STAGES[stage]} has no matrix with {rank} singular values that differ from 0."
    texts = (
        f"{row.region} {interval_text(row.log_ratio, row.low, row.high)} "
        f"(n = {row.n} matrices; Gaussian {row.random:.2f})"
        for row in rows
    )
    return f"log(σ_{rank} / σ_1) of {STAGES[stage]}: {', '.join(texts)}."
