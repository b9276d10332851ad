"""What variants that write together really held, and what was planned:
`python -m tests.interp.plan.measured_variants KIND WIDTH LAYERS ROWS TOKENS`.

A process of its own, because the kernel counts pages of a whole process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import torch

from hooks import HookedVLM
from interp.plan.runs import Runs
from interp.plan.structure import without_weights
from interp.plan.variants import written_together
from interp.regions import thirds
from interp.transfer.grafts import Graft
from interp.transfer.outcomes import Texts
from interp.transfer.variants import orders
from interp.transfer.writing import Writing
from tests.interp.plan.kinds import models, prompts
from tests.real_size import peak

STEPS = 4


def mixtures(vlm: HookedVLM) -> Mapping[str, Sequence[Graft]]:
    """IN, and the mixtures of thirds."""
    return {"IN": (), **{one.name: one.grafts for one in orders(thirds(vlm.n_layers), vlm)}}


def main() -> None:
    """Prints both peaks, in bytes."""
    kind, width, layers, rows, tokens = sys.argv[1], *map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    recipient, donor = models(kind, width, layers)
    asked, runs = prompts(kind, recipient, rows, tokens), mixtures(recipient)
    texts = Texts(tuple(asked), STEPS, rows)
    with torch.no_grad(), peak() as found:
        Writing(recipient, donor, runs).written(texts)
    work = written_together(Runs(without_weights(recipient), rows), "together", runs, asked, STEPS)
    print(json.dumps({"measured": found.most, "planned": work.peak, "items": dict(work.held)}))


if __name__ == "__main__":
    main()
