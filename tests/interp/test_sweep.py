"""The sweep engine against one full forward per intervention and prompt, with the edit written as a plain hook here."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooks import FrankenlensError, HookedVLM
from hooks.engine import head_results
from interp.examples import Example
from interp.metrics import AnswerLogProbability, LogitDifference, TraceLogLikelihood
from interp.prompts import PromptBuilder, collate
from interp.roles import TraceFormat
from interp.sweep import Intervention, sweep
from interp.sweep.batch import BatchSweep
from interp.sweep.engine import parse_bytes
from interp.sweep.intervention import bind, where_mask
from tests.families import FAMILIES, QWEN, redraw, tiny

QUESTIONS = ("how many red", "what shape in row 2 is there", "what color is the star")
TRACES = (
    "<think> red 3 , blue 2 </think> answer 5",
    "<think> red </think> answer 2",
    "<think> 3 </think> answer 4 1",
)
METRICS = ("last", "trace", "answer")


class Duo:
    """A tiny model, its redrawn copy as donor, and three prompts of different lengths and images."""

    def __init__(self, family: str) -> None:
        self.given = tiny(family)
        other = copy.deepcopy(self.given.model)
        redraw(other, seed=7)
        inputs = self.given.inputs()
        self.recipient = HookedVLM(self.given.model, inputs=inputs)
        self.donor = HookedVLM(other, inputs=inputs)
        builder = PromptBuilder(self.given.processor, TraceFormat(answer=("answer", None)))
        images = self.given.images(4)
        shown = [(images[0],), (images[1],), (images[2], images[3])]
        self.prompts = [
            builder.build(Example(f"e{i}", shown[i], QUESTIONS[i], "5"), TRACES[i]) for i in range(3)
        ]
        n = len(self.prompts)
        self.metrics = {
            "last": LogitDifference(torch.arange(n) + 30, torch.arange(n) + 40),
            "trace": TraceLogLikelihood(),
            "answer": AnswerLogProbability(),
        }

    def expected(self, intervention: Intervention) -> np.ndarray:
        """[metric example], one prompt at a time, unpadded, by one hook on a full forward."""
        found = np.full((len(self.metrics), len(self.prompts)), np.nan)
        for row, prompt in enumerate(self.prompts):
            batch = collate([prompt])
            where = where_mask(intervention.where, batch)
            text = self.recipient.hook_points[intervention.hook].axes[0] == "batch"
            if text and not where.any():
                continue
            with torch.no_grad():
                hook = self._hook(intervention, batch, where)
                logits = self.recipient.run_with_hooks(batch.inputs, [(intervention.hook, hook)]).logits
            for number, metric in enumerate(self.metrics.values()):
                found[number, row] = float(metric.select([row])(logits, batch)[0])
        return found

    def _hook(self, i: Intervention, batch: Any, where: torch.Tensor) -> Any:
        tokens = where[0].nonzero()[:, 0]
        with torch.no_grad():
            _, donated = self.donor.run_with_cache(batch.inputs, i.hook)
            _, pre = self.recipient.run_with_cache(batch.inputs, f"blocks.{self._layer(i)}.hook_resid_pre")
        (before,) = pre.values()

        def new(own: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
            if i.kind == "replace":
                return donor if i.value is None else torch.zeros_like(own) + i.value
            if i.kind in ("add", "scale"):
                return own + i.value if i.kind == "add" else own * i.value
            return before if i.kind == "skip" and i.hook.endswith("post") else torch.zeros_like(own)

        def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            out, other = activation.clone(), donated[i.hook]
            if hook.point.axes[0] != "batch":
                return new(out, other)
            if i.kind == "knockout":
                assert i.source is not None
                keys = where_mask(i.source, batch)[0].nonzero()[:, 0]
                heads = range(out.shape[1]) if i.index is None else [i.index]
                for head in heads:
                    for query in tokens:
                        out[0, head, query, keys] = -torch.inf
            elif hook.point.axes[-1] == "key":
                heads = slice(None) if i.index is None else slice(i.index, i.index + 1)
                out[:, heads, tokens] = new(activation, other)[:, heads, tokens]
            elif i.index is None:
                out[:, tokens] = new(activation, other)[:, tokens]
            elif hook.point.axes[-1] == "d_mlp":
                out[:, tokens, i.index] = new(activation, other)[:, tokens, i.index]
            else:
                out[:, tokens, i.index] = new(activation, other)[:, tokens, i.index]
            return out

        return write

    def _layer(self, i: Intervention) -> int:
        layer = self.recipient.hook_points[i.hook].layer
        return 0 if layer is None else min(layer, self.recipient.n_layers - 1)

    def tolerance(self) -> float:
        """1e-5 x the largest logit, times the tokens that a metric adds up."""
        with torch.no_grad():
            largest = max(
                float(self.recipient(collate([prompt]).inputs).logits.abs().max()) for prompt in self.prompts
            )
        return 1e-5 * max(1.0, largest) * 10


_DUOS: dict[str, Duo] = {}


def duo(family: str) -> Duo:
    if family not in _DUOS:
        _DUOS[family] = Duo(family)
    return _DUOS[family]


def interventions_of(vlm: HookedVLM) -> list[Intervention]:
    """Every text hook point of blocks 0 and 2 and every kind, on tokens of all sorts."""
    places: list[Any] = ["all", "question", "image", "reasoning", "decision", 3, -2]
    found: list[Intervention] = []
    for number, name in enumerate(vlm.hook_points):
        point = vlm.hook_points[name]
        text = point.axes[0] == "batch"
        if not text and name != "projector.hook_out" and not name.endswith("0.hook_resid_post"):
            continue
        if point.layer == 1 and "resid" not in name:
            continue
        where = places[number % len(places)] if text else "all"
        split = text and any(axis in point.axes for axis in ("head", "kv_head", "d_mlp"))
        indices = [None, 1] if split else [None]
        for index in indices:
            found.append(Intervention(name, "replace", where, index))
            found.append(Intervention(name, "scale", places[(number + 1) % 7] if text else "all", index, 0.5))
            if point.leaf != "hook_attn_scores":
                found.append(Intervention(name, "zero", where, index))
            if point.axes[-1] != "key":
                found.append(Intervention(name, "add", where, index, 0.7))
    for layer in (0, 2):
        scores = f"blocks.{layer}.attn.hook_attn_scores"
        found.append(Intervention(scores, "knockout", "reasoning", None, source="image"))
        found.append(Intervention(scores, "knockout", "decision", 2, source="question"))
        for leaf in ("hook_attn_out", "hook_mlp_out", "hook_resid_post"):
            found.append(Intervention(f"blocks.{layer}.{leaf}", "skip", "all"))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_at_every_point_is_one_full_forward_each(family: str) -> None:
    pair = duo(family)
    wanted = interventions_of(pair.recipient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sweep(
            pair.recipient, pair.prompts, wanted, pair.metrics, donor=pair.donor, batch_size=3, progress=False
        )
    moved = []
    for number, intervention in enumerate(wanted):
        expected = pair.expected(intervention)
        got = found.value.values[:, number]
        np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(expected[0]), err_msg=intervention.name)
        np.testing.assert_allclose(got, expected, rtol=0, atol=pair.tolerance(), err_msg=intervention.name)
        moved.append(float(np.nanmax(np.abs(expected - found.clean.values))))
    assert np.median(moved) > 100 * pair.tolerance()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_sites(family: str, data: st.DataObject) -> None:
    pair = duo(family)
    names = [name for name, point in pair.recipient.hook_points.items() if point.axes[0] == "batch"]
    draw = data.draw
    wanted = []
    for _ in range(3):
        name = draw(st.sampled_from(names))
        axes = pair.recipient.hook_points[name].axes
        split = any(axis in axes for axis in ("head", "kv_head", "d_mlp"))
        index = draw(st.sampled_from([None, 0, 1])) if split else None
        kind, value = draw(st.sampled_from([("replace", None), ("scale", 0.3), ("scale", 2.0)]))
        wanted.append(Intervention(name, kind, draw(st.integers(-20, 40)), index, value))
    found = sweep(
        pair.recipient, pair.prompts, wanted, pair.metrics, donor=pair.donor, batch_size=2, progress=False
    )
    for number, intervention in enumerate(wanted):
        expected = pair.expected(intervention)
        np.testing.assert_allclose(
            found.value.values[:, number], expected, rtol=0, atol=pair.tolerance(), err_msg=intervention.name
        )
