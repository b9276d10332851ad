"""What Table 3 counts as unread: replies of which nothing could be read, not questions that were left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.retraining import table_3
from experiments.retraining.table_3 import PaperRecipe
from hooks import HookedVLM
from interp.transfer.outcomes import Outcomes, Together


def test_questions_left_out_are_no_replies(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    nan = float("nan")
    vis = Outcomes(("a", "b", "c"), ("",) * 3, (1.0, 0.0, nan), ("", "no answer", "no image"))
    rea = Outcomes(("d", "e"), ("",) * 2, (0.0, nan), ("cut off at 8 tokens", "no key"))
    found = Together(("M_vis", "M_rea"), lambda vlm: {"M_vis": vis, "M_rea": rea})
    recipe: Any = object.__new__(PaperRecipe)
    for name in ("builder", "max_new_tokens", "batch_size"):
        object.__setattr__(recipe, name, None)
    object.__setattr__(recipe, "asked", {})
    monkeypatch.setattr(table_3, "table_2_metrics", lambda *args, **kwargs: found)
    monkeypatch.setattr(
        PaperRecipe,
        "recorded",
        lambda self, checkpoint, kept, questions, made: made(object.__new__(HookedVLM)),
    )
    outcome = recipe.measure(tmp_path, tmp_path / "kept.json")
    np.testing.assert_array_equal(outcome.right, [1, 0, nan, 0, nan])
    assert outcome.unreadable == pytest.approx(2 / 3)  # of three replies
