"""Traces of elsewhere, aligned to prompts: token for token, or refused with the row and the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from hooks.errors import FrankenlensError, nearest, shown
from interp.pair.elsewhere.rows import TraceRow, trace_rows
from interp.prompts import Prompt
from interp.questions.readers.report import RowError

MODELS = ("in", "rl", "base")
"""What a row can say of whose it is."""


@dataclass(frozen=True, eq=False)
class Traces:
    """What one model wrote elsewhere, for the prompts that it was asked.

    Attributes:
        ids: example's id to the tokens of its trace.
        left_out: example's id to why there is none.
        source: where they are from, in words.
        sampled: ids of those whose file says that they were drawn, at a temperature.
        open_ended: ids of those of which nobody says whether they ended or were cut off.
        strangers: numbers of rows that answer none of the prompts.
        unread: number of a row to why it holds no reply.
    """

    ids: Mapping[str, tuple[int, ...]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    source: str = "given"
    sampled: frozenset[str] = frozenset()
    open_ended: frozenset[str] = frozenset()
    strangers: tuple[int, ...] = ()
    unread: Mapping[int, str] = field(default_factory=dict)

    def of(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of every prompt's trace.

        Raises:
            FrankenlensError: one has none; names it and says why.
        """
        for prompt in prompts:
            name = prompt.example.id
            if name not in self.ids:
                why = self.left_out.get(name, "it is not among them")
                raise FrankenlensError(
                    f"no trace of example {name!r} in {self.source}: {why}. Leave the example out, or give its trace."
                )
        return [list(self.ids[prompt.example.id]) for prompt in prompts]


def at_least_as_long(
    max_new_tokens: int, traces: Mapping[str, Traces] | None, prompts: Sequence[Prompt]
) -> int:
    """The most that is written here beside traces of elsewhere: as much as the longest of them has."""
    given = (ids for one in (traces or {}).values() for ids in one.of(prompts))
    return max([max_new_tokens, *map(len, given)])


def read_traces(
    path: str | Path,
    prompts: Sequence[Prompt],
    model: str = "",
    encoding: str | None = None,
    several: bool = False,
) -> Traces:
    """The traces of a file that belong to these prompts (`interp.pair.elsewhere.rows` says how rows may look).

    A row belongs to the prompt whose example has its id; without ids, to the prompt whose tokens, text or question it
    holds. Token ids are taken as they are; text is tokenized, and refused where its tokens do not say it again. Where
    a row says that the reply ended its turn and does not hold the token that ends it, that token is added.

    Args:
        path: JSON lines, a JSON array, CSV or parquet.
        prompts: what is asked here.
        model: whose: in or rl; rows that say they are the other's are left out.
        encoding: of the file's text.
        several: the file holds the replies of several models, so that every row must say whose it is.

    Raises:
        FrankenlensError: no such file, or no row of it belongs to any of these prompts; says what the first holds.
    """
    if not prompts:
        raise FrankenlensError("read_traces needs the prompts that the traces belong to")
    rows, failures = trace_rows(path, encoding)
    rows = _of_model(rows, model, several, path)
    belongs = _Belonging(prompts)
    ids: dict[str, tuple[int, ...]] = {}
    left_out: dict[str, str] = {}
    first: dict[str, tuple] = {}
    sampled, open_ended, strangers = set(), set(), []
    by_name = any(
        belongs.knows(row) for row in rows
    )  # then names decide: one text may be asked of many images
    for row in rows:
        prompt = None if by_name and row.names and not belongs.knows(row) else belongs.of(row)
        if prompt is None:
            strangers.append(row)
            continue
        name = prompt.example.id
        if name in ids and (row.ids, row.text) == first[name]:
            continue  # lm-eval logs a reply once for each of its filters
        if name in ids or name in left_out:
            ids.pop(name, None)
            left_out[name] = f"row {row.row} is a second reply to it; give one"
            continue
        try:
            belongs.require_asked(row, prompt)
            ids[name], said = _tokens(row, prompt)
            first[name] = (row.ids, row.text)
        except RowError as error:
            left_out[name] = f"row {row.row}: {error}"
            continue
        sampled |= {name} if row.sampled else set()
        open_ended |= set() if said else {name}
    if not ids:
        raise FrankenlensError(_nothing(path, prompts, strangers, left_out, failures))
    for prompt in prompts:
        if prompt.example.id not in ids:
            left_out.setdefault(prompt.example.id, "no row answers it")
    return Traces(
        ids,
        left_out,
        str(path),
        frozenset(sampled),
        frozenset(open_ended & set(ids)),
        tuple(row.row for row in strangers),
        {one.row: one.reason for one in failures},
    )


