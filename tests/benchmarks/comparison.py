"""Spectra and subspaces of matrices of 7B's width, against the whole decompositions they replace, in one process.

`python -m tests.benchmarks.comparison FOLDER` writes matrices to the folder, measures and prints JSON. Times are CPU
seconds of this process, old and new in turn, medians; differences are relative, to float64; memory is the kernel's
peak of resident memory (VmHWM) while the new way runs in a process of its own, after it was set back
(/proc/self/clear_refs).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from hooks.stored.files import DTYPES, entries
from interp.comparison.checkpoint import Checkpoint
from interp.comparison.directions import directions
from interp.comparison.held import difference, held
from interp.comparison.singular_values import TOP, Spectrum, blockwise
from interp.comparison.stored import Stored
from tests.interp.comparison import exact
from tests.interp.comparison.comparison_size import peak

K, ROUNDS = 16, 3
WIDTH, MLP, WORDS = 3584, 18944, 152064
STAGES = ("in", "rl")
CASES = {
    "q_proj, trained": ((WIDTH, WIDTH), True),
    "up_proj, trained": ((MLP, WIDTH), True),
    "down_proj, trained": ((WIDTH, MLP), True),
    "up_proj, flat": ((MLP, WIDTH), False),
}
"""Shape, and whether singular values fall as those of trained weights do or are those of noise alone."""
LARGEST = ("embedding, trained", (WORDS, WIDTH), True)
_DEVIATION, _STEP = 0.02, 1e-3  # of the weights; of the update, relative to them
_HEADS = {True: (256, 4.0, 0.35), False: (0, 0.0, 0.0)}  # rank, largest beside the noise's, power of the fall


def measure(folder: Path, largest: bool = True) -> dict[str, Any]:
    """Ratios, differences and gigabytes of every case; each is told on standard error when it is known."""
    found: dict[str, Any] = {}
    for name, (shape, trained) in CASES.items():
        checkpoints = write(folder, shape, trained)
        found[name] = {**_subspaces(checkpoints, shape), **_spectra(checkpoints, shape)}
        print(name, found[name], file=sys.stderr, flush=True)
    if largest:
        name, shape, trained = LARGEST
        checkpoints = write(folder, shape, trained)
        seconds, row = clock(lambda: _rows(checkpoints, shape))
        found[name] = {"subspaces, new (CPU s)": seconds, "method": row["subspace_method"]}
        found[name] |= {"spectra, new (CPU s)": clock(lambda: _spectrum(checkpoints, shape))[0]}
        for what, function in (("subspaces", _rows), ("spectra", _spectrum)):
            found[name][f"{what}, VmHWM (GB)"] = _peak_alone(function, checkpoints, shape)
    return found


def _subspaces(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> dict[str, Any]:
    before, after = (held(one, "w") for one in checkpoints)
    clocks, (exactly, row) = _in_turn(
        lambda: exact.angles(before, after, shape, K),
        lambda: _rows(checkpoints, shape),
    )
    worst = max(abs(row[name] / value - 1) for name, value in exactly.items())
    return {
        **_told("subspaces", clocks),
        "subspaces, worst difference": worst,
        "method": row["subspace_method"],
        "subspaces, VmHWM (GB)": _peak_alone(_rows, checkpoints, shape),
    }


def _spectra(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> dict[str, Any]:
    before, after = (held(one, "w") for one in checkpoints)
    delta = difference(before, after, shape)
    clocks, (_, ours) = _in_turn(lambda: exact.spectrum(delta, shape), lambda: _spectrum(checkpoints, shape))
    reference = exact.in_double(delta, shape)
    worst = {
        name: abs(a / b - 1) for (name, a), (_, b) in zip(numbers(ours), numbers(reference), strict=True)
    }
    return {
        **_told("spectra", clocks),
        "spectra, worst difference": max(worst.values()),
        "spectrum_method": ours.method,
        "spectra, VmHWM (GB)": _peak_alone(_spectrum, checkpoints, shape),
    }


def numbers(found: Spectrum) -> list[tuple[str, float]]:
    """All that is printed of a spectrum, and the ratios themselves rather than their logarithms."""
    some = [("spectral", found.values[0]), ("nuclear", found.values.sum()), ("stable", found.stable_rank)]
    some += [("effective", found.effective_rank), ("volume", found.log_volume())]
    return some + [(f"ratio {i}", float(np.exp(one))) for i, one in enumerate(found.log_ratios(TOP))]


def _spectrum(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> Spectrum:
    before, after = (held(one, "w") for one in checkpoints)
    return blockwise(difference(before, after, shape), shape, 1.0)


def _rows(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> dict[str, Any]:
    return directions(checkpoints, K, ("w", (True,)))[0]


def _peak_alone(
    function: Callable[..., Any], checkpoints: Sequence[Checkpoint], shape: tuple[int, int]
) -> float:
    """In a process of its own: what the old way left behind is not in it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, function, checkpoints, shape).result()


