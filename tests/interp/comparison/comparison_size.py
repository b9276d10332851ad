"""Three checkpoints with Qwen2.5-VL-7B's shapes (fewer layers), and what comparing them costs.

`python -m tests.interp.comparison.comparison_size FOLDER` measures in this process and prints JSON;
`write(FOLDER)` makes the checkpoints. Resident memory is the kernel's own peak (VmHWM: everything, the libraries'
file-backed pages too) and, of it, the peak of anonymous memory, polled. Files are read with read(), not mapped, so the
page cache is in neither.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from interp.comparison import Checkpoint, align
from interp.comparison.directions import directions
from interp.comparison.energy import energies
from interp.comparison.held import difference, held
from interp.comparison.singular_values import TOP
from interp.comparison.table import AT_ONCE, _spectral
from interp.comparison.workers import READERS, in_threads

STAGES = ("base", "in", "rl")
_STEPS = (0.02, 5e-4, 2e-5)  # standard deviation of Base's weights, of IN's update, of RL's
_SHARD = 2 << 30
_ROUNDS = 5
LAYER = "model.language_model.layers.3."


def config(n_layers: int = 6) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's, with fewer decoder layers: 6.3 GB in bfloat16."""
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=n_layers, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def write(folder: Path, n_layers: int = 6) -> None:
    """Base of random bfloat16 weights, IN and RL, each the one before and a random update; sharded."""
    for last, stage in enumerate(STAGES):
        (folder / stage).mkdir(parents=True)
        made = config(n_layers)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(made, dtype=torch.bfloat16)
        made.save_pretrained(folder / stage)
        index: dict[str, str] = {}
        shard: dict[str, torch.Tensor] = {}
        for i, (name, parameter) in enumerate(model.named_parameters()):
            shard[name] = _weights(i, parameter.shape, last)
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
                index |= _save(folder / stage, shard, len(set(index.values())))
        index |= _save(folder / stage, shard, len(set(index.values())))
        about = {"metadata": {}, "weight_map": index}
        (folder / stage / "model.safetensors.index.json").write_text(json.dumps(about))


def _weights(seed: int, shape: Sequence[int], last: int) -> torch.Tensor:
    """Sums of uniform draws of 256 values, a byte each: normal ones would take ten times as long."""
    found = torch.zeros(tuple(shape), dtype=torch.bfloat16)
    for step, scale in enumerate(_STEPS[: last + 1]):
        draw = np.random.Generator(np.random.SFC64([step, seed]))
        for part in found.view(-1).split(1 << 22):
            drawn = np.frombuffer(bytearray(draw.bytes(part.numel())), dtype=np.int8)
            part.copy_(part.float().add_(torch.from_numpy(drawn).float(), alpha=scale / 74))
    return found


def _save(folder: Path, shard: dict[str, torch.Tensor], number: int) -> dict[str, str]:
    name = f"model-{number + 1:05d}.safetensors"
    save_file(shard, folder / name, {"format": "pt"})
    names = dict.fromkeys(shard, name)
    shard.clear()
    return names


def measure(folder: Path) -> dict[str, Any]:
    """Seconds, bytes and errors, with resident memory after each part."""
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    found: dict[str, Any] = {"gigabytes each": size / 3e9, "load average": os.getloadavg()[0]}
    watch = Watch()
    checkpoints = [Checkpoint(folder / stage) for stage in STAGES]
    names = align(*checkpoints)
    found["VmHWM, opened (GB)"] = peak()
    _speeds(checkpoints, names, found)
    found["VmHWM, energy (GB)"] = peak()
    layer = [n for n in names if n.startswith(LAYER) and checkpoints[0].tensors[n].matrix]
    largest = "model.language_model.embed_tokens.weight"
    work = [(checkpoints[1], checkpoints[2], name, 0.01) for name in layer]
    clocks, ours = _clocks(lambda: [_spectral(TOP, 0, one) for one in work])
    found["spectra of a layer, one after the other (s: wall, CPU)"] = clocks
    found["untrusted"] = sum(row["n_untrusted"] for row in ours)
    some = [(checkpoints[1], checkpoints[2], name, 0.01) for name in (largest, *layer[-3:])]
    in_threads(partial(_spectral, TOP, 0), some, [1] * len(some), "spectra", False, 2, AT_ONCE["spectra"])
    found["VmHWM, spectra, two at once (GB)"] = peak()
    few = [(LAYER + f"mlp.{name}_proj.weight", (True, True)) for name in ("down", "up")]
    in_threads(
        partial(directions, checkpoints, 16), few, [1] * 2, "subspaces", False, 1, AT_ONCE["subspaces"]
    )
    found["VmHWM, subspaces, one at once (GB)"] = peak()
    found["RssAnon, peak (GB)"] = watch.stop()
    plain, error = _plain(checkpoints[1], checkpoints[2], layer, ours)
    found["torch.linalg.svdvals, one after the other (s: wall, CPU)"] = plain
    found["times faster (wall, CPU)"] = [b / a for a, b in zip(clocks, plain, strict=True)]
    found[f"largest relative error of the top {TOP}"] = error
    return found


