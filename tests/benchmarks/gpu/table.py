"""The README's section of what was measured on a GPU, from the newest results: `python -m tests.benchmarks.gpu.table`.

It stands between two comments there, and a test holds it to the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NAMES = {"qwen2_5_vl": "Qwen2.5-VL-7B", "qwen3_vl": "Qwen3-VL-8B", "llama": "Llama-3.1-8B"}
SCANS = ("head map", "residual map", "attribution", "head scan")


def main() -> int:
    """Writes the section into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replaced(text, section(newest(RESULTS))), encoding="utf-8")
    return 0


def newest(folder: Path) -> dict[str, Any] | None:
    """The latest results of a GPU in full; None where there are none."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["shape"] == "full" and found["device"] != "cpu":
            return found
    return None


def replaced(text: str, own: str) -> str:
    """The README with the section replaced."""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    made, n = pattern.subn(lambda _: own, text)
    if n != 1:
        raise ValueError(f"the README holds {n} sections between {BEGIN} and {END}")
    return made


def section(found: Mapping[str, Any] | None) -> str:
    """What the README says of results, or of their absence."""
    if found is None:
        return (
            "No figures are recorded yet: no GPU was at hand. All steps run on a CPU at tiny sizes (`python -m\n"
            "tests.benchmarks.gpu --out out/gpu --shape tiny --device cpu`), which says nothing of their speed.\n"
        )
    lines = [_about(found), "", *_rows(found), "", *_others(found)]
    return "\n".join(lines) + "\n"


def _about(found: Mapping[str, Any]) -> str:
    memory = f", {found['memory_gib']:.0f} GiB" if "memory_gib" in found else ""
    return (
        f"Measured on {found['date']} on {found['device']}{memory}, PyTorch {found['torch']}, transformers "
        f"{found['transformers']}."
    )


def _rows(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "| model | what | sites | s | one forward each, s | share of the floor | peak, GiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, steps in found["steps"].items():
        for name in SCANS:
            step = steps.get(name)
            if step is None or model not in NAMES:
                continue
            if "error" in step:
                lines.append(
                    f"| {NAMES[model]} | {name} | – | did not run: {_short(step['error'])} | – | – | – |"
                )
                continue
            of = "" if step.get("sites") == step.get("of_sites") else f" of {step['of_sites']}"
            each = step.get("forwards_one_by_one_s")
            sites = step.get("sites", step.get("components"))
            lines.append(
                f"| {NAMES[model]} | {name} | {sites}{of} | {step['seconds']:.1f} | "
                f"{'–' if each is None else f'{each:.0f}'} | {step['share_of_floor']:.2f} | "
                f"{step.get('peak_gib', float('nan')):.1f} |"
            )
    return lines


def _others(found: Mapping[str, Any]) -> list[str]:
    """Opening and forward of each model, and which exactness held."""
    lines = []
    for model, steps in found["steps"].items():
        if model in NAMES and all(
            "error" not in steps.get(one, {"error": ""}) for one in ("opening", "forward")
        ):
            times, opening = steps["forward"]["times_plain"], steps["opening"]
            lines.append(
                f"- {NAMES[model]}: opened in {opening['seconds']:.1f} s; a forward of "
                f"{steps['weights']['tokens']} tokens takes {1000 * steps['forward']['seconds']:.0f} ms "
                f"({steps['forward']['tflop_per_s']:.0f} TFLOP/s), {times['nothing attached']:.2f} times that with "
                f"nothing attached, {times['cached']:.2f} times with the stream of all layers cached."
            )
    exact = [(g, n, s) for g in ("exactness", "devices") for n, s in found["steps"].get(g, {}).items()]
    held = [n for _, n, s in exact if "error" not in s]
    lines.append(
        f"- Exact (bit-identical with nothing attached; interventions as one forward each): {', '.join(held)}."
    )
    lines += [f"- Not so: {n}: {_short(s['error'])}" for _, n, s in exact if "error" in s]
    return lines


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


if __name__ == "__main__":
    sys.exit(main())
