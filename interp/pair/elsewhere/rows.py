"""Replies that something else wrote, row by row, whichever of the common ways they are kept in.

A row of JSON lines (or a JSON array, CSV, parquet) holds a reply as text, as token ids, or both, and says which
question it answers. Read are rows of one's own; vLLM's `RequestOutput` as a dictionary; requests to a server as
OpenAI's batches keep them (vLLM, SGLang); SGLang's `generate`; lm-eval's logged samples; and what verl, EasyR1 and TRL
log while they train.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import shown
from interp.questions.readers.report import Failure, RowError
from interp.questions.readers.tables import rows_of

IDS = ("trace_ids", "token_ids", "output_token_ids", "output_ids", "response_ids", "completion_ids", "ids")
TEXT = ("trace", "text", "response", "output", "completion", "generated_text", "prediction", "reply")
NAMES = ("custom_id", "id", "question_id", "uid")
"""A server gives replies an `id` of its own; what it was sent is `custom_id`. Its `request_id` counts requests."""
PROMPT_IDS = ("prompt_token_ids", "prompt_ids", "input_ids")
PROMPT = ("prompt", "input")
QUESTION = ("question", "problem", "query")
FINISH = ("finish_reason", "finish", "stop_reason")
ENDED = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length", "max_tokens": "length"}
"""What engines say of how a reply ended, and what is meant."""


@dataclass(frozen=True)
class TraceRow:
    """A reply as a row holds it.

    Attributes:
        row: its number in the file.
        names: of the question that it answers, as far as the row says; a server's own may be among them.
        question: its text, or that of the whole prompt; None.
        prompt_ids: tokens of the prompt; None.
        text: of the reply; None where there are ids alone.
        ids: of the reply's tokens; None where there is text alone.
        finish: "stop" (it ended its turn), "length" (it was cut off), "" (not said).
        model: in, rl or another name, where one file holds the replies of several.
        sampled: whether the row says that its tokens were drawn, at a temperature above 0.
    """

    row: int
    names: tuple[str, ...] = ()
    question: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    text: str | None = None
    ids: tuple[int, ...] | None = None
    finish: str = ""
    model: str | None = None
    sampled: bool = False


def trace_rows(path: str | Path, encoding: str | None = None) -> tuple[list[TraceRow], list[Failure]]:
    """The replies of a file, and the rows that hold none, with reasons.

    Args:
        path: JSON lines, a JSON array, CSV or parquet.
        encoding: of text; by default UTF-8, or the UTF-16 that the file shows.

    Raises:
        FrankenlensError: no such file, or one of another kind.
    """
    rows, failures = rows_of(Path(path), encoding)
    found = []
    for number, row in rows:
        try:
            found.append(_read(number, row))
        except RowError as error:
            failures.append(Failure(number, str(error)))
    return found, failures


def _read(number: int, row: Mapping[str, Any]) -> TraceRow:
    reply, around = _reply(row), _around(row)
    ids, text = _ids(reply, IDS), _text(reply, TEXT)
    if ids is None and text is None:
        raise RowError(
            f"no reply in it: give its text as one of {', '.join(TEXT[:4])}, or its token ids as one of "
            f"{', '.join(IDS[:4])}; it has {', '.join(map(shown, list(row)[:8])) or 'nothing'}"
        )
    return TraceRow(
        number,
        _names(around),
        _text(around, QUESTION) or _text(around, PROMPT),
        _ids(around, PROMPT_IDS),
        text,
        ids,
        _finish({**around, **reply}),
        _text(around, ("model",)),
        _is_sampled(around),
    )


def _reply(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a row that holds the one reply."""
    inside: Any = row
    for key in ("response", "body"):  # a line of an OpenAI batch
        if isinstance(inside, Mapping) and isinstance(inside.get(key), Mapping):
            inside = inside[key]
    if isinstance(inside, Mapping) and inside.get("error"):
        raise RowError(f"the request failed: {shown(str(inside['error']))}")
    for key in ("choices", "outputs", "resps"):
        several = inside.get(key) if isinstance(inside, Mapping) else None
        if not isinstance(several, Sequence) or isinstance(several, str):
            continue
        if key != "choices" or all(isinstance(one, Mapping) for one in several):  # else those of a question
            return _only(several, key)
    if not isinstance(inside, Mapping):
        raise RowError(f"{shown(inside)} is no reply")
    return {**inside, **_meta(inside)}


def _only(several: Any, key: str) -> Mapping[str, Any]:
    while isinstance(several, Sequence) and not isinstance(several, str):
        if len(several) != 1:
            raise RowError(f"{key!r} holds {len(several)} replies; write one row for each that is meant")
        several = several[0]
    if isinstance(several, str):
        return {"text": several}
    if not isinstance(several, Mapping):
        raise RowError(f"{key!r} holds {shown(several)}, which is no reply")
    message = several.get("message")
    if not isinstance(message, Mapping):
        return several
    for part in ("reasoning_content", "reasoning"):
        if message.get(part):
            raise RowError(
                f"the server took the reasoning out of the reply ({part!r}), so its tokens are not known any more; "
                "let it write replies whole (vLLM, SGLang: without --reasoning-parser)"
            )
    return {**several, "text": message.get("content")}


def _meta(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What SGLang says of a reply beside its text."""
    meta = row.get("meta_info")
    return meta if isinstance(meta, Mapping) else {}


def _around(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a row says beside the reply: of lm-eval's, the question's own fields too."""
    doc = row.get("doc")
    return {**doc, **{k: v for k, v in row.items() if k != "doc"}} if isinstance(doc, Mapping) else row


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    values = (row.get(key) for key in NAMES)
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]  # a column with a gap
    return tuple(str(v) for v in whole if type(v) is int or (isinstance(v, str) and v))


def _text(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((value for key in keys if isinstance(value := row.get(key), str)), None)


def _ids(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[int, ...] | None:
    for key in keys:
        value = row.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str):  # a cell of a CSV
            try:
                value = json.loads(value)
            except ValueError:
                raise RowError(f"{key!r} is no list of token ids: {shown(value)}") from None
        whole = isinstance(value, Sequence) and all(type(one) is int and one >= 0 for one in value)
        if not whole:
            raise RowError(
                f"{key!r} must be a list of token ids, whole numbers from 0 on; found {shown(value)}"
            )
        return tuple(value)
    return None


def _finish(row: Mapping[str, Any]) -> str:
    meant = row.get("finish_reason")
    meant = meant.get("matched") if isinstance(meant, Mapping) else row.get("stop_reason") if meant else None
    if isinstance(meant, str) and meant.lower() not in ENDED:
        raise RowError(
            f"it was stopped at the text {shown(meant)}, which engines take out of a reply; let it end its turn"
        )
    for key in FINISH:
        value = row.get(key)
        if isinstance(value, Mapping):  # SGLang: {"type": "stop", "matched": 151645}
            value = value.get("type")
        if isinstance(value, str) and value:
            return ENDED.get(value.lower(), "")
    return ""


def _is_sampled(row: Mapping[str, Any]) -> bool:
    inside = [row, *(row[key] for key in ("sampling_params", "body") if isinstance(row.get(key), Mapping))]
    found = [value for one in inside if isinstance(value := one.get("temperature"), (int, float))]
    return any(value > 0 for value in found)
