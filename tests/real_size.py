"""A pair with the vocabulary of real models, 151,936 words, and next to nothing else, so that it alone shows.

Run as `python -m tests.real_size WHAT N_TRACES N_TOKENS` with a choice of decisions, "map" or "map-first": the peak
of main memory over the models' own, of `find_decisions` or of a map, under `memory_limit(LIMIT)` where LIMIT is set.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from experiments import embedded
from hooks import HookedVLM
from hooks.memory import memory_limit
from hooks.processors import load_processor
from interp.decision import find_decisions
from interp.map import component_map
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.questions.tasks import sample

N_WORDS = 151_936


@torch.no_grad()
def real_words(
    seed: int = 0, n_words: int = N_WORDS, d_model: int = 64, n_layers: int = 2, update: float = 0.05
) -> Pair:
    """IN with random weights that tell words apart, and RL: IN with a random update of every tensor."""
    processor: Any = load_processor(embedded.path("in"))
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": n_words,
            "hidden_size": d_model,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 2 * d_model,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "pad_token_id": processor.tokenizer.pad_token_id,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "out_hidden_size": d_model,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(update * parameter.norm() * noise / noise.norm())
    return Pair(HookedVLM(model, processor), HookedVLM(other, processor, check=False))


class Peak:
    """Bytes of main memory at most, over what there was at first."""

    def __init__(self) -> None:
        self.start, self.most = _status("VmRSS"), 0


@contextmanager
def peak() -> Iterator[Peak]:
    """The peak of main memory inside, by the kernel's own count.

    Raises:
        OSError: the kernel does not let it be reset.
    """
    Path("/proc/self/clear_refs").write_text("5")
    found = Peak()
    yield found
    found.most = _status("VmHWM") - found.start


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    (kib,) = re.findall(rf"{name}:\s+(\d+) kB", text)
    return 1024 * int(kib)


class Obliging:
    """A grader for models that answer nothing: RL is right, IN is wrong, and right after every third forced token."""

    def __init__(self, n: int) -> None:
        self._n, self._asked = n, 0

    def __call__(self, answer: str | None, example: Example) -> bool:
        self._asked += 1
        after = self._asked - 2 * self._n
        return self._asked <= self._n or (after > 0 and after % 3 == 0)


def main() -> None:
    """Prints the peak of `find_decisions`, or of a map on its decisions, in bytes, and what was found."""
    what, n_traces, n_tokens = sys.argv[1], *map(int, sys.argv[2:4])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pair = real_words()
    examples = sample("sum", n_traces, seed=0, split="map")
    choice = {"map": "soft", "map-first": "first"}.get(what, what)
    with peak() as found, memory_limit(os.environ.get("LIMIT")):
        decisions = find_decisions(
            pair,
            examples,
            choice,
            grader=Obliging(n_traces),
            max_new_tokens=n_tokens,
            batch_size=min(n_traces, 32),
        )
    told = {"peak": found.most, "n": len(decisions), "steps": [len(t.trace_ids) for t in decisions.rl_traces]}
    told |= {"denominator": float((decisions.rl_values - decisions.in_values).mean())}
    if choice != what:
        with peak() as found, memory_limit(os.environ.get("LIMIT")):
            effects = component_map(
                pair, decisions, points=("attn_out", "mlp_out"), roles=["all", "decision"]
            )
        told |= {"peak": found.most, "largest": float(abs(effects["effect"]).max())}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
