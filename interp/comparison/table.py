"""The table of a comparison: one row per tensor and stage of training, straight from the checkpoints' files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import Checkpoint
from hooks.stored.tensors import Stored
from interp.comparison.adapted import Adapted, Source, checkpoint_of
from interp.comparison.alignment import align
from interp.comparison.controls import gaussian_spectrum, rounding
from interp.comparison.directions import directions
from interp.comparison.energy import Sums, energies
from interp.comparison.held import difference, held
from interp.comparison.names import Place, places
from interp.comparison.singular_values import TOP, Spectrum, blockwise
from interp.comparison.stored import counted_in
from interp.comparison.workers import READERS, in_threads
from interp.updates import type_name

AT_ONCE = {"spectra": 2, "subspaces": 1}
"""Matrices: each takes up to 400 and 700 MB."""
_OF_SPECTRUM = (
    "spectral_norm",
    "nuclear_norm",
    "stable_rank",
    "effective_rank",
    "condition_number",
    "log_volume",
)
_LABELS = ["param_name", "address", "section", "layer_index", "unified_index", "component", "stage"]


def compare(
    in_: Source,
    rl: Source,
    base: Source | None = None,
    *,
    spectra: bool = True,
    subspace: int | None = None,
    top: int = TOP,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What each stage of training changed, tensor by tensor (2602.12395, section 4).

    Stage "in" is W_IN - W_Base (only with `base`), stage "rl" is W_RL - W_IN. Columns:

    - param_name, address, section, layer_index, unified_index, component: see `interp.comparison.names.Place`;
    - rows, columns (a convolution as the matrix it applies to a patch; a vector has no columns), n (entries);
    - fro_norm, mean_abs, max_abs of the update; reference_norm = |W_IN|_F in both stages, as in the paper, and
      relative_norm = fro_norm / reference_norm; rounding_norm: what rounding to bfloat16 changes, as a control;
    - sparsity: share of entries whose values are the same before and after in the type that they are stored in, or the
      coarser of two (float32 and wider: in bfloat16), which sparsity_type names; sparsity_random: the same for a
      Gaussian update of the same norm (both controls: `interp.comparison.controls.rounding`);
    - scalar_product and cosine of the updates of the two stages, the same in both rows; cosine_chance: 95 % of
      independent directions have one between -it and +it (W_IN is in both updates, so its rounding alone makes the
      cosine negative, by about rounding_norm² / the product of the norms);
    - with `spectra`: spectral_norm, nuclear_norm, stable_rank, effective_rank, condition_number, log_volume (sum of
      the logarithms of the `top` largest singular values), n_untrusted (singular values with a relative error that may
      exceed 1e-4), spectrum_method (how they were computed: `Spectrum.method`), log_spectrum: log(σ_i / σ_1) of the
      `top` largest, which `spectra` makes a long table of; ranks and log_spectrum again with `_random`, of a Gaussian
      matrix of the same shape;
    - with `subspace`: principal angles (radians; largest and mean) between the leading left, and right, singular
      subspaces of the weights before and after; energy_outside = 1 - |U^T Δ V|² / |Δ|², U and V those before;
      energy_outside_chance, of an update without direction; subspace_k, the dimensions that there were;
      subspace_method and subspace_error (`Subspace.method`, `.error`, of both together): how they were found, and what
      the angles may be off by (radians).

    What does not exist is NaN: spectra of vectors, ranks and cosines of updates that are zero.

    Args:
        in_, rl, base: checkpoints or their folders; RL may be the folder of a LoRA adapter of IN, which is compared as
            W + s B A in float32, and whose spectra are computed from its own two matrices.
        spectra: whether singular values are computed (minutes for 7B; without them it is as fast as reading).
        subspace: dimensions of the singular subspaces that are compared; None compares none.
        top: how many singular values are kept.
        seed: of the random updates.
        progress: whether bars are shown.

    Raises:
        FrankenlensError: a checkpoint cannot be read, they do not align, or `subspace` or `top` is below 1.
    """
    if top < 1 or (subspace is not None and subspace < 1):
        raise FrankenlensError(f"top={top} and subspace={subspace} count singular values; give at least 1.")
    checkpoints, stages = opened(in_, rl, base)
    names = align(*checkpoints)
    sizes = [checkpoints[0].tensors[name].entries for name in names]
    read = partial(energies, checkpoints)
    sums = in_threads(read, names, sizes, "norms", progress, at_least=READERS)
    table = _energy_table(checkpoints, stages, names, sums, seed)
    if spectra:
        work = [
            (checkpoints[k], checkpoints[k + 1], name, sums[i][0][k].largest)
            for k in range(len(stages))
            for i, name in enumerate(names)
        ]
        some = partial(_spectral, top, seed)
        found = in_threads(some, work, sizes * len(stages), "spectra", progress, at_most=AT_ONCE["spectra"])
        table = pd.concat([table, pd.DataFrame(found)], axis=1)
    if subspace is not None:
        some = partial(directions, checkpoints, subspace)
        changes = [(name, _changes(table, i, len(names), sums[i][0])) for i, name in enumerate(names)]
        by_tensor = in_threads(some, changes, sizes, "subspaces", progress, at_most=AT_ONCE["subspaces"])
        found = [rows[k] for k in range(len(stages)) for rows in by_tensor]
        table = pd.concat([table, pd.DataFrame(found)], axis=1)
    folders = {s: str(c.folder) for s, c in zip(("rl", "in", "base"), reversed(checkpoints), strict=False)}
    table.attrs = {**folders, "reference": "W_IN", "top": top, "subspace": subspace, "seed": seed}
    return table


