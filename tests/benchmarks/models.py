"""What is measured on: a LLaVA and a Qwen2.5-VL of 12 layers, d = 256, and prompts of 264 tokens.

MLPs have the proportions of LLaVA-1.5 (decoder 2.69 d, vision 4 d) and Qwen2.5-VL-7B (5.29 d, 2.67 d, gated). The same
LLaVA with other decoders: Gemma 3's (five layers of six see 128 tokens back, norms behind the writers too), Qwen3-MoE's
(two of eight experts a token) and LFM2's (two layers of three are short convolutions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
)

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from tests.families import WORDS, redraw, tiny_processor

LAYERS, WIDTH, HEADS, BATCH, TOKENS, TEXT = 12, 256, 8, 4, 264, 64
D_MLP = {"llava": 688, "qwen2_5_vl": 1353, "llava+gemma3": 688, "llava+qwen3_moe": 344, "llava+lfm2": 688}
"""Of one expert, where there are several."""
EXPERTS, ACTIVE, WINDOW, KERNEL = 8, 2, 128, 3
VISION_D_MLP = {"llava": 1024, "qwen2_5_vl": 684}
FAMILIES = tuple(D_MLP)
WITH_PEERS = FAMILIES[:2]


def slides(family: str, layer: int) -> bool:
    """Whether a layer's tokens see no further back than `WINDOW`."""
    return family == "llava+gemma3" and layer % 6 < 5


def convolves(family: str, layer: int) -> bool:
    """Whether a layer has a short convolution instead of attention."""
    return family == "llava+lfm2" and layer % 3 < 2


@dataclass(frozen=True)
class Setting:
    """A model, prompts, and donor prompts: other images and other words."""

    family: str
    vlm: HookedVLM
    prompts: list[Prompt]
    donors: list[Prompt]
    metric: LogitDifference


def build(family: str, vision_layers: int | None = None) -> Setting:
    """The setting of a family; every parameter drawn from a seed, norm gains and biases included.

    Qwen2.5-VL has 200 image tokens and then 64 text tokens (two before the image). A CLIP tower is square: LLaVA has
    196 image tokens and 68 others.
    """
    processor = tiny_processor(family.partition("+")[0])
    token: Any = processor.tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = dict(
        vocab_size=len(processor.tokenizer), hidden_size=WIDTH, intermediate_size=D_MLP[family],
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512,
        pad_token_id=token("<pad>"), eos_token_id=token("<|im_end|>"), bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "qwen2_5_vl":
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
        vision: dict[str, Any] = dict(
            depth=vision_layers or 4, hidden_size=WIDTH, intermediate_size=VISION_D_MLP[family], num_heads=4,
            patch_size=4, spatial_merge_size=2, out_hidden_size=WIDTH, window_size=32, fullatt_block_indexes=[1, 3],
        )  # fmt: skip
        config: Any = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
        processor.image_processor.size = {"shortest_edge": 8 * 8, "longest_edge": 80 * 160}
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        size = (80, 160)
    else:
        vision = dict(
            hidden_size=WIDTH, intermediate_size=VISION_D_MLP["llava"], num_hidden_layers=vision_layers or 5,
            num_attention_heads=4, image_size=84, patch_size=6,
        )  # fmt: skip
        config = LlavaConfig(
            text_config=_decoder(family, text),
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=token("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        processor.image_processor.size = {"shortest_edge": 84}
        processor.image_processor.crop_size = {"height": 84, "width": 84}
        model = LlavaForConditionalGeneration(config)
        size = (84, 84)
    redraw(model, 0)
    model.float().eval()
    builder = PromptBuilder(processor, TraceFormat(answer=("answer", None)))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(2 * BATCH)]
    questions = [_question(builder, pictures[0], i) for i in range(2 * BATCH)]
    prompts, donors = (
        [
            builder.build(Example(f"{kind}{i}", (pictures[first + i],), questions[first + i], "5"))
            for i in range(BATCH)
        ]
        for kind, first in (("prompt", 0), ("donor", BATCH))
    )
    metric = LogitDifference(torch.arange(BATCH) + 30, torch.arange(BATCH) + 50)
    vlm = HookedVLM(model, processor)
    assert {len(prompt) for prompt in [*prompts, *donors]} == {TOKENS}
    return Setting(family, vlm, prompts, donors, metric)


def _decoder(family: str, text: dict[str, Any]) -> Any:
    """The configuration of the decoder inside a LLaVA."""
    kind: Any = LlamaConfig
    head, own = WIDTH // HEADS, dict[str, Any]()
    if family == "llava+gemma3":
        kind = Gemma3TextConfig
        kinds = ["sliding_attention" if slides(family, i) else "full_attention" for i in range(LAYERS)]
        own = {
            "head_dim": head,
            "query_pre_attn_scalar": head,
            "layer_types": kinds,
            "sliding_window": WINDOW,
        }
        own["rope_parameters"] = dict.fromkeys(set(kinds), text["rope_parameters"])
    if family == "llava+qwen3_moe":
        kind = Qwen3MoeConfig
        own = {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": D_MLP[family]}
        own |= {"head_dim": head, "norm_topk_prob": True}
    if family == "llava+lfm2":
        kind = Lfm2Config
        kinds = ["conv" if convolves(family, i) else "full_attention" for i in range(LAYERS)]
        own = {"layer_types": kinds, "conv_L_cache": KERNEL, "block_auto_adjust_ff_dim": False}
    return kind(**text | own)


def _question(builder: PromptBuilder, picture: Image.Image, seed: int) -> str:
    """As many words as fill the prompt up."""
    words = [word for word in WORDS if word.isalpha()]
    rng = np.random.default_rng(seed)
    spare = TOKENS - len(builder.build(Example("empty", (picture,), "what", "5")))
    return " ".join(["what", *rng.choice(words, spare)])
