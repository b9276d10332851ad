"""One checkpoint saved in many ways is a pair with itself; one that computes something else is not, and says what.

What is right is said by transformers: with the same weights, its own model gives the same logits bit for bit under
every spelling, and others under every real difference that a short prompt shows.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.pair import Pair
from interp.pair.agreement import entering, model_differences, processor_differences
from tests.families import TinyVLM, tiny

Config = dict[str, Any]
CLASS = "Qwen2_5_VLForConditionalGeneration"


def flat(config: Config) -> Config:
    """As it lies on the hub: settings of the text at the top, the rotary embedding in the names of 2024."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    config["vision_config"].pop("rope_parameters")
    config["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 4, "model_type": "qwen2_5_vl"}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {
        **config,
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "torch_dtype": config.pop("dtype"),
        "transformers_version": "4.41.2",
        "vision_token_id": 3,
    }


def saved_by_4_49(config: Config) -> Config:
    scaling = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}
    return flat(config) | {"rope_scaling": scaling, "transformers_version": "4.49.0"}


def saved_by_4_52(config: Config) -> Config:
    """Everything doubled into `text_config`."""
    config = saved_by_4_49(config)
    doubled = {name: value for name, value in config.items() if name != "vision_config"}
    return config | {"text_config": doubled | {"model_type": "qwen2_5_vl_text", "architectures": [CLASS]}}


def saved_by_4_57(config: Config) -> Config:
    """`rope_theta` and `rope_scaling` inside `text_config`."""
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope["rope_theta"]
    config["text_config"]["rope_scaling"] = {
        "rope_type": "default",
        "type": "default",
        "mrope_section": [2, 1, 1],
    }
    return config | {"dtype": "float32", "transformers_version": "4.57.1"}


def adding(**top: Any) -> Callable[[Config], Config]:
    return lambda config: {**config, **top}


def in_text(**text: Any) -> Callable[[Config], Config]:
    return lambda config: {**config, "text_config": config["text_config"] | text}


def in_vision(**vision: Any) -> Callable[[Config], Config]:
    return lambda config: {**config, "vision_config": config["vision_config"] | vision}


SPELLINGS: dict[str, Callable[[Config], Config]] = {
    "hub": flat,
    "4.49": saved_by_4_49,
    "4.52": saved_by_4_52,
    "4.57": saved_by_4_57,
    "unsloth": adding(unsloth_version="2025.3.1", unsloth_fixed=True, unsloth_optimized=True),
    "autoset": adding(_attn_implementation_autoset=True, _flash_attn_2_enabled=False),
    "auto_map": adding(auto_map={"AutoModel": "modeling_own.Own"}),
    "quantization null": adding(quantization_config=None),
    "torchscript": adding(torchscript=True, pruned_heads={}, bad_words_ids=None, top_k=50),
    "trainer": adding(freeze_vision=True, tune_mm_mlp_adapter=False, lora_enable=False, problem_type=None),
    "top-level leftovers": adding(hidden_size=999, rms_norm_eps=0.5, sliding_window=3, vocab_size=12),
    "cache": in_text(use_cache=False, output_attentions=False),
    "training": in_text(attention_dropout=0.3, initializer_range=0.7),
    "padding": in_text(pad_token_id=5, bos_token_id=9),
    "window that is off": in_text(use_sliding_window=False, sliding_window=77, max_window_layers=1),
    "length that no rotary embedding reads": in_text(max_position_embeddings=131072),
    "head size written out": in_text(head_dim=8),
    "vision keys": in_vision(in_chans=3, spatial_patch_size=4, hidden_dropout=0.1, use_cache=True),
    "classes": adding(architectures=["Own"], processor_class="Qwen2_5_VLProcessor", tokenizer_class=None),
    "labels": adding(id2label={"0": "A"}, label2id={"A": 0}, output_hidden_states=False),
}


def all_at_once(config: Config) -> Config:
    """What trainers add, together."""
    text, vision = ("training", "padding", "cache"), "vision keys"
    config = saved_by_4_57(config)
    for name in ("unsloth", "auto_map", "quantization null", "torchscript", "trainer", vision, *text):
        config = SPELLINGS[name](config)
    return config


