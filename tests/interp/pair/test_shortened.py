"""A stand-in with fewer layers has every kind of layer that the whole has, and shows what one of them alone shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from interp.pair.agreement import entering, model_differences
from interp.pair.agreement.difference import settings
from interp.pair.agreement.shortened import shortened
from tests.families import tiny

SLIDING, FULL = "sliding_attention", "full_attention"


def gemma(**changed: Any) -> Gemma3ForCausalLM:
    """Twelve layers of two kinds, the last of a period of six being the other."""
    kind: Any = Gemma3TextConfig
    config = kind(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4096,
        layer_types=([SLIDING] * 5 + [FULL]) * 2,
    )
    for name, value in changed.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return Gemma3ForCausalLM(config)


def cut(one: Any, other: Any) -> list[dict[str, Any]]:
    ours, theirs = (dict(settings(model.config.to_dict())) for model in (one, other))
    return [{key[-1]: value for key, value in new.items()} for new in shortened(ours, theirs, [one, other])]


def test_every_kind_of_layer_is_kept():
    found = cut(gemma(), gemma())
    assert found == [{"num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL]}] * 2
    eight = [SLIDING] * 8 + [FULL] * 4
    (found, _) = cut(gemma(layer_types=eight), gemma(layer_types=eight))
    assert found["layer_types"] == [SLIDING] * 8 + [FULL]
    assert cut(gemma(), gemma(layer_types=eight)) == [
        {},
        {},
    ]  # the last layer alone is of the other kind in both


@pytest.mark.parametrize("layer", [5, 7, 11])
def test_what_one_layer_alone_does_otherwise_is_found(layer):
    types = ([SLIDING] * 5 + [FULL]) * 2
    types[layer] = FULL if types[layer] == SLIDING else SLIDING
    ids = torch.arange(24)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = entering(model_differences(gemma(), gemma(layer_types=types), inputs))
    assert found.name == "layer_types"


def test_the_rotary_embedding_of_the_rarer_layers_is_found():
    ids = torch.arange(24)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rope: Any = copy.deepcopy(gemma().config.rope_parameters)
    rope[FULL]["rope_theta"] *= 2
    (found,) = entering(model_differences(gemma(), gemma(rope_parameters=rope), inputs))
    assert found.name == f"rope_parameters.{FULL}.rope_theta"


def test_lists_of_layers_are_cut_where_the_layers_are():
    made = tiny("qwen2_5_vl").model
    made.config.vision_config.depth, made.config.text_config.num_hidden_layers = 8, 5
    made.config.vision_config.fullatt_block_indexes = [3, 7]
    made.config.text_config.layer_types = [FULL] * 5
    with torch.device("meta"):
        model = type(made)(made.config)
    found = cut(model, model)[0]
    assert found == {
        "depth": 4,
        "fullatt_block_indexes": [3],
        "num_hidden_layers": 2,
        "layer_types": [FULL] * 2,
    }
