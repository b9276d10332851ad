"""The architecture and vocabulary of the triple: a genuine Qwen2.5-VL, about 1.7 M parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from interp.questions.tasks import CELLS, COLOURS, SHAPES

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
THINK, END_THINK, ANSWER = "<think>", "</think>", "answer"
NUMBERS = tuple(str(n) for n in range(17))
EMPTY = "empty"
INIT_STD, EMBEDDING_STD = 0.05, 0.1

_WORDS = (
    "<unk> system user assistant a answer and are at colour count difference equal exists find how is many more "
    "no none of or shape share sum the there think what yes you ? , . ( ) : " + EMPTY
).split()

# One message template as Qwen2.5-VL has it; the pre-tokenizer ignores the line breaks.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths. The defaults are those of the shipped triple."""

    layers: int = 9
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    vision_layers: int = 3
    vision_hidden: int = 64
    vision_heads: int = 4
    patch: int = 7  # pixels; merged 2x2, so a 14-pixel cell of the scene is one token


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; special tokens and chat template as in Qwen2.5-VL."""
    words = [*SPECIAL, *_WORDS, THINK, END_THINK, *NUMBERS, *COLOURS, *SHAPES, *CELLS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE, VIDEO],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast, size: ModelSize, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised fp32 model with the generation settings it is later saved with."""
    token: Any = tokenizer.convert_tokens_to_ids
    half = size.hidden // size.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 512,
            "initializer_range": INIT_STD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": token(START),
            "eos_token_id": token(END),
            "pad_token_id": token(PAD),
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": 2 * size.vision_hidden,
            "num_heads": size.vision_heads,
            "patch_size": size.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": size.hidden,
            "window_size": 16 * size.patch,
            "fullatt_block_indexes": list(range(size.vision_layers)),
            "initializer_range": INIT_STD,
        },
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    _rescale(model)
    model.generation_config.eos_token_id = token(END)
    model.generation_config.pad_token_id = token(PAD)
    model.generation_config.do_sample = False
    return model


@torch.no_grad()
def _rescale(model: Qwen2_5_VLForConditionalGeneration) -> None:
    # Embeddings must stand out against what untrained layers write to the residual stream, or nothing that a
    # token says of itself can be looked up by later layers (GPT-2's scaling of the output projections).
    layers: Any = model.model.language_model.layers
    model.get_parameter("model.language_model.embed_tokens.weight").mul_(EMBEDDING_STD / INIT_STD)
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_((2 * len(layers)) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * len(layers)) ** -0.5)