STYLES = SPELLINGS | {"all at once": all_at_once}
QUICK = ("hub", "4.52", "all at once", "window that is off", "length that no rotary embedding reads")
ROPE = {"rope_theta": 100.0, "mrope_section": [2, 1, 1]}
DYNAMIC = ROPE | {"rope_type": "dynamic", "factor": 2.0}
SLIDING: Config = {
    "use_sliding_window": True,
    "sliding_window": 4096,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
NOTHING: Callable[[Config], Config] = lambda config: config  # noqa: E731
REAL: dict[str, tuple[Callable[[Config], Config], Callable[[Config], Config], bool]] = {
    "text_config.rope_parameters.rope_theta: 100.0 and 200.0": (
        NOTHING,
        in_text(rope_parameters=ROPE | {"rope_type": "default", "rope_theta": 200.0}),
        True,
    ),
    "text_config.rope_parameters.rope_type: 'default' and 'linear'": (
        NOTHING,
        in_text(rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}),
        True,
    ),
    "text_config.rope_parameters.factor: 2.0 and 4.0": (
        in_text(rope_parameters=DYNAMIC),
        in_text(rope_parameters=DYNAMIC | {"factor": 4.0}),
        False,
    ),
    "text_config.sliding_window: 4096 and 8192": (
        in_text(**SLIDING),
        in_text(**SLIDING | {"sliding_window": 8192}),
        False,
    ),
    "text_config.layer_types": (NOTHING, in_text(**SLIDING), False),
    "text_config.rms_norm_eps": (NOTHING, in_text(rms_norm_eps=1e-6), True),
    "vision_config.num_heads: 2 and 4": (NOTHING, in_vision(num_heads=4), True),
    "text_config.hidden_act": (NOTHING, in_text(hidden_act="gelu"), True),
    "vision_config.window_size: 16 and 32": (NOTHING, in_vision(window_size=32), True),
    "vision_config.fullatt_block_indexes": (NOTHING, in_vision(fullatt_block_indexes=[0, 1]), True),
    "vision_config.tokens_per_second: 4 and 2": (NOTHING, in_vision(tokens_per_second=2), False),
    "video_token_id: 7 and 20": (NOTHING, adding(video_token_id=20), False),
}
"""Message: settings of IN and of RL, and whether a prompt with one small image shows it."""


@pytest.fixture(scope="module")
def in_(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyVLM]:
    made, folder = tiny("qwen2_5_vl", 1), tmp_path_factory.mktemp("spelling") / "in"
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder, made


def written(source: Path, target: Path, change: Callable[[Config], Config]) -> Path:
    """The checkpoint in `source` under another configuration."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    text = (source / "config.json").read_text(encoding="utf-8")
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(change(json.loads(text))), encoding="utf-8")
    return target


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any, made: TinyVLM) -> torch.Tensor:
    return model(**made.inputs()).logits


def some(every: Iterable[str], quick: Sequence[str]) -> list[Any]:
    """All, those that are not quick behind the mark `slow`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in every]


@pytest.mark.parametrize("style", some(STYLES, QUICK))
def test_every_way_to_save_a_checkpoint_is_a_pair_with_it(style, in_, tmp_path):
    folder, made = in_
    other = loaded(written(folder, tmp_path / "rl", STYLES[style]))
    assert torch.equal(logits(other, made), logits(made.model, made))
    found = model_differences(loaded(folder), other, made.inputs())
    assert not entering(found), list(map(str, found))


@pytest.mark.parametrize("message", some(REAL, [*REAL][:1] + [*REAL][2:4] + [*REAL][5:8]))
def test_what_enters_the_forward_pass_is_refused_by_name(message, in_, tmp_path):
    folder, made = in_
    own, others, shows = REAL[message]
    one, other = (
        loaded(written(folder, tmp_path / name, change)) for name, change in (("in", own), ("rl", others))
    )
    assert torch.equal(logits(one, made), logits(other, made)) != shows
    found = [str(difference) for difference in entering(model_differences(one, other, made.inputs()))]
    assert any(f"setting {message}" in line for line in found), found


