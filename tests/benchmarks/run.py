"""Runs the benchmark: `python -m tests.benchmarks.run --out DIR`. Writes table.md, figure.png and results.json.

Times are CPU seconds of the process, on one thread: what the wall clock shows on an idle machine, and less disturbed on
a busy one. Arms take turns; a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from interp.prompts import collate
from tests.benchmarks.arms import ARMS, IN_THE_DECODER, SCANS, Arm, Site, donated, scan_sites
from tests.benchmarks.floor import ALSO_COUNTED, of_scan
from tests.benchmarks.models import FAMILIES, WITH_PEERS, Setting, build

SAMPLE = 12  # sites that the slow arms are timed on
REPEATS = 3


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--scans", nargs="+", default=list(SCANS), choices=list(SCANS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        family: family_results(build(family), arguments.scans, arguments.repeats)
        for family in arguments.families
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "table.md").write_text(table(results), encoding="utf-8")
    figure(results, arguments.out / "figure.png")
    print(table(results))


def sample(sites: list[Site], n: int = SAMPLE) -> list[int]:
    """Numbers of sites that are spread evenly over layers and tokens alike (a golden-ratio walk over the layers)."""
    by_layer: dict[int, list[int]] = {}
    for number, site in enumerate(sites):
        by_layer.setdefault(site.layer, []).append(number)
    layers = sorted(by_layer)
    picked = []
    for i in range(n):
        numbers = by_layer[layers[i % len(layers)]]
        picked.append(numbers[int((i * 0.6180339887) % 1 * len(numbers))])
    return picked


@torch.no_grad()
def family_results(setting: Setting, scans: list[str], repeats: int) -> dict[str, Any]:
    """Times, differences, memory and arithmetic of every scan and arm."""
    given = donated(setting)
    arms: dict[str, Arm] = {}
    missing: dict[str, str] = {}
    for name, make in ARMS.items():
        if name in IN_THE_DECODER and setting.family not in WITH_PEERS:
            missing[name] = f"peers are timed on {' and '.join(WITH_PEERS)}"
            continue
        try:
            arms[name] = make(setting, given)
        except ImportError as error:
            missing[name] = str(error).split(". ")[0]
    found: dict[str, Any] = {"missing": missing, "scans": {}}
    for scan in scans:
        outside = any(site.layer < 0 for site in SCANS[scan])
        able = {name: arm for name, arm in arms.items() if not (outside and name in IN_THE_DECODER)}
        found["scans"][scan] = scan_results(setting, scan, able, repeats)
        tqdm.write(f"{setting.family}: {scan}: {json.dumps(found['scans'][scan])}")
    return found


def scan_results(setting: Setting, scan: str, arms: dict[str, Arm], repeats: int) -> dict[str, Any]:
    """One scan: ours whole, the others on a sample of its sites, scaled."""
    sites = scan_sites(setting.family, scan)
    chosen = sample(sites)
    times: dict[str, list[float]] = {name: [] for name in arms}
    memory: dict[str, float] = {}
    values: dict[str, torch.Tensor] = {}
    for _ in tqdm(range(repeats), desc=f"{setting.family}: {scan}"):
        for name, arm in arms.items():
            whole = name == "ours"
            asked = sites if whole else [sites[i] for i in chosen]
            with Peak() as peak:
                start = time.process_time()
                result = arm(asked)
                took = time.process_time() - start
            times[name].append(took * (1 if whole else len(sites) / len(asked)))
            memory[name] = max(memory.get(name, 0.0), peak.mebibytes)
            values[name] = result[chosen] if whole else result
    clean = setting.metric(setting.vlm(collate(setting.prompts).inputs).logits, collate(setting.prompts))
    ran, unavoidable, forward = arithmetic(setting, sites, arms["ours"])
    flops = {"ours": ran, "plain hooks": forward * len(sites)}
    return {
        "sites": len(sites),
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "gflops_per_second": {
            name: statistics.median(count / took / 1e9 for took in times[name])
            for name, count in flops.items()
        },
        "rate_over_plain": statistics.median(
            [
                ran / mine / (flops["plain hooks"] / theirs)
                for mine, theirs in zip(times["ours"], times["plain hooks"], strict=True)
            ]
        ),
        "faster": {
            name: statistics.median([theirs / mine for theirs, mine in zip(t, times["ours"], strict=True)])
            for name, t in times.items()
        },
        "difference": {name: float((v - values["ours"]).abs().max()) for name, v in values.items()},
        "median_effect": float((values["plain hooks"] - clean).abs().median()),
        "peak_mebibytes": memory,
        "flops_run_over_unavoidable": ran / unavoidable,
    }


def arithmetic(setting: Setting, sites: list[Site], arm: Arm) -> tuple[int, int, int]:
    """Operations that our scan runs, those it cannot avoid, and those of a plain forward."""
    inputs = collate(setting.prompts).inputs
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
            setting.vlm(inputs, use_cache=False)
        clean = counter.get_total_flops()
        with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
            arm(sites)
    vocabulary = int(setting.vlm.model.config.get_text_config().vocab_size)
    return counter.get_total_flops(), of_scan(setting.family, sites, vocabulary, clean), clean


class Peak:
    """The most memory that the process gained while the context was open, sampled every 2 ms."""

    def __enter__(self) -> Peak:
        self._done, self._before, self._most = threading.Event(), _resident(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, _resident())

    @property
    def mebibytes(self) -> float:
        """Gained at most."""
        return max(0, self._most - self._before) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | scan | ours, s | plain hooks | TransformerLens | nnsight | largest difference | FLOPs run / "
        "unavoidable | GFLOP/s (ours / plain) | peak memory, MiB (ours / plain) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for family, found in results.items():
        for scan, row in found["scans"].items():
            ratios = [
                f"{row['faster'][name]:.{2 if row['faster'][name] < 2 else 1}f}x"
                if name in row["faster"]
                else "–"
                for name in ARMS
                if name != "ours"
            ]
            memory, rate = row["peak_mebibytes"], row["gflops_per_second"]
            lines.append(
                f"| {family} | {scan} ({row['sites']}) | {row['seconds']['ours']:.2f} | {' | '.join(ratios)} | "
                f"{max(row['difference'].values()):.0e} | {row['flops_run_over_unavoidable']:.2f} | "
                f"{rate['ours']:.0f} / {rate['plain hooks']:.0f} ({row['rate_over_plain']:.2f}) | "
                f"{memory['ours']:.0f} / {memory['plain hooks']:.0f} |"
            )
    notes = [
        f"Not run: {name} on {family} ({reason})."
        for family, found in results.items()
        for name, reason in found["missing"].items()
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """How many times faster, by scan and peer."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(3, len(results))
    down = -(-len(results) // across)
    fig, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.6 * down), sharey=True, squeeze=False)
    for axis, (family, found) in zip(axes.flat, results.items(), strict=False):
        _bars(axis, family, found)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for row in axes:
        row[0].set_ylabel("times faster than")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, frameon=False, fontsize=11, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def _bars(axis: Any, family: str, found: dict[str, Any]) -> None:
    scans, peers = list(found["scans"]), [name for name in ARMS if name != "ours"]
    there = [peer for peer in peers if peer not in found["missing"]]
    for k, peer in enumerate(there):
        heights = [found["scans"][scan]["faster"].get(peer, np.nan) for scan in scans]
        places = np.arange(len(scans)) + 0.27 * (k - (len(there) - 1) / 2)
        bars = axis.bar(places, heights, 0.25, label=peer, color=f"C{peers.index(peer)}")
        axis.bar_label(bars, fmt="%.2g", fontsize=8)
    axis.set_xticks(
        range(len(scans)), [scan.replace(", ", ",\n").replace(" x ", " x\n") for scan in scans], fontsize=8
    )
    axis.set_yscale("log")
    axis.set_title(family)
    axis.axhline(1, color="grey", lw=0.8)


if __name__ == "__main__":
    main()
