"""Lockstep against the two models generating one after the other, in a process without the tests' type checks."""

import json
import time

import numpy as np
import torch

from experiments import embedded
from interp.lockstep import Moved, lockstep
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.tasks import sample

MOVED = {
    "nothing": (),
    "all MLPs, a head and the final norm": Moved(("blocks.0-8.mlp", "blocks.3.attn.head.1", "ln_final")),
    "everything": Moved(("blocks.0-8", "ln_final", "unembed")),
}
ROUNDS = 9


def measured() -> dict[str, float]:
    """Speed of lockstep over that of `greedy` of both: interleaved, ratio of medians of CPU time (which other work on
    the machine hardly moves)."""
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    prompts = [pair.builder.build(e) for task in ("sum", "same") for e in sample(task, 32, 9, "map")]
    times: dict[str, list[float]] = {name: [] for name in ("apart", *MOVED)}
    for _ in range(ROUNDS):
        start = time.process_time()
        for vlm in (pair.in_, pair.rl):
            greedy(vlm, prompts, 32)
        times["apart"].append(time.process_time() - start)
        for name, moved in MOVED.items():
            start = time.process_time()
            lockstep(pair.rl, pair.in_, prompts, moved, 32)
            times[name].append(time.process_time() - start)
    return {name: float(np.median(times["apart"]) / np.median(times[name])) for name in MOVED}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured()))