def test_settings_of_a_model_that_cannot_be_tried_all_count(in_, tmp_path):
    folder, made = in_
    other = loaded(written(folder, tmp_path / "rl", adding(unsloth_version="1")))
    (difference,) = (one for one in model_differences(made.model, other, {}) if one.name == "unsloth_version")
    assert difference.enters and "not tried" in str(difference)


def test_tensors_that_are_one_in_one_model_only(in_):
    made = tiny("smolvlm")
    other = copy.deepcopy(made.model)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    message = "tensor lm_head.weight: tied to model.text_model.embed_tokens.weight and its own"
    assert message in map(str, entering(model_differences(made.model, other, made.inputs())))


def respelled(processor: Any) -> Any:
    """Defaults of other versions, and a template that writes the same."""
    images = processor.image_processor
    images.min_pixels, images.disable_grouping, images.device = 64, None, None
    images.do_center_crop, images.crop_size, images.rescale_factor = None, None, 1 / 255
    processor.chat_template = "{# saved again #}" + processor.chat_template + "\n"
    processor.tokenizer.model_max_length = 99
    processor.tokenizer.bos_token = "<|im_start|>"  # which nothing writes
    return processor


def test_processors_that_make_the_same_of_every_prompt_are_a_pair(in_):
    made, other = tiny("qwen2_5_vl"), respelled(tiny("qwen2_5_vl").processor)
    found = processor_differences(made.processor, other)
    assert not entering(found), list(map(str, found))
    assert {"chat_template", "bos_token", "image_processor.min_pixels"} <= {one.name for one in found}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("resample", 2, "image_processor.resample"),
        ("size", {"shortest_edge": 64, "longest_edge": 1 << 21}, "image_processor.size.longest_edge"),
        ("size", {"shortest_edge": 3136, "longest_edge": 4096}, "image_processor.size.shortest_edge"),
        ("image_mean", [0.1, 0.2, 0.3], "image_processor.image_mean"),
        ("merge_size", 1, "image_processor.merge_size"),
    ],
)
def test_what_makes_other_tensors_of_an_image_is_named(name, value, message):
    made, other = tiny("qwen2_5_vl"), tiny("qwen2_5_vl")
    if name == "size" and value["longest_edge"] > 4096:
        made.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 1 << 20}
    setattr(other.processor.image_processor, name, value)
    found = [str(one) for one in entering(processor_differences(made.processor, other.processor))]
    assert [line for line in found if f"processor setting {message}: " in line] == found != []


def test_a_pair_says_what_is_spelled_otherwise_and_takes_what_is_accepted(in_, tmp_path):
    folder, _ = in_
    rl = written(folder, tmp_path / "rl", lambda config: in_text(rms_norm_eps=1e-4)(saved_by_4_57(config)))
    with pytest.raises(FrankenlensError, match=r"accept=\['text_config.rms_norm_eps'\]"):
        Pair.from_pretrained(folder, rl, check=False)
    pair = Pair.from_pretrained(folder, rl, check=False, accept=["text_config.rms_norm_eps"])
    found = pair.provenance()["rl"]
    assert found["accepted"] == ["setting text_config.rms_norm_eps: 1e-05 and 0.0001"]
    assert any("rope_parameters.type: 'nothing' and 'default'" in line for line in found["spelled_otherwise"])
    assert "accepted" not in pair.provenance()["in"]
    with pytest.raises(FrankenlensError, match=r"accept names 'rms_norm_epz'.*text_config.rms_norm_eps"):
        Pair(pair.in_, pair.rl, accept=["text_config.rms_norm_eps", "rms_norm_epz"])


def test_tensors_that_do_not_fit_cannot_be_accepted(in_):
    made, other = in_[1], tiny("qwen2_5_vl", 2)
    other.model.to(torch.bfloat16)
    first, second = (HookedVLM(one.model, one.processor, check=False) for one in (made, other))
    with pytest.raises(FrankenlensError, match=r"tensor model.visual.patch_embed.proj.weight: float32"):
        Pair(first, second, accept=["tensor model.visual.patch_embed.proj.weight"])
