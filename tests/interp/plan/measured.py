"""What a run really held, and what was planned: `python -m tests.interp.plan.measured KIND WIDTH LAYERS ROWS TOKENS`.

A process of its own, because the kernel counts pages of a whole process.
"""

from __future__ import annotations

import json
import sys

import torch

from interp.map import patch
from interp.metrics import LogitDifference
from interp.plan.maps import MapPlan
from interp.plan.structure import at_tokens, without_weights
from tests.interp.plan.kinds import models, prompts
from tests.real_size import peak

POINTS, ROLES = ("attn_out", "head", "mlp_out"), ("reasoning", "decision")


def main() -> None:
    """Prints both peaks, in bytes."""
    kind, width, layers, rows, tokens = sys.argv[1], *map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    recipient, donor = models(kind, width, layers)
    asked = prompts(kind, recipient, rows, tokens)
    metric = LogitDifference(torch.full((rows,), 30), torch.full((rows,), 50))
    planned = MapPlan(
        without_weights(recipient), metric.reads, 1, POINTS, ROLES, rows, at_tokens=at_tokens(recipient)
    )
    with torch.no_grad(), peak() as found:
        patch(recipient, asked, asked, metric, POINTS, ROLES, rows, False, donor=donor)
    work = planned.work(asked)
    print(json.dumps({"measured": found.most, "planned": work.peak, "items": dict(work.held)}))


if __name__ == "__main__":
    main()
