"""The shipped models are opened once a worker, and every command must leave them as it found them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import embedded
from hooks import HookedVLM
from interp.pair import Pair

SHIPPED = embedded.path("in").parent
OWN_MODELS = ("test_freeze.py", "test_triple.py", "test_embedded.py")
"""Tests that train what they open, or are about opening it."""

_opened: dict[tuple[str, str], HookedVLM] = {}
_weights: dict[tuple[str, str], dict[str, torch.Tensor]] = {}


def _model(slot: str, path: str | Path) -> HookedVLM:
    key = (slot, str(path))
    if key not in _opened:
        _opened[key] = HookedVLM.from_pretrained(path)
        _weights[key] = {
            name: value.clone() for name, value in _opened[key].model.state_dict(keep_vars=False).items()
        }
    _opened[key]._closed = False
    return _opened[key]


@pytest.fixture(autouse=True)
def shipped_models_are_shared(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Pairs of shipped checkpoints, opened as by default, are made of models that are open already."""
    own, lent = Pair.from_pretrained, set()

    def from_pretrained(
        in_path: Any,
        rl_path: Any,
        base: Any = None,
        *,
        dtype: Any = "auto",
        device_map: Any = None,
        one_resident: bool = False,
        **how: Any,
    ) -> Pair:
        paths = {"in": in_path, "rl": rl_path} | ({} if base is None else {"base": base})
        loaded = {"dtype": dtype, "device_map": device_map, "one_resident": one_resident}
        as_ever = dtype == "auto" and device_map is None and not one_resident
        if not as_ever or not all(_is_shipped(p) for p in paths.values()):
            return own(in_path, rl_path, base, **loaded, **how)
        lent.update((slot, str(path)) for slot, path in paths.items())
        models = {slot: _model(slot, path) for slot, path in paths.items()}
        return Pair(models["in"], models["rl"], models.get("base"), **how)

    if request.path.name not in OWN_MODELS:
        monkeypatch.setattr(Pair, "from_pretrained", from_pretrained)
    yield
    for key in lent:
        now = _opened[key].model.state_dict()
        hooks = [m for m in _opened[key].model.modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooks or any(not torch.equal(now[name], value) for name, value in _weights[key].items()):
            del _opened[key], _weights[key]
            pytest.fail(f"{key[1]} is not what it was")


def _is_shipped(path: str | Path) -> bool:
    return Path(path).is_dir() and Path(path).resolve().parent == SHIPPED.resolve()
