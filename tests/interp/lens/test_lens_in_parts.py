"""Lenses of more prompts than there is memory for their streams."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from hooks import HookedVLM
from hooks.memory import memory_limit
from interp.decision import null_changes
from interp.lens import compare_lenses, logit_lens, streams
from interp.lens.tokens import Tokens
from interp.pair.pair import Pair
from interp.questions.tasks import sample


def test_in_little_memory_streams_of_few_prompts_exist_at_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the numbers, the words and which token is which are those of all prompts at once."""
    prompts = [
        pair.builder.build(example, "<think> 1 2 3 </think>")
        for example in sample("sum", 6, seed=0, split="map")
    ]
    nulls, targets = null_changes(pair), [5, 6, 7, 8, 9, 10]
    given: dict[str, Any] = {"where": "all", "progress": False}
    whole = (
        logit_lens(pair, prompts, targets=targets, **given),
        compare_lenses(pair, prompts, nulls=nulls, **given),
    )
    most: list[int] = []
    read = streams.read_streams

    def watched(vlm: HookedVLM, tokens: Tokens, *args: Any) -> Any:
        most.append(len(tokens.prompts))
        return read(vlm, tokens, *args)

    for name in ("compare", "logit_lens"):
        monkeypatch.setattr(import_module(f"interp.lens.{name}"), "read_streams", watched)
    taken = (pair.in_.n_layers + 1) * pair.in_.d_model * 4 * max(map(len, prompts))
    head = 3 * 4 * min(streams.CHUNK, max(map(len, prompts)) * pair.in_.n_logits)
    with memory_limit(8 * taken + head):
        some = (
            logit_lens(pair, prompts, targets=targets, **given),
            compare_lenses(pair, prompts, nulls=nulls, **given),
        )
    assert 1 <= max(most) < len(prompts) and len(most) > 6
    for one, other in zip(whole, some, strict=True):
        assert set(one.variables) == set(other.variables) and one.attrs == other.attrs
        for name, values in one.variables.items():
            if np.issubdtype(values.dtype, np.floating):
                size = max(1.0, float(np.abs(values).max()))
                np.testing.assert_allclose(other[name], values, rtol=0, atol=1e-5 * size, err_msg=name)
            elif name not in ("overlap", "same_top"):
                np.testing.assert_array_equal(other[name], values, err_msg=name)
    assert float(whole[1]["kl"].max()) > 1e-3
