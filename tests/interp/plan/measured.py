"""What a run really held, and what was planned.

`python -m tests.interp.plan.measured WHAT KIND WIDTH LAYERS ROWS TOKENS`

A process of its own, because the kernel counts pages of a whole process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hooks import HookedVLM
from interp.knockout import Knockout, routes, windows
from interp.lens import logit_lens
from interp.map import patch
from interp.metrics import LogitDifference
from interp.pair.generation import greedy
from interp.plan.lenses import LensPlan
from interp.plan.maps import MapPlan
from interp.plan.routes import RoutesPlan
from interp.plan.runs import Runs
from interp.plan.structure import at_tokens, without_weights
from interp.plan.work import Work
from interp.prompts import Prompt
from tests.interp.plan.kinds import models, prompts
from tests.real_size import peak

POINTS, ROLES = ("attn_out", "head", "mlp_out"), ("reasoning", "decision")
WRITTEN = 24
Both = tuple[Work, Callable[[], Any]]
"""What is planned, and what is run."""


def a_map(recipient: HookedVLM, donor: HookedVLM, asked: Sequence[Prompt], rows: int) -> Both:
    metric = LogitDifference(torch.full((rows,), 30), torch.full((rows,), 50))
    planned = MapPlan(
        without_weights(recipient), metric.reads, 1, POINTS, ROLES, rows, at_tokens=at_tokens(recipient)
    )
    run = (recipient, asked, asked, metric, POINTS, ROLES, rows, False)
    return planned.work(asked), lambda: patch(*run, donor=donor)


def a_knockout(recipient: HookedVLM, donor: HookedVLM, asked: Sequence[Prompt], rows: int) -> Both:
    metric = LogitDifference(torch.full((rows,), 30), torch.full((rows,), 50))
    ways = (Knockout("image", "reasoning"), Knockout("question", "reasoning"), Knockout("image", "question"))
    cuts = {one.edges: windows(one, recipient.n_layers, 3) for one in ways}
    planned = RoutesPlan(without_weights(recipient), metric.reads, cuts, rows, at_tokens(recipient))
    pair: Any = SimpleNamespace(in_=recipient, rl=donor)
    run = (pair, asked, cuts, metric)
    return planned.work(asked), lambda: routes(*run, batch_size=rows, progress=False)


def a_lens(recipient: HookedVLM, donor: HookedVLM, asked: Sequence[Prompt], rows: int) -> Both:
    planned = LensPlan(Runs(without_weights(recipient), rows // 2)).spelt(asked)
    run = {"where": "all", "top_k": 1, "batch_size": rows // 2, "progress": False}
    return planned, lambda: logit_lens(recipient, asked, **run)


def a_text(recipient: HookedVLM, donor: HookedVLM, asked: Sequence[Prompt], rows: int) -> Both:
    planned = Runs(without_weights(recipient), rows).written("texts", asked, [WRITTEN] * rows)
    return planned, lambda: greedy(recipient, asked, WRITTEN, rows)


WAYS = {"map": a_map, "knockout": a_knockout, "lens": a_lens, "greedy": a_text}


def main() -> None:
    """Prints both peaks, in bytes."""
    what, kind, (width, layers, rows, tokens) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:7])
    torch.set_num_threads(1)
    recipient, donor = models(kind, width, layers)
    asked = prompts(kind, recipient, rows, tokens)
    work, run = WAYS[what](recipient, donor, asked, rows)
    with torch.no_grad(), peak() as found:
        run()
    print(json.dumps({"measured": found.most, "planned": work.peak, "items": dict(work.held)}))


if __name__ == "__main__":
    main()
