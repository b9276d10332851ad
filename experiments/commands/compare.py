"""What did each stage of training change, where, and in how many directions? From the checkpoints' files alone.

`frankenlens compare` is the command; the pieces are in `interp.comparison`. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.bench import Bench, Planned
from experiments.frame import Command, Opened
from experiments.options import default, either
from experiments.settings import ModelSettings, checkpoints
from hooks.errors import FrankenlensError
from interp.comparison import (
    Checkpoint,
    align,
    by_address,
    compare,
    energy_finding,
    every_address,
    headline,
    layers,
    regions,
    relative_finding,
    spectra,
    spectra_finding,
    trends,
    with_regions,
)
from interp.comparison.addresses import owned
from interp.comparison.aggregate import types_of
from interp.comparison.plots import STAGES, plot_directions, plot_energy, plot_spectra
from interp.comparison.workers import in_threads
from interp.plan.weights import DOUBLE, SINGLE, ComparisonPlan
from interp.plan.work import Work
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.updates import type_name

NORM = {"update": "fro_norm", "relative": "mean_relative_norm", "released": "released_relative_norm"}
_DRAWN = {
    "update": "Frobenius norm of a group's update, the root of the sum of squares over its tensors",
    "relative": "mean over a layer's matrices of the Frobenius norm of the update relative to W_IN's",
    "released": "mean of relative Frobenius norms over what the released code of 2602.12395 counts: all that is named "
    "weight and not norm, the projector's ln_q among it",
}
_NOT_IN_CSV = ["log_spectrum", "log_spectrum_random"]


@dataclass(frozen=True)
class CompareConfig(ModelSettings):
    """Settings of the comparison; the defaults run on the triple that ships with the package.

    Attributes:
        partition: of the decoder: paper (thirds, the first ones larger), code (cuts at n//3 and 2n//3), or sizes such
            as 8/12/8.
        spectra: singular values of every update (minutes for 7B; without, it is as fast as reading the files).
        subspace: dimensions of W's principal subspace; 0 leaves subspaces out, which for 7B take as long as spectra.
        regions: further addresses with a row in compare_addresses.csv, e.g. blocks.9-18.mlp; every layer, attention,
            MLP and head has one anyway.
        energy: what the figure of energy shows: update (norm of a layer's update: the root of the sum of squares),
            relative (mean of its matrices' norms, each relative to W_IN's: the size of the paper's Fig. 5), released
            (the same over what the paper's released code counts, the projector's norm among it).
        paper: the paper's definition: its partition and its energy, relative (or, where that is asked for, released).
        out: folder for the tables (compare.csv, one row per tensor and stage; compare_layers.csv, compare_regions.csv,
            compare_addresses.csv, compare_spectra.csv), the figures and report.html.
    """

    partition: str = default("paper", paper="paper")
    energy: Literal["update", "relative", "released"] = default(
        "update", paper=either("energy", "relative", "released")
    )
    spectra: bool = True
    subspace: int = 16
    regions: tuple[str, ...] = ()
    paper: bool = False
    out: Path = Path("out/compare")


@dataclass(frozen=True)
class Files:
    """The checkpoints on disk: what is compared, and what it is asked of."""

    opened: Mapping[str, Checkpoint]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """As `Pair.provenance`, from the files; all of them are read for it."""
        names = list(self.opened)
        sizes = [sum(one.entries for one in self.opened[name].tensors.values()) for name in names]
        made = in_threads(lambda name: self.opened[name].provenance(), names, sizes, "hashes")
        return dict(zip(names, made, strict=True))

    def close(self) -> None:
        """Nothing is held open."""


def check(config: CompareConfig) -> None:
    """Refuse a subspace that there is not."""
    if config.subspace < 0:
        raise FrankenlensError(f"--subspace is {config.subspace}; give at least 1, or 0 to leave it out.")


def open_files(config: CompareConfig) -> Files:
    """IN, RL and, where it is known, Base; names, shapes, partition and addresses are checked, no weight is read.

    Raises:
        FrankenlensError: a checkpoint cannot be read, the checkpoints do not align, or an address names nothing.
    """
    in_, rl, base = checkpoints(config)
    opened = {"in": Checkpoint(in_), "rl": Checkpoint(rl, in_)}
    if base is not None:
        opened["base"] = Checkpoint(base, in_)
    align(*opened.values())
    _partition(opened["in"], config)
    owned(opened["in"], config.regions)
    return Files(opened)


def measure(models: Opened, asked: Files, config: CompareConfig) -> Iterator[Section]:
    """Tables and figures of the files; whatever models are open beside them are not looked at."""
    opened = asked.opened
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
    norm = NORM[config.energy]
    figures = {
        "compare_energy": plot_energy(by_layer, partition, norm),
        "compare_directions": plot_directions(by_layer, partition),
    }
    stages = [stage for stage in STAGES if stage in set(table["stage"])]
    first = [headline(table, by_region, stage) for stage in reversed(stages)]
    findings = [energy_finding(by_region, stage) for stage in stages]
    if config.energy != "update":
        findings += [relative_finding(by_region, stage, norm) for stage in stages]
    if config.spectra:
        long = spectra(table)
        found = trends(with_regions(long, partition), ["region"])
        tables |= {"compare_trends": found, "compare_spectra": long}
        figures["compare_spectra"] = plot_spectra(long, partition)
        told = [spectra_finding(found, stage, partition) for stage in stages]
        first, findings = [*first, told[-1]], [*findings, *told[:-1]]
    title, said = "What training changed in the weights", " ".join(first)
    of_all = account(config, opened, table, partition)
    yield Section("compare", title, said, of_all, tables, figures, details=" ".join(findings))


def _partition(checkpoint: Checkpoint, config: CompareConfig) -> Partition:
    return parse_partition(config.partition, len(checkpoint.anatomy.text.blocks))


def account(
    config: CompareConfig, opened: Mapping[str, Checkpoint], table: pd.DataFrame, partition: Partition
) -> Account:
    paper = "the paper: " if config.paper else ""
    parts = [f"{paper}{_DRAWN[config.energy]}; relative to W_IN's in both stages"]
    parts += [f"unchanged: values that are the same in {types_of(table)}"]
    if mixed := _mixed(opened):
        parts.append(mixed)
    parts += ["log(σ_i / σ_1) of each matrix's update"] if config.spectra else []
    outside = f"principal subspaces of W before the stage, {config.subspace} dimensions a side"
    parts += [*_computed(table)]
    tensors = table["param_name"].nunique()
    return Account(
        "; ".join([*parts, *([outside] if config.subspace else [])]),
        f"{tensors} tensors, all of the model; intervals are over the matrices of a region",
        seed=config.seed,
        partition=str(partition),
        left_out=_left_out(opened, table),
        counts={"tensors": tensors},
    )


_WAYS = {
    "svd": "a float64 SVD",
    "gram float32": "a float32 Gram matrix",
    "gram float64": "a float64 Gram matrix",
    "gram": "a float64 Gram matrix",
    "krylov": "Krylov steps until their error no longer shows in the angles",
    "krylov and gram": "Krylov steps on one side of the stage and a float64 Gram matrix on the other",
    "gram and krylov": "a float64 Gram matrix on one side of the stage and Krylov steps on the other",
}


def _computed(table: pd.DataFrame) -> Iterator[str]:
    """How spectra and subspaces were computed, and of how many matrices."""
    for column, what in (("spectrum_method", "singular values"), ("subspace_method", "subspaces")):
        if column in table:
            ways = table[column].map(_WAYS).value_counts()
            if len(ways):
                yield f"{what} by {', '.join(f'{way} ({n} matrices)' for way, n in ways.items())}"


def _mixed(opened: Mapping[str, Checkpoint]) -> str:
    """What types the stages are stored in, where these differ: then rounding from one to the other is in the update."""
    types = {name: sorted({type_name(t.dtype) for t in one.tensors.values()}) for name, one in opened.items()}
    if len(set(map(tuple, types.values()))) == 1:
        return ""
    told = ", ".join(f"{name.upper()} {' and '.join(some)}" for name, some in types.items())
    return f"stored in different types ({told}), so that rounding from one to the other is in the update"


def _left_out(opened: Mapping[str, Checkpoint], table: pd.DataFrame) -> dict[str, int]:
    found = {
        f"names in {name.upper()}'s files that are no parameter": len(one.ignored)
        for name, one in opened.items()
    }
    found["tied to another tensor, counted once"] = len(opened["in"].ties)
    if why := opened["in"].anatomy.absent.get("vision"):
        found[f"vision tower and projector, counted under rest: {why}"] = 1
    if "n_untrusted" in table:
        found["singular values that are not exact to 1e-4"] = int(table["n_untrusted"].sum())
    return {reason: n for reason, n in found.items() if n}


def work(bench: Bench, config: CompareConfig) -> Iterator[Work]:
    """What `measure` computes and reads, from the shapes of the tensors; no model runs."""
    checkpoints_there = 3 if checkpoints(config)[2] else 2
    yield from ComparisonPlan(bench.vlm, checkpoints_there, config.subspace).works(config.spectra)


def assumed(bench: Bench, config: CompareConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    yield "checkpoints in the type of the configuration; every tensor changed; main memory is what is planned"
    if config.spectra:
        yield "singular values of large updates by float32 Gram matrices alone (float64 takes twice the time)"
    if config.subspace:
        yield (
            f"large matrices take {SINGLE} + {DOUBLE} Krylov steps, as weights whose singular values fall like a "
            "power do: half more or less in a real one, and a Gram matrix in one like noise"
        )


PLAN = Planned(work, assumed=assumed, asks=False, weights=lambda bench, config: {})
# the files are both what is asked and what it is asked of: opening them twice reads two headers
COMMAND = Command(CompareConfig, check, open_files, open_files, measure, plan=PLAN)
