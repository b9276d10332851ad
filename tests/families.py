"""Tiny random models of the supported families, with processors, built locally in a fraction of a second.

Real Hugging Face classes with small configurations. Initializations of training hide what a test must see (unit
norms, zero biases, weights so small that the image hardly moves the logits), so every parameter is drawn again;
tests/hooks/test_families.py shows that the image and the multimodal positions move the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from hooks.processors import image_only

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "idefics3")
QWEN = FAMILIES[:3]
EACH_KIND = tuple(
    pytest.param(family, marks=pytest.mark.slow)
    if family in ("qwen2_vl", "qwen2_5_vl", "idefics3")
    else family
    for family in FAMILIES
)
"""What most tests run on: qwen2_vl and idefics3 are near twins of qwen2_5_vl and smolvlm, and qwen2_5_vl is what the
shipped models are; these three are with the slow ones. That points read what they are said to is tested on all six."""
CLASSES_OF_PROCESSOR = dict(zip(QWEN, (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor), strict=True))

WORDS = (
    "what is the color shape of a in at and how many are there count more less same cell row column red blue green "
    "yellow purple circle square triangle star answer no yes 0 1 2 3 4 5 6 7 8 9 , . ? + - = user assistant system "
    "<think> </think> \\boxed{ }"
).split()
SPECIAL = (
    "<unk> <pad> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <image> "
    "<fake_token_around_image> <global-img> <end_of_utterance>"
).split() + [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]

CHAT_TEMPLATE = (
    "{%% for m in messages %%}<|im_start|>{{ m['role'] }}\n"
    "{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}{%% for c in m['content'] %%}"
    "{%% if c['type'] == 'image' %%}%s{%% else %%}{{ c['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "<|im_end|>\n{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer in which every word of `WORDS` and every special token is one token."""
    words = [*SPECIAL, "\n", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    core.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="right",
    )


def tiny_processor(family: str) -> Any:
    """The family's processor for images of a few dozen pixels."""
    tokenizer = tiny_tokenizer()
    if family in QWEN:
        template = CHAT_TEMPLATE % "<|vision_start|><|image_pad|><|vision_end|>"
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
        )
        kind = CLASSES_OF_PROCESSOR[family]
        return image_only(kind)(images, tokenizer, chat_template=template)
    template = CHAT_TEMPLATE % "<image>"
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=6,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    # SmolVLM's own processor needs a video processor (torchvision) and num2words; for images its text is Idefics3's.
    kind = SmolVLMImageProcessorPil if family == "smolvlm" else Idefics3ImageProcessorPil
    images = kind(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The smallest configuration that keeps what is peculiar to the family."""
    token: Any = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=token("<pad>"),
        eos_token_id=token("<|im_end|>"),
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    if family in QWEN:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
        ids: dict[str, Any] = dict(
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
        vision: dict[str, Any] = dict(depth=3, num_heads=2, patch_size=4, spatial_merge_size=2)
    if family == "qwen2_vl":
        vision |= dict(embed_dim=16, hidden_size=32, mlp_ratio=2)
        return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    if family == "qwen2_5_vl":
        # windows of 16 pixels = 2 x 2 merged tokens; block 1 attends fully, blocks 0 and 2 within windows
        vision |= dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, window_size=16)
        return Qwen2_5_VLConfig(
            text_config=text, vision_config=vision | dict(fullatt_block_indexes=[1]), **ids
        )
    if family == "qwen3_vl":
        vision |= dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, num_position_embeddings=36)
        # heads * head_dim is not hidden_size, and the output projection has a bias
        text |= dict(head_dim=12, attention_bias=True)
        text["rope_parameters"]["mrope_section"] = [2, 2, 2]
        return Qwen3VLConfig(
            text_config=text, vision_config=vision | dict(deepstack_visual_indexes=[0, 2]), **ids
        )
    vision = dict[str, Any](hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    if family == "llava":
        vision |= dict(num_hidden_layers=4, image_size=24, patch_size=6)
        return LlavaConfig(
            text_config=LlamaConfig(attention_bias=True, mlp_bias=True, **text),
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=token("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    kind = {"smolvlm": SmolVLMConfig, "idefics3": Idefics3Config}[family]
    return kind(
        text_config=LlamaConfig(**text),
        vision_config=vision | dict(image_size=16, patch_size=4),
        image_token_id=token("<image>"),
        scale_factor=2,
        tie_word_embeddings=family == "smolvlm",
    )


CLASSES: Mapping[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "llava": LlavaForConditionalGeneration,
    "smolvlm": SmolVLMForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
}


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw all parameters: norm gains U(0.5, 1.5), biases N(0, 0.3), weights N(0, 1.2 / fan_in), others N(0, 1)."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias"):
            parameter.normal_(0, 0.3, generator=generator)
        elif parameter.ndim == 1 and "norm" in type(owner).__name__.lower():
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim >= 2 and not isinstance(owner, nn.Embedding):
            parameter.normal_(0, (1.2 / parameter[0].numel()) ** 0.5, generator=generator)
        else:
            parameter.normal_(0, 1, generator=generator)


@dataclass(frozen=True)
class TinyVLM:
    """A tiny model of one family (float32, evaluation mode) and the processor that feeds it."""

    family: str
    model: Any = field(repr=False)
    """A `PreTrainedModel`; its methods' decorators hide their types."""
    processor: Any = field(repr=False)

    def images(
        self, n: int, sizes: Sequence[tuple[int, int]] | None = None, seed: int = 0
    ) -> list[Image.Image]:
        """`n` images of noise; `sizes` are (height, width) in pixels, used in turn."""
        if sizes is None:
            sizes = ((32, 40), (24, 32)) if self.family in QWEN else ((16, 32), (32, 32))
        rng = np.random.default_rng(seed)
        shapes = [(*sizes[i % len(sizes)], 3) for i in range(n)]
        return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]

    def prompt(self, text: str, n_images: int = 1) -> str:
        """The chat prompt of one question with `n_images` images before it."""
        content: list[Any] = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def inputs(
        self,
        n_images: int = 1,
        batch: int = 1,
        sizes: Sequence[tuple[int, int]] | None = None,
        text: str | Sequence[str] | None = None,
        padding_side: str = "right",
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Processor tensors of `batch` prompts with `n_images` images each.

        Arguments:
            sizes: (height, width) of the images in pixels, used in turn over all images of the batch.
            text: one question for all rows, or one per row; by default row i is 3 i words longer than row 0.
            padding_side: where the shorter rows are padded.
        """
        if text is None:
            base = "what color is the star in row 2 ?".split()
            text = [" ".join(base + WORDS[7 * row : 10 * row]) for row in range(batch)]
        texts = [text] * batch if isinstance(text, str) else list(text)
        arguments: dict[str, Any] = {"text": [self.prompt(t, n_images) for t in texts]}
        if n_images:
            flat = self.images(n_images * batch, sizes, seed)
            arguments["images"] = [flat[i * n_images : (i + 1) * n_images] for i in range(batch)]
        encoded = self.processor(**arguments, padding=True, padding_side=padding_side, return_tensors="pt")
        return {name: value for name, value in encoded.items() if name != "token_type_ids"}


def tiny(family: str, seed: int = 0) -> TinyVLM:
    """A fresh tiny model of `family` with parameters drawn from `seed`, and its processor."""
    processor = tiny_processor(family)
    model = CLASSES[family](_config(family, processor.tokenizer))
    redraw(model, seed)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return TinyVLM(family, model.float().eval(), processor)
