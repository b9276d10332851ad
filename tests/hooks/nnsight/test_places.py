"""Where nnsight serves a hook point: what is picked there is what HookedVLM shows, and what is put there acts alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from hooks.nnsight.names import Place
from hooks.nnsight.remote import native_places
from tests.architectures import build
from tests.hooks.reference import tolerance

POINTS = {"granite": "blocks.0.hook_attn_out", "gemma3n": "blocks.1.hook_resid_post"}
"""Multiplied by a number; parallel streams on the first axis."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "gemma3n" else n for n in POINTS]
)
@torch.no_grad()
def test_a_place_holds_what_its_point_shows(name: str) -> None:
    given = build(name)
    vlm, point = HookedVLM(given.model, inputs=given.inputs), POINTS[name]
    place = native_places(vlm.anatomy)[point]
    assert isinstance(place, Place)
    seen: list[Tensor] = []

    def doubled(module: Any, args: tuple, output: Any) -> Any:
        seen.append(place.pick(output).clone())
        return place.put(output, place.pick(output) * 2)

    _, cache = vlm.run_with_cache(given.inputs, [point])
    ours = vlm.run_with_hooks(given.inputs, [(point, lambda a, hook: a * 2)]).logits
    module = given.model.get_submodule(vlm.hook_points[point].module)
    handle = module.register_forward_hook(doubled)
    logits = given.model(**given.inputs).logits
    handle.remove()
    assert torch.equal(seen[0], cache[point])
    assert (logits - ours).abs().max() <= tolerance(ours)
    assert (logits - given.model(**given.inputs).logits).abs().max() > 100 * tolerance(ours)


@pytest.mark.parametrize(
    ("name", "point", "why"),
    [
        ("mllama", "blocks.1.hook_mlp_out", "no module gives it out"),
        ("mllama", "blocks.1.hook_cross_attn_out", "multiplied by the parameter"),
    ],
)
def test_what_no_module_gives_out_is_absent_there(name: str, point: str, why: str) -> None:
    given = build(name)
    anatomy = HookedVLM(given.model, inputs=given.inputs, check=False).anatomy
    assert why in str(native_places(anatomy)[point])
