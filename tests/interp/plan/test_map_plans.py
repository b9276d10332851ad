"""What is planned against what is then counted: FLOPs, operation by operation, of maps that are really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hooks import linears
from interp.map import patch
from interp.metrics import LogitDifference
from interp.plan.maps import MapPlan
from interp.plan.structure import at_tokens, without_weights
from interp.sweep.batch import BatchSweep
from interp.sweep.planned import PlannedSweep
from tests.benchmarks.floor import ALSO_COUNTED
from tests.interp.plan.kinds import KINDS, models, prompts
from tests.interp.plan.live import Live

FEW = ("attn_out", "head")
POINTS = ("attn_out", "mlp_out", "head", "vision", "projector")


def counted(run: Callable[[], Any]) -> int:
    """FLOPs of a run, attention's products too."""
    counter = FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def a_map(kind: str, n: int = 2, tokens: int = 40, points: tuple[str, ...] = FEW) -> tuple[Any, Any]:
    """A map of two prompts a batch, planned and ready to run."""
    recipient, donor = models(kind)
    asked = prompts(kind, recipient, n, tokens)
    metric = LogitDifference(torch.full((n,), 30), torch.full((n,), 50))
    roles = ["image", "decision"]
    planned = MapPlan(
        without_weights(recipient), metric.reads, 1, points, roles, 2, at_tokens=at_tokens(recipient)
    )

    def run() -> Any:
        return patch(recipient, asked, asked, metric, points, roles, 2, False, donor=donor)

    return planned.work(asked), run


@pytest.mark.parametrize("kind", KINDS[::2])
def test_flops_of_a_map(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers' own products, and of oneDNN's, which round the rows up: by an eighth at most."""
    work, run = a_map(kind)
    rounded = counted(run)
    monkeypatch.setattr(linears, "_ONEDNN", False)
    work, run = a_map(kind)
    assert work.flops == pytest.approx(counted(run), rel=0.02)
    assert rounded == pytest.approx(work.flops, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "gemma3", "qwen2_5_vl", "idefics3", "llava+olmo2", "llava+cohere2"])
@pytest.mark.filterwarnings("ignore:.*cannot be (taken up|resumed).*:UserWarning")
def test_flops_of_a_map_of_everything(kind: str) -> None:
    work, run = a_map(kind, 3, 60, ("resid_pre", "z", *POINTS))
    assert work.flops == pytest.approx(counted(run), rel=0.1)


def test_bytes_of_a_map() -> None:
    work, run = a_map("llava", 2, 200, ("attn_out",))
    with Live() as live:
        run()
    assert work.peak == pytest.approx(live.most, rel=0.25)


def test_a_planned_sweep_has_the_lanes_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    for kind in (BatchSweep, PlannedSweep):
        own = kind.grouped

        def grouped(self: Any, numbers: Any, own: Any = own) -> Any:
            unchanged, longer, lanes = own(self, numbers)
            told = [(span, [(number, edit.start) for number, edit in some]) for span, some in lanes]
            seen.append([type(self), unchanged, longer, told])
            return unchanged, longer, lanes

        monkeypatch.setattr(kind, "grouped", grouped)
    _, run = a_map("llava", 2)
    run()
    of = {kind: [rest for one, *rest in seen if one is kind] for kind in (BatchSweep, PlannedSweep)}
    assert of[BatchSweep] and of[BatchSweep][-1] == of[PlannedSweep][-1]