def _peak(function: Callable[..., Any], checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> float:
    torch.set_num_threads(1)
    reset_peak()
    function(checkpoints, shape)
    return peak()


def _in_turn(old: Callable[[], Any], new: Callable[[], Any]) -> tuple[list[list[float]], tuple[Any, Any]]:
    rounds = [(clock(old), clock(new)) for _ in range(ROUNDS)]
    clocks = [[one[which][0] for one in rounds] for which in (0, 1)]
    return clocks, (rounds[-1][0][1], rounds[-1][1][1])


def _told(what: str, clocks: list[list[float]]) -> dict[str, float]:
    old, new = (statistics.median(some) for some in clocks)
    ratio = statistics.median(a / b for a, b in zip(*clocks, strict=True))
    return {f"{what}, old (CPU s)": old, f"{what}, new (CPU s)": new, f"{what}, times faster": ratio}


def write(folder: Path, shape: tuple[int, int], trained: bool) -> list[Checkpoint]:
    """Two files of one bfloat16 matrix, `w`: weights, and the weights after an update."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    weights = drawn(shape, trained, _DEVIATION, draw)
    save_file({"w": weights.bfloat16()}, folder / "in.safetensors")
    for part in weights.split(1 << 12):  # what the update is added to is what is stored
        part.copy_(part.bfloat16())
    weights += drawn(shape, trained, _DEVIATION * _STEP, draw)
    save_file({"w": weights.bfloat16()}, folder / "rl.safetensors")
    return [opened(folder / f"{stage}.safetensors") for stage in STAGES]


def drawn(
    shape: Sequence[int], trained: bool, deviation: float, draw: torch.Generator
) -> Float[Tensor, "row column"]:
    """Noise, and on it, where trained, singular values that fall as a power of their number."""
    found = torch.randn(*shape, generator=draw).mul_(deviation)
    rank, largest, power = _HEADS[trained]
    if rank:
        left, right = (torch.linalg.qr(torch.randn(side, rank, generator=draw))[0] for side in shape)
        edge = deviation * sum(side**0.5 for side in shape)  # the largest singular value of the noise
        found.addmm_(left * (edge * largest * torch.arange(1, rank + 1) ** -power), right.T)
    return found


def opened(file: Path) -> Checkpoint:
    """A file as a checkpoint of no model, of which tensors alone are read."""
    found = object.__new__(Checkpoint)
    found.folder, found.ties, found.counters = file.parent, {}, {}
    found.tensors = {
        key: Stored(((one.file, one.start, one.size),), one.shape, DTYPES[one.kind])
        for key, one in entries(file).items()
    }
    return found


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the outcome."""
    start = time.process_time()
    outcome = function()
    return time.process_time() - start, outcome


def reset_peak() -> None:
    """Sets the kernel's peak of resident memory back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), "--no-embedding" not in sys.argv), indent=1))