def _of_model(rows: Sequence[TraceRow], model: str, several: bool, path: str | Path) -> list[TraceRow]:
    """Those of one model.

    Raises:
        FrankenlensError: a row of several models' does not say whose it is, or none is of this one.
    """
    said = [(row, (row.model or "").lower()) for row in rows]
    if several and (other := next((one for one in said if one[1] not in MODELS), None)):
        raise FrankenlensError(
            f"{path} is given for several models, and row {other[0].row} says "
            f"{f'model {other[0].model!r}' if other[0].model else 'nothing of whose it is'}; let each say one of "
            f'{", ".join(MODELS)} ("model": "rl"), or give in=FILE rl=FILE'
        )
    kept = [row for row, whose in said if not model or whose == model.lower() or whose not in MODELS]
    if rows and not kept:
        raise FrankenlensError(f"{path} holds no trace of {model.upper()}: its rows say {said[0][1]!r}")
    return kept


class _Belonging:
    """Which prompt a row is the reply to."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._by_name = {prompt.example.id: prompt for prompt in prompts}
        self._by_ids = _unique(
            (collapsed(prompt.ids[: prompt.n_prompt_tokens], prompt), prompt) for prompt in prompts
        )
        self._by_text = _unique(
            (text, prompt)
            for prompt in prompts
            for text in {prompt.prompt_text.strip(), prompt.example.question.strip()}
        )
        self._some = prompts[0]

    def knows(self, row: TraceRow) -> bool:
        """Whether a row has the name of a prompt."""
        return any(name in self._by_name for name in row.names)

    def of(self, row: TraceRow) -> Prompt | None:
        named = next((self._by_name[name] for name in row.names if name in self._by_name), None)
        if named is not None:
            return named
        if row.prompt_ids is not None and (found := self._by_ids.get(collapsed(row.prompt_ids, self._some))):
            return found
        found = self._by_text.get((row.question or "").strip())
        return None if found is not None and found.has_image and row.names else found

    def require_asked(self, row: TraceRow, prompt: Prompt) -> None:
        """A row whose name is one prompt's and whose text is another's is neither's reply.

        Raises:
            RowError: names both.
        """
        other = self._by_text.get((row.question or "").strip())
        if other is not None and other is not prompt:
            raise RowError(f"it has this id, and the question of {other.example.id!r}")


def _unique(pairs) -> dict:
    """Keys that stand for one prompt alone."""
    found: dict = {}
    twice = set()
    for key, prompt in pairs:
        if key in found and found[key] is not prompt:
            twice.add(key)
        found[key] = prompt
    return {key: prompt for key, prompt in found.items() if key not in twice and key}


def collapsed(ids: Sequence[int], prompt: Prompt) -> tuple[int, ...]:
    """With one placeholder for an image, however many tokens it was given."""
    image = prompt.builder.image_token_id
    return tuple(one for token, run in groupby(ids) for one in ([token] if token == image else list(run)))


def _tokens(row: TraceRow, prompt: Prompt) -> tuple[tuple[int, ...], bool]:
    """The tokens of a reply, and whether it is known how it ended.

    Raises:
        RowError: they cannot be had, or are not those of the prompt.
    """
    builder = prompt.builder
    own = prompt.ids[: prompt.n_prompt_tokens]
    if row.prompt_ids is not None:
        given = row.prompt_ids
        while given and given[0] == builder.pad_id != own[0]:  # padded on the left
            given = given[1:]
        _require_same(collapsed(given, prompt), collapsed(own, prompt), prompt)
    ids = _of_text(row, prompt) if row.ids is None else list(row.ids)
    if row.ids is not None:
        if tuple(ids[: len(own)]) == tuple(own):  # some log prompt and reply as one
            ids = ids[len(own) :]
        _require_words(ids, row, prompt)
    if builder.image_token_id in ids:
        raise RowError(f"the reply holds the placeholder of an image, {builder.image_token!r}")
    while ids and ids[0] == builder.pad_id:  # padded on the left
        ids.pop(0)
    while ids and ids[-1] == builder.pad_id and builder.pad_id not in builder.end_ids:
        ids.pop()
    end = next((place for place, token in enumerate(ids) if token in builder.end_ids), None)
    if end is not None:
        if not {*ids[end + 1 :]} <= {builder.pad_id, *builder.end_ids}:
            raise RowError(f"more stands behind its token {end}, which ends the turn")
        return tuple(ids[: end + 1]), True
    if row.finish == "stop":
        ids.append(_end_of(prompt))
    if not ids:
        raise RowError("the reply is empty")
    return tuple(ids), row.finish != ""


def _of_text(row: TraceRow, prompt: Prompt) -> list[int]:
    text = row.text or ""
    if text.startswith(prompt.prompt_text):
        text = text[len(prompt.prompt_text) :]
    ids = prompt.builder.encode(text)
    said = prompt.builder.decode(ids)
    if said != text:
        place = next(
            (i for i, (a, b) in enumerate(zip(said, text, strict=False)) if a != b), min(len(said), len(text))
        )
        raise RowError(
            f"its text is not what its tokens say: at character {place}, {shown(text[place : place + 20])} becomes "
            f"{shown(said[place : place + 20])}; give token ids"
        )
    return ids


def _require_same(given: Sequence[int], own: Sequence[int], prompt: Prompt) -> None:
    if tuple(given) == tuple(own):
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(given, own, strict=False)) if a != b), min(len(given), len(own))
    )
    around = slice(max(0, place - 2), place + 4)
    theirs, ours = (shown(prompt.builder.decode(ids[around])) for ids in (given, own))
    raise RowError(
        f"it was written after another prompt: from token {place} on that says {theirs}, and here {ours} (--system, "
        "--template, --instruction)"
    )


def _require_words(ids: Sequence[int], row: TraceRow, prompt: Prompt) -> None:
    n = getattr(prompt.builder, "n_logits", 0) or len(prompt.builder.tokenizer)
    if strange := [token for token in ids if token >= n]:
        raise RowError(f"token {strange[0]} is none of this model's {n:,}: the ids are of another tokenizer")
    if row.text is None:
        return
    plain = prompt.builder.tokenizer.decode(ids, skip_special_tokens=True).strip()
    if row.text.strip() not in (plain, prompt.builder.decode(ids).strip()):
        raise RowError(
            f"its ids say {shown(plain[:40])} here and its text is {shown(row.text.strip()[:40])}: the ids are of "
            "another tokenizer"
        )


def _end_of(prompt: Prompt) -> int:
    """The token that ends a turn of this prompt's template."""
    builder = prompt.builder
    if not builder.end_ids:
        raise RowError(
            "it ended its turn, and no token of this tokenizer ends one (end_of_turn of the trace format)"
        )
    said = [(prompt.prompt_text.rfind(builder.decode([token])), token) for token in builder.end_ids]
    place, token = max(said)
    eos = builder.tokenizer.eos_token_id
    return token if place >= 0 or eos not in builder.end_ids else eos


def _nothing(path, prompts, strangers, left_out, failures) -> str:
    told = [f"row {one.row}: {one.reason}" for one in failures[:1]]
    told += [f"example {name!r}: {why}" for name, why in list(left_out.items())[:1]]
    if strangers:
        first = strangers[0]
        own = prompts[0].example
        named = " and ".join(map(repr, first.names))
        what = f"id {named}" if named else f"question {shown((first.question or '')[:60])}"
        near = nearest(first.names[0], [one.example.id for one in prompts]) if named else ""
        told.append(
            f"row {first.row} has the {what}, and no prompt here has it; here they are such as {own.id!r}, "
            f"{shown(own.question[:60])}. {near or ''}".rstrip()
        )
    return f"no row of {path} is a reply to one of these {len(prompts)} prompts: {'; '.join(told) or 'it has none'}"
