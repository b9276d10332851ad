"""Which tokens a lens looks at: a role, positions shared by all prompts, or positions of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks import FrankenlensError
from interp.prompts import Prompt
from interp.prompts.roles import ROLES
from interp.questions.examples import cluster_of

Where = str | Sequence[int] | Sequence[Sequence[int]]
"""A role, "decision" (each prompt's last token) or "all"; positions (negative: from the end) in every prompt; or a list
of positions for each prompt."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of several prompts, one after another.

    Attributes:
        prompts: the prompts.
        row: which prompt each token is of.
        position: where in it, counted from its first token.
    """

    prompts: tuple[Prompt, ...]
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.row)

    def of_prompts(self, first: int, end: int) -> Tokens:
        """Those of some prompts that follow one another, which count from 0 there."""
        chosen = (self.row >= first) & (self.row < end)
        return Tokens(self.prompts[first:end], self.row[chosen] - first, self.position[chosen])

    def coordinates(self) -> dict[str, tuple[str, np.ndarray]]:
        """Coordinates of an axis `token`: row, example, cluster, task, position, role, text (the token itself)."""
        cluster = [cluster_of(prompt.example) for prompt in self.prompts]
        pairs = list(zip(self.row.tolist(), self.position.tolist(), strict=True))
        prompts = [(self.prompts[row], position) for row, position in pairs]
        columns = {
            "row": [row for row, _ in pairs],
            "example": [prompt.example.id for prompt, _ in prompts],
            "cluster": [cluster[row] for row, _ in pairs],
            "task": [prompt.example.task for prompt, _ in prompts],
            "position": [position for _, position in pairs],
            "role": [prompt.roles[position] for prompt, position in prompts],
            "text": words(self.prompts[0], [prompt.ids[position] for prompt, position in prompts]).tolist(),
        }
        return {name: ("token", np.array(values)) for name, values in columns.items()}


def tokens_of(prompts: Sequence[Prompt], where: Where) -> Tokens:
    """The tokens that `where` names, checked before anything runs.

    Raises:
        FrankenlensError: no prompts, an unknown role, a role without tokens in a prompt, or a position past its end;
            the message names the row.
    """
    if not prompts:
        raise FrankenlensError(
            "a lens needs at least one prompt; build them with pair.builder.build(example)."
        )
    rows, positions = [], []
    for row, prompt in enumerate(prompts):
        some = _of_one(row, prompt, where, len(prompts))
        rows += [row] * len(some)
        positions += some
    return Tokens(tuple(prompts), torch.tensor(rows), torch.tensor(positions))


def _of_one(row: int, prompt: Prompt, where: Where, n: int) -> list[int]:
    named = f"prompt {row} ({prompt.example.id!r})"
    if isinstance(where, str):
        if where in ("all", "decision"):
            return list(range(len(prompt))) if where == "all" else [len(prompt) - 1]
        if where not in ROLES:
            raise FrankenlensError(
                f"no role {where!r}; choose one of {', '.join((*ROLES, 'decision', 'all'))}."
            )
        found = prompt.positions(where).tolist()
        if not found:
            held = ", ".join(dict.fromkeys(prompt.roles))
            raise FrankenlensError(
                f"{named} has no {where!r} token; it holds {held}. Leave it out, or give it one."
            )
        return found
    per_row = [one for one in where if not isinstance(one, int | np.integer)]
    if per_row and (len(per_row) != len(where) or len(where) != n):
        raise FrankenlensError(
            f"where holds {len(where)} lists of positions for {n} prompts; give one list for each prompt, or one list "
            "of integers for all."
        )
    given = [int(position) for position in (per_row[row] if per_row else where)]  # type: ignore[arg-type]
    for position in given:
        if not -len(prompt) <= position < len(prompt):
            raise FrankenlensError(
                f"{named} has {len(prompt)} tokens, so no position {position}; give one below {len(prompt)}."
            )
    if not given:
        raise FrankenlensError(f"{named} is given no position; leave the prompt out, or name one.")
    return [position % len(prompt) for position in given]


def words(prompt: Prompt, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids as text, in the shape of `ids`."""
    flat = np.asarray(ids)
    text = {int(token): prompt.builder.decode([int(token)]) for token in np.unique(flat)}
    return np.array([text[int(token)] for token in flat.ravel()], dtype=str).reshape(flat.shape)
