"""Spectra and subspaces of the matrices of a 7B's layer, against the decompositions they replace, in one process.

`python -m tests.benchmarks.comparison FOLDER` writes matrices to the folder, measures and prints JSON. Times are CPU
seconds of this process, old and new in turn, medians; both read the files, the old way anew for each pass, as it did.
Differences are relative, to float64; memory is the kernel's peak of resident memory (VmHWM) while the new way runs in
a process of its own, after it was set back (/proc/self/clear_refs).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from hooks.stored.checkpoint import Checkpoint
from hooks.stored.files import entries
from interp.comparison.directions import directions
from interp.comparison.held import difference, held
from interp.comparison.singular_values import TOP, Spectrum, blockwise
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
IN_A_LAYER = {"q_proj, trained": 2, "up_proj, trained": 2, "down_proj, trained": 1}
"""How many matrices of a layer have the shape of each; keys and values, a seventh of the queries, take no time."""
PARTS = ("spectra", "subspaces")
LARGEST = ("embedding, trained", (WORDS, WIDTH), True)
_DEVIATION, _STEP = 0.02, 1e-3  # of the weights; of the update, relative to them
_HEADS = {True: (256, 4.0, 0.35), False: (0, 0.0, 0.0)}  # rank, largest beside the noise's, power of the fall


def measure(folder: Path, largest: bool = True) -> dict[str, Any]:
    """Ratios, differences and gigabytes of every case; each is told on standard error when it is known."""
    found: dict[str, Any] = {}
    for name, (shape, trained) in CASES.items():
        checkpoints = write(folder, shape, trained)
        found[name] = _case(checkpoints, shape)
        print(name, found[name], file=sys.stderr, flush=True)
    found["a layer"] = _layer(found)
    if largest:
        name, shape, trained = LARGEST
        checkpoints = write(folder, shape, trained)
        seconds, spectrum = clock(lambda: _spectrum(checkpoints, shape))
        found[name] = {"spectra, new (CPU s)": seconds, "spectrum_method": spectrum.method}
        change = _change(spectrum)
        seconds, row = clock(lambda: _row(checkpoints, change))
        found[name] |= {"subspaces, new (CPU s)": seconds, "method": row["subspace_method"]}
        found[name] |= _peaks(checkpoints, shape, change)
    return found


def _case(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> dict[str, Any]:
    before, after = (partial(_as_before, one) for one in checkpoints)
    delta = partial(_difference_before, checkpoints)
    rounds: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for _ in range(ROUNDS):
        old, _ = clock(lambda: exact.spectrum(delta, shape))
        new, spectrum = clock(lambda: _spectrum(checkpoints, shape))
        rounds["spectra"].append((old, new))
        change = _change(spectrum)
        old, exactly = clock(lambda: exact.angles(before, after, shape, K))
        new, row = clock(lambda change=change: _row(checkpoints, change))
        rounds["subspaces"].append((old, new))
    reference = exact.in_double(delta, shape)
    pairs = zip(numbers(spectrum), numbers(reference), strict=True)
    told = {"spectrum_method": spectrum.method, "method": row["subspace_method"]}
    for part, some in rounds.items():
        old, new = (statistics.median(each) for each in zip(*some, strict=True))
        told |= {f"{part}, old (CPU s)": old, f"{part}, new (CPU s)": new}
        told |= {f"{part}, times faster": statistics.median(one / two for one, two in some)}
    told["spectra, worst difference"] = max(abs(ours / theirs - 1) for (_, ours), (_, theirs) in pairs)
    told["subspaces, worst difference"] = max(abs(row[key] / value - 1) for key, value in exactly.items())
    return told | _peaks(checkpoints, shape, change)


def _layer(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """All matrices of one, medians added up."""
    seconds = {
        f"{part}, {arm}": sum(n * found[name][f"{part}, {arm} (CPU s)"] for name, n in IN_A_LAYER.items())
        for part in PARTS
        for arm in ("old", "new")
    }
    ratios = {f"{part}, times faster": seconds[f"{part}, old"] / seconds[f"{part}, new"] for part in PARTS}
    old, new = (sum(seconds[f"{part}, {arm}"] for part in PARTS) for arm in ("old", "new"))
    return {"old (CPU s)": old, "new (CPU s)": new, "times faster": old / new} | ratios


def _as_before(checkpoint: Checkpoint) -> Iterator[Float[Tensor, "long short"]]:
    """As the old way read them: from the file, as often as they are gone through."""
    for block in checkpoint.blocks("w", 1 << 20):
        yield block.float()


def _difference_before(checkpoints: Sequence[Checkpoint]) -> Iterator[Float[Tensor, "long short"]]:
    for one, two in zip(*map(_as_before, checkpoints), strict=True):
        yield two - one


def numbers(found: Spectrum) -> list[tuple[str, float]]:
    """All that is printed of a spectrum, and the ratios themselves rather than their logarithms."""
    some = [("spectral", found.values[0]), ("nuclear", found.values.sum()), ("stable", found.stable_rank)]
    some += [("effective", found.effective_rank), ("volume", found.log_volume())]
    return some + [(f"ratio {i}", float(np.exp(one))) for i, one in enumerate(found.log_ratios(TOP))]


def _spectrum(checkpoints: Sequence[Checkpoint], shape: tuple[int, int]) -> Spectrum:
    before, after = (held(one, "w") for one in checkpoints)
    return blockwise(difference(before, after, shape), shape, 1.0)


def _change(found: Spectrum) -> float:
    """As `compare` hands it on."""
    return 1.001 * float(found.values[0])


def _row(checkpoints: Sequence[Checkpoint], change: float) -> dict[str, Any]:
    return directions(checkpoints, K, ("w", (change,)))[0]


def _peaks(checkpoints: Sequence[Checkpoint], shape: tuple[int, int], change: float) -> dict[str, float]:
    return {
        "spectra, VmHWM (GB)": _peak_alone(_spectrum, checkpoints, shape),
        "subspaces, VmHWM (GB)": _peak_alone(_row, checkpoints, change),
    }


def _peak_alone(function: Callable[..., Any], *given: Any) -> float:
    """In a process of its own: what the old way left behind is not in it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, function, *given).result()


def _peak(function: Callable[..., Any], *given: Any) -> float:
    torch.set_num_threads(1)
    reset_peak()
    function(*given)
    return peak()


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
    found.tensors = {key: one.stored for key, one in entries(file).items()}
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
