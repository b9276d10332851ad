r"""How 2602.12395 asks: its sample, prompts, images and limits, as its text and its released code have them.

The paper lets GPT-4o-mini describe images and grade answers, gives Base no system message, and chooses the message by a
part of the model's name; here one message serves all models of a pair, IN describes, and answers are graded by rules
(`interp.questions.grading`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from PIL import Image

from interp.questions.examples import Example

SEED = 123
"""Of the sample: `interp.questions.readers.draw.Draw(legacy=True)`, n of each category."""
TOKENS, SKIP_TOKENS, SWAP_TOKENS = 8192, 2048, 64
"""Longest reply: Tables 2 and 3; layer skip (Fig. 4b); vision-token swap (Fig. 4a)."""
INSTRUCTION = 'Please solve the problem step by step and put your answer in one "\\boxed{}".\n\n'
"""Stands before every question."""
DESCRIBED = "Image Description:\n{description}\n\nQuestion:\n{question}"
"""Description and question of M_v2r, behind the instruction."""
SYSTEM: Mapping[str, str] = {
    "reasoner": (
        "You are a helpful assistant. When the user asks a question, your response must include two parts: first, the "
        "reasoning process enclosed in <think>...</think> tags, then the final answer enclosed in <answer>...</answer> "
        "tags. Please provide a clear, concise response within <answer> </answer> tags that directly addresses the "
        "question."
    ),
    "revisual": (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
        "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
    ),
}
"""System messages: of OpenMMReasoner and MMR1, and of Revisual-R1."""
BOXED, TAGGED = ("\\boxed{", "}"), ("<answer>", "</answer>")
"""What delimits an answer: what the instruction asks for, and what the first system message does."""
MAX_PIXELS, MIN_SIDE = 1280 * 720, 28
"""Images are brought to these by Lanczos resampling."""


def as_in_paper(example: Example) -> Example:
    """An example of MathVista with its bare question, options by letter and image resized; others as they are."""
    question, choices = example.meta.get("question"), example.meta.get("choices")
    text = example.question if not question else str(question)
    if question and choices:
        options = (f"{letter}. {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False))
        text += "\n\nChoices:\n" + "\n".join(options)
    return replace(example, question=text, images=tuple(map(resized, example.images)))


def resized(image: Image.Image) -> Image.Image:
    """An image with at least `MIN_SIDE` pixels a side, and then at most `MAX_PIXELS`."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        scale = MIN_SIDE / min(width, height)
        width, height = int(width * scale), int(height * scale)
    if width * height > MAX_PIXELS:
        scale = (MAX_PIXELS / (width * height)) ** 0.5
        width, height = int(width * scale), int(height * scale)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)
