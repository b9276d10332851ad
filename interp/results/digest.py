"""Anything as plain data that differs where the thing does: arrays by the bits of their numbers, not as printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor


def digest(value: Any) -> Any:
    """Plain data for a manifest, or to be fingerprinted.

    Of a tensor or an array the SHA-256 of its numbers, shape and type; of a dataclass its fields; of what is neither
    these, nor plain, nor made of plain data, its `repr`.
    """
    if isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous().double().numpy().tobytes()
        return [sha256(whole).hexdigest(), list(value.shape), str(value.dtype)]
    if isinstance(value, np.ndarray):
        whole = np.ascontiguousarray(value).tobytes()
        return [sha256(whole).hexdigest(), list(value.shape), str(value.dtype)]
    if isinstance(value, (tuple, list)):
        return [digest(part) for part in value]
    if isinstance(value, Mapping):
        return [[repr(name), digest(part)] for name, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, digest({one.name: getattr(value, one.name) for one in fields(value)})]
    return value if value is None or isinstance(value, (int, float, str, bool)) else repr(value)
