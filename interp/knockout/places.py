"""Where a knockout acts in the text: roles, positions, and the token before the reasoning or the answer.

While a trace is written, a token has the role that its prefix shows. A full pass over the finished trace cuts the same
edges, but for what only later tokens tell: pieces of a delimiter that takes several, answers that another follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from hooks import FrankenlensError
from hooks.errors import nearest
from interp.prompts import PromptBatch
from interp.prompts.reading import TraceReader
from interp.prompts.roles import ROLES, Role
from interp.sweep.places import Where, where_label, where_mask

Place = Where | tuple[Where, ...]
"""Tokens of the text, or the union of several such places."""


def before_reasoning(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The token before the reasoning: it predicts the first token of the role `reasoning`."""
    return _before(batch, "reasoning")


def before_answer(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The token before the answer: it predicts the first token of the role `answer`, the last answer's of several."""
    return _before(batch, "answer")


BEFORE = {"before reasoning": before_reasoning, "before answer": before_answer}
NAMES = (*ROLES, "decision", "all", *BEFORE)


def _before(batch: PromptBatch, role: str) -> Bool[Tensor, "batch pos"]:
    mask = torch.zeros_like(batch.roles, dtype=torch.bool)
    starts = batch.columns(torch.tensor([p.n_prompt_tokens - 1 for p in batch.prompts]).to(batch.lengths))
    for row, (prompt, start) in enumerate(zip(batch.prompts, starts.tolist(), strict=True)):
        own = prompt.roles[prompt.n_prompt_tokens - 1 :]
        following = (*own[1:], TraceReader(prompt).next)
        for step, (here, then) in enumerate(zip(own, following, strict=True)):
            mask[row, start + step] = here != role and then == role
    return mask


def parts_of(place: object) -> tuple:
    """The single places of a place, names replaced by the functions that they stand for."""
    parts = place if isinstance(place, tuple) else (place,)
    return tuple(BEFORE.get(part, part) if isinstance(part, str) else part for part in parts)


def place_label(place: object) -> str:
    """How a place is called in a result."""
    names = {function: name for name, function in BEFORE.items()}
    parts = [names.get(part) or where_label(part) for part in parts_of(place)]
    return "+".join(parts)


def require_place(place: object) -> None:
    """Refuse what is no place.

    Raises:
        FrankenlensError: an unknown role, or nothing.
    """
    parts = parts_of(place)
    if not parts:
        raise FrankenlensError("knockout: an empty tuple is no place; give at least one role or position")
    for part in parts:
        if isinstance(part, str) and part not in NAMES:
            hint = nearest(part, NAMES)
            raise FrankenlensError(
                f"knockout: there is no role {part!r}; choose of {', '.join(NAMES)}. {hint}".strip()
            )
        if not isinstance(part, (str, int)) and not callable(part):
            raise FrankenlensError(f"knockout: {part!r} is no role, no position and no function of a batch")


def require_patches(place: object) -> None:
    """Refuse what is no place in an image.

    Raises:
        FrankenlensError: a role, a negative number, or nothing.
    """
    for part in parts_of(place):
        if part != "all" and not callable(part) and not (isinstance(part, int) and part >= 0):
            raise FrankenlensError(
                f"knockout in the vision tower: {part!r} is no place in an image; give 'all', a patch counted from 0, "
                "or region(...)"
            )


def place_mask(place: object, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The tokens of a batch that are meant; never padding."""
    parts = [where_mask(part, batch) for part in parts_of(place)]
    return torch.stack(parts).any(0) & batch.mask("all")


class Unfolding:
    """A batch, and the tokens that are written after it: which columns run now, and who is meant in all of them.

    Attributes:
        start, stop: the columns of the current forward pass.
    """

    def __init__(self, batch: PromptBatch, places: Sequence[object]) -> None:
        self.batch = batch
        self.start, self.stop = 0, batch.roles.shape[1]
        self._places = list(dict.fromkeys(places))
        self._readers: list[TraceReader] = []
        self._masks: dict[object, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Stand before the first pass over the batch."""
        self.start, self.stop = 0, self.batch.roles.shape[1]
        self._readers = []
        self._masks = {place: place_mask(place, self.batch) for place in self._places}

    def advance(self, ids: Sequence[Sequence[int]]) -> None:
        """The tokens of every row that the next pass runs.

        Raises:
            FrankenlensError: a place is a function of the batch, which knows nothing of tokens written later.
        """
        if not self._readers:
            self._readers = [TraceReader(prompt) for prompt in self.batch.prompts]
        step, n = self.stop - self.batch.roles.shape[1], len(ids[0])
        read = [[reader.feed(token) for token in row] for reader, row in zip(self._readers, ids, strict=True)]
        for place, mask in self._masks.items():
            new = torch.zeros(len(ids), n, dtype=torch.bool)
            for part in parts_of(place):
                new |= torch.tensor(list(self._written(part, read, step)), dtype=torch.bool)
            self._masks[place] = torch.cat([mask, new.to(mask.device)], dim=1)
        self.start, self.stop = self.stop, self.stop + n

    def _written(self, part: Where, read: list[list[tuple[Role, Role]]], step: int) -> Iterator[list[bool]]:
        """Which of the tokens just written a place means, row by row."""
        roles: dict[object, str] = {before_reasoning: "reasoning", before_answer: "answer"}
        for length, row in zip(self.batch.lengths.tolist(), read, strict=True):
            if isinstance(part, int):
                yield [part == length + step + i for i in range(len(row))]
            elif isinstance(part, str):
                yield [part in ("all", "decision") or own == part for own, _ in row]
            elif part in roles:
                yield [own != roles[part] and following == roles[part] for own, following in row]
            else:
                raise FrankenlensError(
                    f"knockout: the function {where_label(part)} cannot be asked about tokens that are still to be "
                    f"written; while generating give roles or positions ({', '.join(NAMES)})"
                )

    def tokens(self, place: object) -> Bool[Tensor, "batch written"]:
        """The tokens of a place, of all that is written."""
        return self._masks[place]

    def edges(self, source: object, target: object) -> Bool[Tensor, "batch query key"]:
        """The edges between two places that lie in the current pass."""
        queries, keys = self._masks[target][:, self.start : self.stop], self._masks[source][:, : self.stop]
        return (queries[:, :, None] & keys[:, None, :]).tril(self.start)
