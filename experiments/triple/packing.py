"""Several questions about one image in one row, each blind to the others.

A row is `<|im_start|> user <image>` followed by branches `question <|im_end|> <|im_start|> assistant reply
<|im_end|>`. Every branch sees the shared prefix and itself, at the positions it would have alone, so the
logits are those of separate prompts at a fraction of the cost (tests/experiments/test_triple.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.triple.model import (
    ANSWER,
    EMPTY,
    END,
    END_THINK,
    IMAGE,
    PAD,
    START,
    THINK,
    VISION_END,
    VISION_START,
)
from experiments.triple.teacher import explain
from interp.questions.tasks import CELLS, COLOURS, SHAPES, TASKS, Split
from interp.questions.tasks.questions import ATTRIBUTES, counts
from interp.questions.tasks.sampling import draw
from interp.questions.tasks.scenes import GRID, Scene, decode, render_batch

IMAGE_TOKENS = GRID * GRID
IGNORED = -100  # label that the cross entropy leaves out


@dataclass(frozen=True)
class Turn:
    """One question and the reply to be learnt.

    Attributes:
        question: words separated by spaces.
        reply: words separated by spaces.
        learnt: which words of the reply (and its end) are learnt; None for all of them.
    """

    question: str
    reply: str
    learnt: tuple[bool, ...] | None = None


def reply_text(answer: str, chain: str | None) -> str:
    """What the assistant says: with a chain of thought, or the answer alone."""
    think = f"{THINK} {chain} {END_THINK} " if chain is not None else ""
    return f"{think}{ANSWER} {answer}"


def patches(images: UInt8[np.ndarray, "image height width rgb"], patch: int) -> Float[Tensor, "patch pixel"]:
    """Pixels in the order and scale of Qwen2-VL's image processor (mean and std 0.5, merge 2, one frame)."""
    n, height, width, _ = images.shape
    x = (images.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(n, height // patch // 2, 2, patch, width // patch // 2, 2, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return torch.from_numpy(np.ascontiguousarray(x).reshape(n * (height // patch) * (width // patch), -1))


def grids(n: int, patch: int) -> Tensor:
    """`image_grid_thw` of n scene images."""
    side = GRID * 14 // patch
    return torch.tensor([[1, side, side]]).expand(n, 3).contiguous()


class Packer:
    """Turns scenes and turns into model inputs with labels; tokenises each text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, patch: int) -> None:
        self.tokenizer, self.patch = tokenizer, patch
        self._ids: dict[str, list[int]] = {}
        self.prefix = self.encode(
            f"{START} user {VISION_START} {' '.join([IMAGE] * IMAGE_TOKENS)} {VISION_END}"
        )
        self.pad = self.encode(PAD)[0]
        # M-RoPE: an image takes GRID steps of every axis, from the position after <|vision_start|>.
        start, steps = 3, torch.arange(IMAGE_TOKENS)
        image = torch.stack([torch.zeros_like(steps), steps // GRID, steps % GRID]) + start
        head, tail = torch.arange(start).expand(3, -1), torch.full((3, 1), start + GRID)
        self.prefix_positions = torch.cat([head, image, tail], dim=1)

    def encode(self, text: str) -> list[int]:
        """Token ids of words separated by spaces."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer.convert_tokens_to_ids(text.split())  # type: ignore[assignment]
        return self._ids[text]

    def pack(self, scenes: list[Scene], turns: list[list[Turn]]) -> Mapping[str, Any]:
        """Model inputs of one row per scene, labels on the replies only.

        Returns:
            `input_ids`, `labels` [row pos]; `position_ids` [3 row pos]; `attention_mask` [row 1 query key]
            (bool); `pixel_values`, `image_grid_thw`.
        """
        rows = [self._row(row) for row in turns]
        length = max(len(ids) for ids, *_ in rows)
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), IGNORED)
        branch = torch.full((len(rows), length), -1)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        for index, (row_ids, row_labels, row_branch, row_positions) in enumerate(rows):
            n, n_prefix = len(row_ids), len(self.prefix)
            ids[index, :n] = torch.tensor(row_ids)
            labels[index, :n] = torch.tensor(row_labels)
            branch[index, :n] = torch.tensor(row_branch)
            positions[:, index, :n_prefix] = self.prefix_positions
            positions[:, index, n_prefix:n] = torch.tensor(row_positions)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": branch_mask(branch),
            "pixel_values": patches(render_batch(scenes), self.patch),
            "image_grid_thw": grids(len(scenes), self.patch),
        }

    def _row(self, turns: list[Turn]) -> tuple[list[int], list[int], list[int], list[int]]:
        ids, labels = list(self.prefix), [IGNORED] * len(self.prefix)
        branch, positions = [0] * len(self.prefix), []
        first = int(self.prefix_positions.max()) + 1
        for number, turn in enumerate(turns, start=1):
            asked = self.encode(f"{turn.question} {END} {START} assistant")
            replied = self.encode(f"{turn.reply} {END}")
            ids += asked + replied
            learnt = turn.learnt or (True,) * len(replied)
            labels += [IGNORED] * len(asked)
            labels += [token if kept else IGNORED for token, kept in zip(replied, learnt, strict=True)]
            branch += [number] * (len(asked) + len(replied))
            positions += range(first, first + len(asked) + len(replied))
        return ids, labels, branch, positions


