"""The table of a comparison: one row per tensor and stage of training, straight from the checkpoints' files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.comparison.checkpoint import Checkpoint, Stored, align
from interp.comparison.energy import Sums, energies
from interp.comparison.names import Place, places
from interp.comparison.spectrum import TOP, Spectrum, blockwise
from interp.comparison.subspace import Subspace, energy_outside, leading, principal_angles
from interp.comparison.workers import in_threads

Source = Checkpoint | Path | str
_ROWS = 1 << 24  # entries of a block of rows
_OF_SPECTRUM = (
    "spectral_norm",
    "nuclear_norm",
    "stable_rank",
    "effective_rank",
    "condition_number",
    "log_volume",
)
_OF_SUBSPACE = tuple(
    f"principal_angle_{what}_{side}" for side in ("left", "right") for what in ("max", "mean")
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
    progress: bool = True,
) -> pd.DataFrame:
    """What each stage of training changed, tensor by tensor (2602.12395, section 4).

    Stage "in" is W_IN - W_Base (only with `base`), stage "rl" is W_RL - W_IN. Columns:

    - param_name, address, section, layer_index, unified_index, component: see `interp.comparison.names.Place`;
    - rows, columns (a convolution as the matrix it applies to a patch; a vector has no columns), n (entries);
    - fro_norm, mean_abs, max_abs of the update; reference_norm = |W_IN|_F in both stages, as in the paper, and
      relative_norm = fro_norm / reference_norm;
    - sparsity: share of entries whose bfloat16 values are the same before and after;
    - cosine: between the updates of the two stages, the same number in both rows;
    - with `spectra`: spectral_norm, nuclear_norm, stable_rank, effective_rank, condition_number, log_volume (sum of
      the logarithms of the `top` largest singular values), n_untrusted (singular values with a relative error that may
      exceed 1e-4), and log_spectrum: log(σ_i / σ_1) of the `top` largest, which `spectra` makes a long table of;
    - with `subspace`: principal angles (radians; largest and mean) between the leading left, and right, singular
      subspaces of the weights before and after, and energy_outside = 1 - |U^T Δ V|² / |Δ|², U and V those before.

    What does not exist is NaN: spectra of vectors, ranks and cosines of updates that are zero.

    Args:
        in_, rl, base: checkpoints or their folders.
        spectra: whether singular values are computed (minutes for 7B; without them it is as fast as reading).
        subspace: dimensions of the singular subspaces that are compared; None compares none.
        top: how many singular values are kept.
        progress: whether bars are shown.

    Raises:
        FrankenlensError: a checkpoint cannot be read, they do not align, or `subspace` or `top` is below 1.
    """
    if top < 1 or (subspace is not None and subspace < 1):
        raise FrankenlensError(f"top={top} and subspace={subspace} count singular values; give at least 1.")
    checkpoints, stages = opened(in_, rl, base)
    names = align(*checkpoints)
    stored = [checkpoints[0].tensors[name] for name in names]
    sizes = [one.entries for one in stored]
    read = partial(energies, checkpoints)
    sums = in_threads(read, names, sizes, "norms", progress, at_least=2)
    where = places(checkpoints[0].anatomy, names)
    table = pd.DataFrame(
        _row(name, where[name], stored[i], stage, sums[i][0][k]) | {"cosine": _cosine(*sums[i])}
        for k, stage in enumerate(stages)
        for i, name in enumerate(names)
    )
    table = table.astype({"layer_index": "Int64", "unified_index": "Int64", "columns": "Int64"})
    work = [
        (checkpoints[k], checkpoints[k + 1], name, sums[i][0][k].largest)
        for k in range(len(stages))
        for i, name in enumerate(names)
    ]
    if spectra:
        found = in_threads(partial(_spectral, top), work, sizes * len(stages), "spectra", progress)
        table = pd.concat([table, pd.DataFrame(found)], axis=1)
    if subspace is not None:
        found = _all_subspaces(checkpoints, names, work, subspace, progress)
        table = pd.concat([table, pd.DataFrame(found)], axis=1)
    folders = {s: str(c.folder) for s, c in zip(("rl", "in", "base"), reversed(checkpoints), strict=False)}
    table.attrs = {**folders, "reference": "W_IN", "top": top, "subspace": subspace}
    return table


def spectra(table: pd.DataFrame) -> pd.DataFrame:
    """The long table of a comparison's spectra: `rank` (from 1) and `log_ratio` = log(σ_rank / σ_1) of every matrix.

    Raises:
        FrankenlensError: the comparison was made without spectra.
    """
    if "log_spectrum" not in table:
        raise FrankenlensError("this comparison has no spectra; make it with compare(..., spectra=True).")
    some = table[table["log_spectrum"].str.len() > 0]
    long = some[[*_LABELS, "log_spectrum"]].explode("log_spectrum").reset_index(names="_row")
    long["rank"] = long.groupby("_row").cumcount() + 1
    long["log_ratio"] = long.pop("log_spectrum").astype(float)
    return long.drop(columns="_row")


def opened(in_: Source, rl: Source, base: Source | None) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The checkpoints in the order of training, and the stages between them."""
    given = [source for source in (base, in_, rl) if source is not None]
    checkpoints = [one if isinstance(one, Checkpoint) else Checkpoint(one) for one in given]
    return checkpoints, ("rl",) if base is None else ("in", "rl")


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


def _cosine(sums: Sequence[Sums], product: float) -> float:
    size = sums[0].squares ** 0.5 * sums[-1].squares ** 0.5
    return product / size if len(sums) == 2 and size else np.nan


def _spectral(top: int, work: tuple[Checkpoint, Checkpoint, str, float]) -> dict[str, Any]:
    before, after, name, largest = work
    shape = before.tensors[name].matrix
    if shape is None:
        return dict.fromkeys(_OF_SPECTRUM, np.nan) | {"n_untrusted": np.nan, "log_spectrum": ()}
    found = blockwise(partial(_delta_blocks, before, after, name), shape, largest, top)
    return _numbers(found, top)


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
        "log_spectrum": tuple(found.log_ratios(top).tolist()),
    }


def _all_subspaces(
    checkpoints: Sequence[Checkpoint], names: list[str], work: Sequence[tuple], k: int, progress: bool
) -> list[dict[str, float]]:
    """Tensor by tensor, so that each checkpoint's singular vectors are found once and forgotten soon."""
    raise NotImplementedError


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[Float[Tensor, "_row _column"]]:
    """The matrix in blocks of rows; one that is wider than tall whole."""
    rows, columns = checkpoint.tensors[name].matrix or (0, 0)
    for block in checkpoint.rows(name, rows * columns if rows < columns else _ROWS):
        yield block if block.dtype == torch.float64 else block.float()


def _delta_blocks(
    before: Checkpoint, after: Checkpoint, name: str
) -> Iterator[Float[Tensor, "_row _column"]]:
    for one, two in zip(_blocks(before, name), _blocks(after, name), strict=True):
        yield two - one
