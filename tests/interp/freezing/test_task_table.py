"""Accuracies of retrained models by task, and how much of a model is frozen."""

import numpy as np

from hooks import HookedVLM
from interp.freezing import freeze, n_frozen
from interp.freezing.losses import Retrained, task_table
from tests.families import tiny


def test_the_accuracy_of_every_model_on_every_task() -> None:
    run = Retrained("Early", "region", 3, "blocks.0", 5, np.array([1.0, 0.0, 1.0, np.nan]), 0.0)
    given = np.array([1.0, 1.0, 0.0, 0.0])
    table = task_table([run], {"IN": given}, ["sum", "sum", "same", "same"])
    assert table.to_dict("records") == [
        {"model": "IN", "rl_seed": "", "sum": 1.0, "same": 0.0},
        {"model": "Early", "rl_seed": "3", "sum": 0.5, "same": 1.0},  # what has no grade does not count
    ]
    assert list(task_table([run], {}, [""] * 4)) == ["model", "rl_seed", "questions"]


def test_frozen_weights_are_counted_without_freezing_them() -> None:
    made = tiny("qwen2_5_vl")
    vlm = HookedVLM(made.model, made.processor, check=False)
    named = dict(vlm.model.named_parameters())
    layer = sum(p.numel() for name, p in named.items() if ".layers.1." in name and "visual" not in name)
    assert n_frozen(vlm, ["blocks.1"]) == layer > n_frozen(vlm, ["blocks.1.attn.head.1"]) > 0
    assert n_frozen(vlm, []) == 0
    assert all(parameter.requires_grad for parameter in named.values())
    frozen = freeze(vlm, ["blocks.1.attn.head.1"])
    report = frozen.report()
    frozen.release()
    assert report["frozen"].any()
