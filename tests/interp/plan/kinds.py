"""Pairs of four kinds of models, tiny or so wide that what they make outweighs everything else, and long prompts."""

from __future__ import annotations

from dataclasses import replace

import torch

from hooks import HookedVLM
from interp.prompts import Prompt
from tests.architectures import ARCHITECTURES
from tests.architectures.inputs import TYPES
from tests.architectures.randomize import randomize
from tests.architectures.shrink import FIRST_MARK

KINDS = ("llava", "qwen3_vl", "qwen3_vl_moe", "llava+gemma2")


def models(kind: str, width: int = 64, layers: int = 3) -> tuple[HookedVLM, HookedVLM]:
    """Two models of one architecture with random weights; experts run one by one, so that their products are seen."""
    entry = ARCHITECTURES[kind]
    text = {**entry.config.get("text_config", {}), "hidden_size": width, "intermediate_size": 3 * width}
    text |= {"max_position_embeddings": 4096, "moe_intermediate_size": width}
    if kind in KINDS[:3]:  # the layers of others take turns, and are as many as that needs
        text["num_hidden_layers"] = layers
    vision = dict(entry.config.get("vision_config", {}))
    if kind.startswith("qwen"):
        vision["out_hidden_size"] = width
        text.pop("mlp_only_layers", None)
    wide = replace(entry, config={**entry.config, "text_config": text, "vision_config": vision})
    made = [wide(seed) for seed in range(2)]
    for one in made:
        if hasattr(one.model.config.get_text_config(), "num_experts"):
            one.model.set_experts_implementation("eager")
    randomize(made[1].model, 1)
    first = HookedVLM(made[0].model, inputs=made[0].inputs)
    return first, HookedVLM(made[1].model, inputs=made[0].inputs, check=False)


def prompts(kind: str, vlm: HookedVLM, n: int, tokens: int, decided: int = 4) -> list[Prompt]:
    """Prompts of an image and as many tokens, the last `decided` of which are reasoning."""
    found = []
    for number in range(n):
        own = ARCHITECTURES[kind](number).inputs
        ids = own["input_ids"]
        more = torch.randint(3, FIRST_MARK, (1, tokens - ids.shape[1]), generator=torch.manual_seed(number))
        inputs = {**own, "input_ids": torch.cat([ids, more], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs |= {
            name: torch.cat([value, torch.zeros_like(more)], 1)
            for name, value in own.items()
            if name in TYPES
        }
        image = (ids == vlm.image_token_id)[0].nonzero()[:, 0].tolist()
        roles = ["template"] * image[0] + ["image"] * len(image)
        roles += ["question"] * (tokens - len(roles) - decided) + ["reasoning"] * decided
        found.append(
            Prompt.from_inputs(inputs, roles, image_token_id=vlm.image_token_id, name=f"prompt{number}")
        )
    return found
