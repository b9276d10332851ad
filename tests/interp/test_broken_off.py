"""Every method that is broken off leaves models and PyTorch's modes as they were, at once.

Also while somebody keeps the traceback, as a notebook does, and with it whatever generators were under way.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm

from hooks.exclusive import exclusive_of
from hooks.uninterrupted import registered
from interp.metrics.reading import Reading
from tests.methods import METHODS, Asked


@pytest.fixture(scope="module")
def asked(pair) -> Asked:
    found = Asked(pair)
    assert len(found.decisions) and len(found.first) and len(found.attributed) and found.prompts
    return found


@contextmanager
def broken_off(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, what: str = "", at: int = 0
) -> Iterator[list[str]]:
    """Where a method is: reading metrics, running a final norm, or going on with its bar; Ctrl-C at one of a kind."""
    calls: list[str] = []
    own: Callable[..., Any] = Reading.__call__

    def come(kind: str) -> None:
        calls.append(kind)
        if kind == what and calls.count(kind) == at:
            raise KeyboardInterrupt

    def read(self: Reading, logits: Any) -> Any:
        come("metric")
        return own(self, logits)

    def shown(self: Any, n: float = 1) -> Any:
        come("bar")
        return update(self, n)

    update: Callable[..., Any] = tqdm.update
    norms = [vlm.module(vlm.anatomy.final_norm) for vlm in asked.models]
    hooks = (lambda m=m: m.register_forward_pre_hook(lambda *_: come("norm")) for m in norms)
    with monkeypatch.context() as patched, registered(*hooks):
        patched.setattr(Reading, "__call__", read)
        patched.setattr(tqdm, "update", shown)
        yield calls


def state(asked: Asked) -> list[Any]:
    """All that a method puts on a model for a while."""
    found: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    for vlm in asked.models:
        for name, module in vlm.model.named_modules():
            own = id(module.config) if hasattr(module, "config") else None
            found.append((name, own, "forward" in vars(module), dict(module._forward_hooks)))
        found.append([(p.data_ptr(), p.requires_grad) for p in vlm.model.parameters()])
        found.append(exclusive_of(vlm.model).innermost)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_broken_off_leaves_nothing_behind(
    name: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_off(asked, monkeypatch) as calls:
        METHODS[name](asked)
    before = state(asked)
    for what in set(calls):
        with (
            broken_off(asked, monkeypatch, what, calls.count(what) // 2 or 1),
            pytest.raises(KeyboardInterrupt) as kept,
            torch.no_grad(),
        ):
            METHODS[name](asked)
        assert state(asked) == before
        del kept
        gc.collect()
        assert state(asked) == before