def spectra(table: pd.DataFrame) -> pd.DataFrame:
    """The long table of a comparison's spectra: `rank` (from 1) and `log_ratio` = log(σ_rank / σ_1) of every matrix.

    Beside it `log_ratio_random`, of a Gaussian matrix of the same shape.

    Raises:
        FrankenlensError: the comparison was made without spectra.
    """
    if "log_spectrum" not in table:
        raise FrankenlensError("this comparison has no spectra; make it with compare(..., spectra=True).")
    some: Any = table.loc[table["log_spectrum"].str.len() > 0]
    both = ["log_spectrum", "log_spectrum_random"]
    long = some[[*_LABELS, *both]].explode(both).reset_index(names="_row")
    long["rank"] = long.groupby("_row").cumcount() + 1
    for name in both:
        long[name.replace("spectrum", "ratio")] = long.pop(name).astype(float)
    return long.drop(columns="_row")


def opened(in_: Source, rl: Source, base: Source | None) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The checkpoints in the order of training, and the stages between them."""
    before = checkpoint_of(in_)
    first = [] if base is None else [checkpoint_of(base, settings=before.folder)]
    checkpoints = [*first, before, checkpoint_of(rl, before)]
    return checkpoints, ("rl",) if base is None else ("in", "rl")


def _energy_table(
    checkpoints: Sequence[Checkpoint],
    stages: Sequence[str],
    names: list[str],
    sums: Sequence[tuple[list[Sums], float]],
    seed: int,
) -> pd.DataFrame:
    where = places(checkpoints[0].anatomy, names)
    rows = []
    for k, stage in enumerate(stages):
        for i, name in enumerate(names):
            row = _row(name, where[name], checkpoints[0].tensors[name], stage, sums[i][0][k])
            kind = counted_in(*(checkpoints[at].tensors[name].dtype for at in (k, k + 1)))
            row |= rounding(checkpoints[k], name, row["fro_norm"], seed, kind)
            row |= {"sparsity_type": type_name(kind)}
            row |= {"scalar_product": sums[i][1] if len(stages) == 2 else np.nan}
            rows.append(row | {"cosine": _cosine(*sums[i]), "cosine_chance": chance(row["n"])})
    whole = ("layer_index", "unified_index", "columns")
    return pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))


def chance(n: int) -> float:
    """95 % of the cosines of independent directions in n dimensions lie between -this and +this (for n large)."""
    return 1.96 / n**0.5


def _row(name: str, place: Place, stored: Stored, stage: str, sums: Sums) -> dict[str, Any]:
    rows, columns = stored.matrix or (stored.entries, None)
    norm, reference = sums.squares**0.5, sums.reference**0.5
    labels = (name, place.address, place.section, place.layer, place.unified, place.component, stage)
    return {
        **dict(zip(_LABELS, labels, strict=True)),
        "rows": rows,
        "columns": columns,
        "n": sums.n,
        "fro_norm": norm,
        "reference_norm": reference,
        "relative_norm": norm / reference if reference else np.nan,
        "mean_abs": sums.absolutes / sums.n,
        "max_abs": sums.largest,
        "sparsity": sums.unchanged / sums.n,
    }


def _changes(table: pd.DataFrame, at: int, n: int, sums: Sequence[Sums]) -> list[float]:
    """Of each stage's update of the tensor in that row, at least its spectral norm: by its spectrum, if known."""
    norms: Any = table["spectral_norm" if "spectral_norm" in table else "fro_norm"]
    return [
        max(1.001 * float(norms[stage * n + at]), one.largest) if one.largest else 0.0
        for stage, one in enumerate(sums)
    ]


def _cosine(sums: Sequence[Sums], product: float) -> float:
    size = sums[0].squares ** 0.5 * sums[-1].squares ** 0.5
    return product / size if len(sums) == 2 and size else np.nan


def _spectral(top: int, seed: int, work: tuple[Checkpoint, Checkpoint, str, float]) -> dict[str, Any]:
    before, after, name, largest = work
    shape = before.tensors[name].matrix
    if shape is None:
        absent = dict.fromkeys(
            (*_OF_SPECTRUM, "n_untrusted", "stable_rank_random", "effective_rank_random"), np.nan
        )
        return absent | {"spectrum_method": None, "log_spectrum": (), "log_spectrum_random": ()}
    if isinstance(after, Adapted) and after.in_ is before and after.is_product(name):
        found = after.adapter.updates[name].spectrum()
    else:
        found = blockwise(difference(held(before, name), held(after, name), shape), shape, largest, top)
    random = gaussian_spectrum(*shape, seed)
    return _numbers(found, top) | {
        "stable_rank_random": random.stable_rank,
        "effective_rank_random": random.effective_rank,
        "log_spectrum_random": tuple(random.log_ratios(top).tolist()),
    }


def _numbers(found: Spectrum, top: int) -> dict[str, Any]:
    values = (
        float(found.values[0]),
        float(found.values.sum()),
        found.stable_rank,
        found.effective_rank,
        found.condition_number,
        found.log_volume(top),
    )
    numbers: dict[str, Any] = dict(zip(_OF_SPECTRUM, values, strict=True))
    return numbers | {
        "n_untrusted": int((~found.trusted).sum()),
        "spectrum_method": found.method,
        "log_spectrum": tuple(found.log_ratios(top).tolist()),
    }