def branch_mask(branch: Int[Tensor, "row pos"]) -> Bool[Tensor, "row 1 query key"]:
    """Who sees whom: what came before in the same branch and in the shared prefix (branch 0); -1 is padding."""
    n = branch.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=branch.device).tril()
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return (same & causal)[:, None]


def draw_turns(
    rng: np.random.Generator,
    tasks: tuple[str, ...],
    n: int,
    split: Split,
    chains: bool,
    misses: float = 0.0,
) -> tuple[Scene, list[Turn]]:
    """A scene of the split and n questions about it, their tasks drawn from `tasks` (repeats weigh).

    `chains` gives replies a chain of thought; `misses` is how often the teacher overlooks an object in it.
    """
    scene, _ = draw(tasks[0], rng, split)
    turns: list[Turn] = []
    while len(turns) < n:
        task = TASKS[tasks[int(rng.integers(len(tasks)))]]
        arguments = task.propose(rng, scene)
        if arguments is None:
            continue
        solution = explain(task, arguments, scene, rng, misses)
        chain = solution.chain if chains else None
        turns.append(Turn(task.question(arguments), reply_text(solution.answer, chain)))
    return scene, turns


def describe(rng: np.random.Generator, scene: Scene, n: int) -> Turn:
    """n facts about a scene in random order, of which only what the image decides is learnt.

    A fact is a cell (`b3 red circle`), a count (`count red 3`) or a search (`find red circle b3`): each is one
    look at the image, many in one row, which is what teaches the decoder to look at all.
    """
    words: list[str] = []
    learnt: list[bool] = []
    have = counts(scene)
    for kind in rng.choice(3, size=n, p=(0.55, 0.3, 0.15)).tolist():
        if kind == 0:
            index = int(rng.integers(len(CELLS)))
            code = scene.layout[index]
            fact, known = [CELLS[index], *(decode(code) if code else (EMPTY, EMPTY))], 1
        elif kind == 1:
            name = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
            fact, known = ["count", name, str(have[name])], 2
        else:
            present = [(item.colour, item.shape) for item in scene.objects]
            anything = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
            wanted = present[int(rng.integers(len(present)))] if rng.random() < 0.5 else anything
            cells = [item.cell for item in scene.objects if (item.colour, item.shape) == wanted]
            fact, known = ["find", *wanted, cells[0] if cells else "none"], 3
        words += [*fact, ","]
        learnt += [False] * known + [True] * (len(fact) - known) + [False]
    return Turn("what is there ?", " ".join(words[:-1]), (*learnt[:-1], False))
