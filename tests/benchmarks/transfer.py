"""Variants that write together against as many greedy passes: `python -m tests.benchmarks.transfer FAMILY`.

IN, and eight variants that touch decoder blocks alone (mixtures of thirds, and controls), as `transfer` runs them,
against nine greedy passes. Both arms put the grafts in, and run in turn in one process; CPU time, medians. Prints the
ratio, and what share of a pass is what.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from hooks import HookedVLM
from interp.pair.generation import greedy
from interp.prompts import collate
from interp.regions import thirds
from interp.transfer.grafts import grafted
from interp.transfer.outcomes import Texts
from interp.transfer.prefixes import sharing
from interp.transfer.variants import Variant, controls, orders
from interp.transfer.writing import Writing
from tests.benchmarks.models import build
from tests.families import redraw

TURNS = 3
STEPS, VISION_LAYERS = {"llava": 29, "qwen2_5_vl": 29}, {"llava": 8, "qwen2_5_vl": 2}
"""With these, about 18 % of a pass is vision, 41 % the decoder on the prompt, and 41 % what is written."""


def variants(vlm: HookedVLM, donor: HookedVLM) -> list[Variant]:
    """The six mixtures, and two controls."""
    mixed = orders(thirds(vlm.n_layers), vlm)
    beside = [one for one in mixed if one.name in ("I:I:R", "I:R:R")]
    return [*mixed, *controls(beside[:1], thirds(vlm.n_layers), ["random", "layers"])]


def cpu(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time, and what came of it."""
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def measured(family: str) -> dict[str, float]:
    """Shares of a pass, and the time of variants together as a part of the time of each alone."""
    setting = build(family, VISION_LAYERS[family])
    vlm, steps = setting.vlm, STEPS[family]
    other = copy.deepcopy(vlm.model)
    redraw(other, 1)
    builder = setting.prompts[0].builder
    for model in (vlm.model, other):
        with torch.no_grad():  # nobody stops early
            model.get_parameter(f"{vlm.anatomy.unembed}.weight")[list(builder.end_ids)] = 0
    donor = HookedVLM(other, vlm.processor)
    runs = {"IN": (), **{one.name: one.grafts for one in variants(vlm, donor)}}
    texts = Texts((*setting.prompts, *setting.donors) * 2, steps, len(setting.prompts))
    names = sharing(vlm, runs)
    assert set(names) == set(runs) and len(runs) == 9

    def alone() -> dict[str, list[list[int]]]:
        found = {}
        for name in names:
            with grafted(vlm, donor, runs[name]) if runs[name] else nullcontext():
                found[name] = texts.written(vlm)
        return found

    def together() -> dict[str, list[list[int]]]:
        return Writing(vlm, donor, {name: runs[name] for name in names}).written(texts)

    inputs = collate(texts.prompts, "left").inputs
    vision = vlm.module(vlm.anatomy.vision.path)

    def front() -> None:
        given = {"llava": lambda: vision(inputs["pixel_values"]).last_hidden_state}
        rest = {"qwen2_5_vl": lambda: vision(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])}
        with torch.no_grad():
            (given | rest)[family]()

    one = {
        "vision": front,
        "prefill": lambda: greedy(vlm, texts.prompts, 1, texts.batch_size),
        "pass": lambda: texts.written(vlm),
    }
    times: dict[str, list[float]] = {name: [] for name in (*one, "alone", "together")}
    for _ in range(TURNS):
        for name, run in one.items():
            times[name].append(cpu(run)[0])
        took, expected = cpu(alone)
        times["alone"].append(took)
        took, found = cpu(together)
        times["together"].append(took)
        assert found == expected
        assert len({str(some) for some in found.values()}) > 4  # variants differ
    median = {name: statistics.median(some) for name, some in times.items()}
    return {
        "vision of a pass": median["vision"] / median["pass"],
        "prefill (with vision) of a pass": median["prefill"] / median["pass"],
        "together of alone": median["together"] / median["alone"],
    }


def main() -> None:
    """Prints what was measured."""
    torch.set_num_threads(1)
    print(json.dumps(measured(sys.argv[1])))


if __name__ == "__main__":
    main()
