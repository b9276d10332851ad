"""Measures what opening costs in time; run as `python -m tests.hooks.cost long` or `embedded`."""

import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from experiments import embedded
from hooks import HookedVLM
from hooks.selfcheck import check_inputs
from tests.families import redraw, tiny_processor

NAMES = [f"blocks.{i}.hook_resid_{place}" for i in range(6) for place in ("pre", "post")]


def measured(vlm: HookedVLM, inputs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median times, as multiples of the bare model's."""
    modules = [vlm.module(vlm.anatomy.text.blocks[i].path) for i in range(6)]

    def plain() -> None:
        """The same reads by the least that PyTorch allows."""
        kept = {}

        def before(module, args, kwargs, i):
            kept[i, "pre"] = (args[0] if args else kwargs["hidden_states"]).clone()

        def after(module, args, output, i):
            kept[i, "post"] = (output[0] if isinstance(output, tuple) else output).clone()

        handles = []
        for i, module in enumerate(modules):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, i=i: before(m, a, k, i), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(lambda m, a, o, i=i: after(m, a, o, i)))
        vlm.model(**inputs)
        for handle in handles:
            handle.remove()

    arms = {
        "bare": lambda: vlm.model(**inputs),
        "opened": lambda: vlm(inputs),
        "twelve reads": lambda: vlm.run_with_cache(inputs, NAMES),
        "plain hooks": plain,
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for _ in range(repeats):
            for arm, run in arms.items():
                start = time.perf_counter()
                run()
                times[arm].append(time.perf_counter() - start)
    medians = {arm: statistics.median(values[5:]) for arm, values in times.items()}
    found = {arm: value / medians["bare"] for arm, value in medians.items()}
    return found


def on_prompts_of_264_tokens() -> dict[str, float]:
    processor = tiny_processor("qwen2_5_vl")
    token: Any = processor.tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(processor.tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, pad_token_id=token("<pad>"), bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    vision = dict(
        depth=4, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=4, spatial_merge_size=2,
        out_hidden_size=256, window_size=32, fullatt_block_indexes=[1, 3],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    redraw(model, 0)
    ids = torch.full((4, 264), token("red"))
    ids[:, 0], ids[:, 1:201], ids[:, 201] = (
        token("<|vision_start|>"),
        token("<|image_pad|>"),
        token("<|vision_end|>"),
    )
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token("<|image_pad|>")).long(),
        "pixel_values": torch.randn(4 * 800, 3 * 2 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 20, 40]] * 4),
    }
    return measured(HookedVLM(model, processor), inputs, 30)


def on_the_embedded_model() -> dict[str, float]:
    vlm = HookedVLM.from_pretrained(embedded.path("in"))
    inputs = {name: torch.cat([value] * 16) for name, value in check_inputs(vlm.processor).items()}
    return measured(vlm, inputs, 80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"long": on_prompts_of_264_tokens, "embedded": on_the_embedded_model}[sys.argv[1]]()))
