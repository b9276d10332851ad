"""Text-only pairs on disk, made in seconds: IN learns to say a number of the question, RL the one after it.

RL's training moves one MLP and nothing else, so the truth is known: every other weight is IN's, and all of RL's change
passes through what that MLP writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.architectures import Builder

START, END, PAD = "<s>", "</s>", "<pad>"
NUMBERS: Sequence[str] = "zero one two three four five six seven".split()
WORDS = f"<unk> user assistant say the first of and <think> </think> it is answer {' '.join(NUMBERS)}".split()
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
PAIRS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
    "gemma2": {"query_pre_attn_scalar": 24},
    "qwen3_5_text": {},
}
"""Types, all of four blocks: pre-norm; norms behind each part as well; linear attention in every other block."""


@dataclass(frozen=True)
class TextPair:
    """Folders of both checkpoints, a file of questions, and the MLP that RL's training moved."""

    in_: Path
    rl: Path
    data: Path
    planted: str


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template."""
    special = [PAD, START, END]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token=PAD, eos_token=END, padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def question(a: int, b: int) -> str:
    """What the user asks."""
    return f"say the first of {NUMBERS[a]} and {NUMBERS[b]}"


def make(folder: Path, model_type: str, layer: int = 2, steps: int = 150) -> TextPair:
    """A pair of an architecture, tiny (`tests.architectures`) and trained from random weights.

    Args:
        folder: for both checkpoints and the questions.
        model_type: of `PAIRS`.
        layer: whose MLP RL's training moves.
        steps: of training, at most; it ends when every answer is right.
    """
    made, words = Builder(model_type, PAIRS[model_type], pixels=None, causal=True)().model, tokenizer()
    for side in ("pad", "bos", "eos"):
        token = {"pad": PAD, "bos": START, "eos": END}[side]
        setattr(made.config, f"{side}_token_id", words.convert_tokens_to_ids(token))
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = None
    everything = list(made.parameters())
    train(made, _dialogues(words, 0), everything, steps)
    _save(made, words, folder / "in")
    planted = f"model.layers.{layer}.mlp"
    train(made, _dialogues(words, 1), list(made.get_submodule(planted).parameters()), steps)
    _save(made, words, folder / "rl")
    rows = [
        {"question": question(a, b), "answer": NUMBERS[(a + 1) % len(NUMBERS)], "task": "next"}
        for a, b in product(range(len(NUMBERS)), repeat=2)
    ]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return TextPair(folder / "in", folder / "rl", data, f"blocks.{layer}.mlp")


def _dialogues(words: PreTrainedTokenizerFast, after: int) -> Int[Tensor, "dialogue pos"]:
    """Every question with its trace; the answer is `after` places behind the number that was asked for."""
    texts = []
    for a, b in product(range(len(NUMBERS)), repeat=2):
        said = f"<think> it is {NUMBERS[a]} </think> answer {NUMBERS[(a + after) % len(NUMBERS)]}"
        texts.append(f"{START} user {question(a, b)} {END} {START} assistant {said} {END}")
    return torch.tensor([words(text, add_special_tokens=False)["input_ids"] for text in texts])


def train(
    model: PreTrainedModel, ids: Int[Tensor, "row pos"], parameters: Sequence[nn.Parameter], steps: int
) -> None:
    """Move these parameters until the trace of every row is the likeliest."""
    prompt = 12  # tokens before the trace
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(steps):
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(True)
    if loss.item() > 0.1:
        raise RuntimeError(f"{type(model).__name__} did not learn its answers: loss {loss.item():.2f}")


def _save(model: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
