"""What differs between two tokenizers and chat templates: which tokens a text becomes, and which text a question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hooks.processors import tokenizer_of
from hooks.stored.inventory import ABSENT
from interp.pair.agreement.difference import (
    Difference,
    Setting,
    acting,
    named,
    said,
    settings,
    unequal,
    with_settings,
)

_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
_TABLES = ("vocab", "merges")
TEXTS = (
    "What is 12 + 345.67? It's 3,141,592 - isn't it?",
    " leading and  double  spaces, trailing ",
    "first line\nsecond line\r\n\n\tindented\u00a0text",
    "caf\u00e9 cafe\u0301 \ufb01ne \u2460 \uff21\uff22 \u4e09\u500b\u5706 \u3053\u3093 \uc548\ub155 \u0643\u0645",
    "def f(x): return {x: [y ** 2 for y in x]}  # `code` <b>tag</b> \\boxed{\\frac{1}{2}}",
    "UPPER lower CamelCase snake_case we'll I'M don'T \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<think> the red circle </think> answer 5",
    "",
)
"""What tokenizers treat in different ways: spaces, digits, contractions, case, accents, scripts, code, emoji."""
_ASKED: Sequence[tuple[str | None, int]] = ((None, 1), (None, 2), (None, 0), ("Think first.", 1))
"""System message and number of images of the conversations that templates are compared on."""


def tokenizer_differences(a: Any, b: Any) -> list[Difference]:
    """What differs in vocabulary, special tokens, and the way text is split."""
    found: list[Difference] = [*_of_vocabulary(a, b), *_of_special_tokens(a, b)]
    if not found and a.is_fast and b.is_fast:
        parts = [t.backend_tokenizer.to_str() for t in (a, b)]
        if parts[0] != parts[1]:
            found = _of_parts(json.loads(parts[0]), json.loads(parts[1]), list(_texts(a)))
    parted = next(((one, two) for one, two in zip(_split(a), _split(b), strict=True) if one != two), None)
    for name in ("bos_token", "unk_token"):
        one, two = (getattr(t, name, None) for t in (a, b))
        if one != two:
            text = f"special token {name}: {one!r} and {two!r}"
            found.append(Difference(name, text, enters=parted is not None))
    if parted is not None and not any(one.enters for one in found):
        text = f"tokenization: one text becomes the ids {parted[0][:12]} and {parted[1][:12]}"
        found.append(Difference("tokenization", text))
    return found


def template_differences(a: Any, b: Any) -> list[Difference]:
    """Where the conversations part that the chat templates of two processors (or tokenizers) write.

    Templates that write the same are spelled in two ways.
    """
    written = [[_written(one, system, images) for system, images in _ASKED] for one in (a, b)]
    for first, second in zip(*written, strict=True):
        if first != second:
            return [Difference("chat_template", f"chat template, {_parting(first, second)}")]
    first, second = (chat_template(one) or "" for one in (a, b))
    if first == second:
        return []
    text = f"chat template, spelled in two ways that write the same, {_parting(first, second)}"
    return [Difference("chat_template", text, enters=False)]


def chat_template(processor: Any) -> str | None:
    """The chat template of a processor, or of its tokenizer."""
    return getattr(processor, "chat_template", None) or tokenizer_of(processor).chat_template


def _of_vocabulary(a: Any, b: Any) -> Iterator[Difference]:
    ours, theirs = a.get_vocab(), b.get_vocab()
    for token in sorted(set(ours) | set(theirs), key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            ids = f"id {ours.get(token, ABSENT)} and {theirs.get(token, ABSENT)}"
            yield Difference(f"token {token!r}", f"token {token!r}: {ids}")


def _of_special_tokens(a: Any, b: Any) -> Iterator[Difference]:
    """The end of a turn, and what is skipped where a text is read; what pads is masked and may differ."""
    if a.eos_token != b.eos_token:
        yield Difference("eos_token", f"special token eos_token: {a.eos_token!r} and {b.eos_token!r}")
    special = [{index: token.special for index, token in t.added_tokens_decoder.items()} for t in (a, b)]
    for index in sorted(set(special[0]) & set(special[1])):
        if special[0][index] != special[1][index]:
            token = f"token {a.convert_ids_to_tokens(index)!r}"
            yield Difference(token, f"{token} is special in only one of them")


def _of_parts(a: Mapping[str, Any], b: Mapping[str, Any], texts: Sequence[str]) -> list[Difference]:
    """What differs in the parts of two fast tokenizers, as JSON; one that changes how no text is split is spelling."""
    from tokenizers import Tokenizer

    ours, theirs = ({one: v for one, v in settings(t) if one[0] in _PARTS} for t in (a, b))
    which = unequal(ours, theirs)
    tables = [one for one in which if one[-1] in _TABLES]
    patterns = [one for one in which if isinstance(ours.get(one), str) and isinstance(theirs.get(one), str)]
    certain = [one for one in which if one in tables or (one in patterns and one[0] != "decoder")]

    def ids(parts: Any) -> list[list[int]]:
        made: Any = Tokenizer.from_str(json.dumps(parts))
        coded = [
            made.encode(text, add_special_tokens=special).ids for text in texts for special in (True, False)
        ]
        return [*coded, *([ord(letter) for letter in made.decode(one)] for one in coded)]

    own = ids(a)

    def act(some: Sequence[Setting]) -> bool:
        try:
            return ids(with_settings(dict(a), theirs, some)) != own
        except Exception:  # tokenizers raises nothing finer for parts that do not fit
            return True

    live = [*certain, *acting([one for one in which if one not in certain], act)]
    return [
        Difference(
            f"tokenizer {one[0]}", f"tokenizer part {one[0]!r}: {_short(one, ours, theirs)}", one in live
        )
        for one in which
    ]


def _short(one: Setting, ours: Mapping[Setting, Any], theirs: Mapping[Setting, Any]) -> str:
    return named(one) if one[-1] in _TABLES else said(one, ours, theirs)


def _texts(tokenizer: Any) -> Iterator[str]:
    yield from TEXTS
    yield " ".join(token for token in sorted(tokenizer.get_added_vocab()))


def _split(tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer(text, add_special_tokens=special)["input_ids"]
        for text in TEXTS
        for special in (True, False)
    ]


def _written(processor: Any, system: str | None, images: int) -> str:
    """A conversation as the template writes it, or why it does not."""
    textual = processor is tokenizer_of(processor)

    def said_by(role: str, text: str, before: int) -> dict[str, Any]:
        content: Any = [{"type": "image"}] * before + [{"type": "text", "text": text}]
        return {"role": role, "content": text if textual else content}

    messages = [] if system is None else [said_by("system", system, 0)]
    messages.append(said_by("user", "How many?", 0 if textual else images))
    try:
        return processor.apply_chat_template(
            messages, chat_template=chat_template(processor), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template raises what it wants, and many refuse a system message
        return f"{type(error).__name__}: {error}"


def _parting(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"from character {at}: {a[at : at + 40]!r} and {b[at : at + 40]!r}"