def _speeds(checkpoints: Sequence[Checkpoint], names: Sequence[str], found: dict[str, Any]) -> None:
    """Reading the second shard of all three, and their energies; in turn, `_ROUNDS` times, cold and warm."""
    files = [checkpoint.folder / "model-00002.safetensors" for checkpoint in checkpoints]
    some = [name for name in names if checkpoints[0].tensors[name].pieces[0][0] == files[0]]
    size = sum(file.stat().st_size for file in files) / 1e9
    sizes = [checkpoints[0].tensors[name].entries for name in some]
    energy = partial(in_threads, partial(energies, checkpoints), some, sizes, "norms", False, READERS)
    for label in ("cold", "warm"):
        rows = []
        for _ in range(_ROUNDS):
            row = []
            for function in (partial(read, files), energy):
                if label == "cold":
                    forget(files)
                (wall, cpu), _ = _clocks(function)
                row += [size / wall, size / cpu]
            rows.append([*row, row[2] / row[0]])
        keys = (
            "reading (GB/s)",
            "reading (GB/CPU s)",
            "energy (GB/s)",
            "energy (GB/CPU s)",
            "energy / reading",
        )
        found |= {
            f"{key}, {label}": list(column)
            for key, column in zip(keys, zip(*rows, strict=False), strict=True)
        }


def _plain(
    before: Checkpoint, after: Checkpoint, layer: Sequence[str], ours: list[dict[str, Any]]
) -> tuple[list[float], float]:
    """Wall and CPU seconds of svdvals in float32 alone (reading is not counted), and our largest error against it."""
    total, errors = np.zeros(2), []
    for name, found in zip(layer, ours, strict=True):
        delta = torch.cat(
            list(difference(held(before, name), held(after, name), before.tensors[name].shape)())
        ).float()
        clocks, values = _clocks(partial(torch.linalg.svdvals, delta))
        total += clocks
        wanted = values[:TOP].double().numpy()
        errors.append(np.abs(np.exp(found["log_spectrum"]) * found["spectral_norm"] / wanted - 1).max())
    return total.tolist(), float(max(errors))


def read(files: Sequence[Path], threads: int = READERS) -> None:
    """All bytes once, a megabyte at a time, by as many threads as the energies have."""

    def whole(file: Path) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(whole, files))


def forget(files: Sequence[Path]) -> None:
    """Drops the files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _clocks(function: Callable[[], Any]) -> tuple[list[float], Any]:
    """Wall and CPU seconds, which tell an idle machine from a busy one, and the outcome."""
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = function()
    return [time.perf_counter() - wall, time.process_time() - cpu], outcome


def status(what: str) -> float:
    """A line of /proc/self/status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(what + ":"))


def peak() -> float:
    """Peak resident memory of this process so far, all of it."""
    return status("VmHWM")


class Watch:
    """Polls anonymous resident memory every 20 ms."""

    def __init__(self) -> None:
        self._highest, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self._highest = max(self._highest, status("RssAnon"))

    def stop(self) -> float:
        """The highest seen."""
        self._ended.set()
        self._thread.join()
        return self._highest


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1])), indent=1))
