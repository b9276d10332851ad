"""Whether two models are a pair: same architecture, vocabulary, processor and chat template; and if not, in what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from hooks.processors import tokenizer_of

# Settings that record how a checkpoint was made or stored and do not enter its forward pass.
_HISTORY = frozenset(
    "_name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range "
    "attention_dropout hidden_dropout dropout bos_token_id eos_token_id pad_token_id _pad_token_id "
    "_attn_implementation".split()
)
# Names of classes and places, which differ between image backends and machines for the same settings.
_CLASS_NAMES = frozenset(
    "processor_class image_processor_type feature_extractor_type video_processor tokenizer chat_template auto_map "
    "_processor_class name_or_path tokenizer_file".split()
)
_TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
_ABSENT = "nothing"


def model_differences(a: nn.Module, b: nn.Module) -> list[str]:
    """What differs in class, configuration, and names, shapes and types of tensors; values are not compared."""
    if type(a) is not type(b):
        return [f"architecture: {type(a).__name__} and {type(b).__name__}"]
    found = [f"setting {line}" for line in _unequal(_settings(a.config), _settings(b.config))]
    ours, theirs = dict(a.state_dict()), dict(b.state_dict())
    for name in dict.fromkeys([*ours, *theirs]):
        first, second = (_described(tensors.get(name)) for tensors in (ours, theirs))
        if first != second:
            found.append(f"tensor {name}: {first} and {second}")
    return found


def processor_differences(a: Any, b: Any, templates: bool = True) -> list[str]:
    """What differs in tokens, tokenization, image settings and, with `templates`, chat template."""
    same = a is tokenizer_of(a)  # a text-only model has its tokenizer alone, which is compared as such
    settings = ({}, {}) if same else (_settings(a, _CLASS_NAMES), _settings(b, _CLASS_NAMES))
    return [
        *tokenizer_differences(tokenizer_of(a), tokenizer_of(b)),
        *(f"processor setting {line}" for line in _unequal(*settings)),
        *(template_differences(chat_template(a), chat_template(b)) if templates else ()),
    ]


def tokenizer_differences(a: Any, b: Any) -> list[str]:
    """What differs in vocabulary, special tokens, and the way text is split."""
    found = []
    ours, theirs = a.get_vocab(), b.get_vocab()
    for token in sorted(set(ours) | set(theirs), key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            found.append(f"token {token!r}: id {ours.get(token, _ABSENT)} and {theirs.get(token, _ABSENT)}")
    for name in ("bos_token", "eos_token", "unk_token"):  # what pads is masked and may differ
        if getattr(a, name, None) != getattr(b, name, None):
            found.append(f"special token {name}: {getattr(a, name, None)!r} and {getattr(b, name, None)!r}")
    special = [{index: token.special for index, token in t.added_tokens_decoder.items()} for t in (a, b)]
    for index in sorted(set(special[0]) & set(special[1])):
        if special[0][index] != special[1][index]:
            found.append(f"token {a.convert_ids_to_tokens(index)!r} is special in only one of them")
    if not found and a.is_fast and b.is_fast:
        parts = [json.loads(t.backend_tokenizer.to_str()) for t in (a, b)]
        found = [
            f"tokenizer part {part!r}"
            for part in _TOKENIZER_PARTS
            if parts[0].get(part) != parts[1].get(part)
        ]
    return found


def template_differences(a: str | None, b: str | None) -> list[str]:
    """Where two chat templates part."""
    if a == b:
        return []
    first, second = a or "", b or ""
    at = next(
        (i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
        min(len(first), len(second)),
    )
    return [f"chat template, from character {at}: {first[at : at + 40]!r} and {second[at : at + 40]!r}"]


def chat_template(processor: Any) -> str | None:
    """The chat template of a processor, or of its tokenizer."""
    return getattr(processor, "chat_template", None) or tokenizer_of(processor).chat_template


def _settings(owner: Any, ignored: frozenset[str] = _HISTORY) -> dict[str, Any]:
    return dict(_flat(owner.to_dict(), ignored))


def _flat(
    settings: Mapping[Any, Any], ignored: frozenset[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in ignored:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, ignored, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value.tolist() if isinstance(value, np.ndarray) else value


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*a, *b]):
        first, second = a.get(key, _ABSENT), b.get(key, _ABSENT)
        listed = [list(v) if isinstance(v, (tuple, list)) else v for v in (first, second)]
        if listed[0] != listed[1]:
            yield f"{key}: {first!r} and {second!r}"


def _described(tensor: Any) -> str:
    return _ABSENT if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
