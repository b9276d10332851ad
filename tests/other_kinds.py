"""Tiny pairs of kinds of models that the embedded one is not: a mixture of experts, and post-norms (Gemma 2).

IN has random weights; its donor is IN with a random update of every tensor, as large as RL's are in the embedded pair.
Both read the embedded pair's questions and images.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from experiments import embedded
from hooks import HookedVLM
from hooks.processors import load_processor

BRANCH = 0.3
"""Scale of what a layer writes: embeddings stand out against it, as in models that were trained."""
UPDATE = 0.05
"""Norm of the update of each tensor, relative to the tensor."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def experts(seed: int = 0, branch: float = BRANCH, update: float = UPDATE) -> tuple[HookedVLM, HookedVLM]:
    """Qwen3-VL-MoE, two of four experts a token, one layer without."""
    processor: Any = load_processor(embedded.path("in"))
    tokens = _tokens(processor.tokenizer)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLMoeConfig(
        text_config={
            **SIZES,
            **tokens,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **dict(
            zip(
                names,
                processor.tokenizer.convert_tokens_to_ids(
                    ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
                ),
                strict=True,
            )
        ),
    )
    return _pair(Qwen3VLMoeForConditionalGeneration(config), processor, seed, branch, update)


def post_norms(seed: int = 0, branch: float = BRANCH, update: float = UPDATE) -> tuple[HookedVLM, HookedVLM]:
    """Gemma 2 inside LLaVA: norms behind attention and MLP too."""
    own: Any = load_processor(embedded.path("in"))
    tokenizer: Any = own.tokenizer
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=own.chat_template or tokenizer.chat_template,
    )
    config = LlavaConfig(
        text_config=Gemma2Config(
            **SIZES, **_tokens(tokenizer), intermediate_size=128, query_pre_attn_scalar=16, sliding_window=512
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _pair(LlavaForConditionalGeneration(config), processor, seed, branch, update)


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


@torch.no_grad()
def _pair(model: Any, processor: Any, seed: int, branch: float, update: float) -> tuple[HookedVLM, HookedVLM]:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
            if "Gemma" in type(owner).__name__ and ".post_" in name:  # gains are 1 + weight
                parameter.sub_(1 - branch)
        elif isinstance(owner, nn.Embedding):
            parameter.copy_(noise)
        else:
            written = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (branch if written else 1.0))
    model.tie_weights()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.eval()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(update * parameter.norm() * noise / noise.norm())
    return HookedVLM(model, processor), HookedVLM(other, processor, check=False)
