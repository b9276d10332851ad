"""A model has one user at a time, and is bit for bit what it was after whatever interrupted its use."""

import asyncio
import copy
import gc
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from hooks import FrankenlensError, HookedVLM, exclusive
from hooks.swapped import swapped
from interp.pair.generation import plain_greedy
from interp.pair.pair import weights_sha256
from interp.sweep import Intervention, sweep
from interp.transfer import Graft, grafted
from tests.hooks.interventions import flip
from tests.interp.sweep.test_sweep import duo

FIRST = "model.language_model.layers.0"
POINT = "blocks.1.hook_resid_post"
PATTERN = "blocks.0.attn.hook_pattern"


def state(model: nn.Module) -> Any:
    """Weights, hooks, settings, training flags: everything that a use could leave changed."""
    hooks = [
        (
            path,
            [
                len(getattr(module, name))
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ],
        )
        for path, module in model.named_modules()
    ]
    configs = [
        (path, id(module.config)) for path, module in model.named_modules() if hasattr(module, "config")
    ]
    address = torch._C._data_address  # type: ignore[attr-defined]  # data_ptr() would end the sharing of a graft
    flags = [(name, p.requires_grad, address(p), p.grad is None) for name, p in model.named_parameters()]
    generation = id(getattr(model, "generation_config", None))
    return weights_sha256(model), hooks, configs, flags, generation, str(getattr(model, "config", ""))


# tasks and threads


def test_a_second_task_of_a_thread_is_refused(given, vlm) -> None:
    inputs = given.inputs()
    said: list[str] = []

    async def holds(go: asyncio.Event, done: asyncio.Event) -> None:
        with vlm.hooks([(POINT, flip)]):
            go.set()
            await done.wait()
            assert not torch.equal(vlm(inputs).logits, clean)

    async def intrudes(go: asyncio.Event, done: asyncio.Event) -> None:
        await go.wait()
        for use in (lambda: vlm(inputs), lambda: vlm.run_with_cache(inputs, POINT)):
            try:
                use()
            except FrankenlensError as error:
                said.append(str(error))
        done.set()

    async def both() -> None:
        go, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(holds(go, done), intrudes(go, done))

    before = state(given.model)
    with torch.no_grad():
        clean = vlm(inputs).logits
        asyncio.run(both())
        with vlm.hooks(
            [(POINT, flip)]
        ):  # a task inside a block of the code that waits for it is one of its own
            asyncio.run(_runs(vlm, inputs))
        assert torch.equal(vlm(inputs).logits, clean)
    assert len(said) == 2 and all(
        "another task of this thread is in hooks of this model" in one for one in said
    )
    assert state(given.model) == before


async def _runs(vlm: HookedVLM, inputs: Any) -> None:
    vlm(inputs)


def test_a_thread_that_would_wait_for_ever_is_refused(given, vlm, monkeypatch) -> None:
    inputs = given.inputs()
    before = state(given.model)

    async def waits_for_its_own_thread() -> None:
        with vlm.hooks([(POINT, flip)]):
            await asyncio.to_thread(vlm, inputs)

    with pytest.raises(FrankenlensError, match="this thread was begun inside of it"):
        asyncio.run(waits_for_its_own_thread())
    monkeypatch.setattr(exclusive, "PATIENCE", 0.3)
    with vlm.hooks([(POINT, flip)]):
        assert "has kept it for" in _in_thread(lambda: vlm(inputs))
    context = vlm.hooks([(POINT, flip)])
    assert _in_thread(context.__enter__) == ""
    with pytest.raises(FrankenlensError, match="has ended without closing it"):
        vlm(inputs)
    with pytest.raises(FrankenlensError, match="closed in another; the model is as it was before"):
        context.__exit__(None, None, None)
    vlm(inputs)
    assert state(given.model) == before
    other = HookedVLM(given.model, given.processor, check=False)
    kept = [other.hooks([(POINT, flip)]), swapped(given.model, lambda: _zeros(given.model), "a graft")]
    assert _in_thread(lambda: [one.__enter__() for one in kept]) == ""
    other.close()
    vlm(inputs)
    assert state(given.model) == before
    for one in reversed(kept):
        with pytest.raises(FrankenlensError, match="closed in another"):
            one.__exit__(None, None, None)
    assert state(given.model) == before


def _zeros(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from ((weight, torch.zeros_like(weight)) for weight in list(model.parameters())[:3])


def _in_thread(run: Callable[[], Any]) -> str:
    """What it is refused with."""
    said: list[str] = []

    def own() -> None:
        try:
            run()
        except FrankenlensError as error:
            said.append(str(error))

    thread = threading.Thread(target=own)
    thread.start()
    thread.join()
    return "".join(said)


def test_a_shallow_copy_shares_the_hooks_and_a_deep_one_has_none(given, vlm) -> None:
    before = state(given.model)
    shallow = copy.copy(vlm)
    with shallow.hooks([(POINT, flip)]):
        deep = copy.deepcopy(vlm)
    assert state(given.model) == before
    with vlm.hooks([(POINT, flip)]):
        shallow.close()
    assert state(given.model) == before
    assert weights_sha256(deep.model) == before[0] and deep.model is not given.model
    with deep.hooks([(POINT, flip)]):
        assert state(given.model) == before
    with pytest.raises(FrankenlensError, match="not pickled"):
        pickle.dumps(shallow)
    vlm(given.inputs())


# weights


@torch.no_grad()
def test_weights_come_back_in_any_order_and_other_orders_are_refused(given, vlm) -> None:
    model, inputs = given.model, given.inputs()
    before = state(model)

    def zero() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return _zeros(model)

    outer, inner = (swapped(model, zero, what) for what in ("the outer", "the inner"))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(FrankenlensError, match="the outer was closed before one that was begun inside of it"):
        outer.__exit__(None, None, None)
    assert state(model) == before
    with pytest.raises(FrankenlensError, match="leave those contexts first"):
        vlm(inputs)
    with pytest.raises(FrankenlensError, match="the inner was closed after the one around it"):
        inner.__exit__(None, None, None)
    vlm(inputs)
    other = swapped(model, zero, "a graft")
    assert _in_thread(other.__enter__) == ""
    with pytest.raises(FrankenlensError, match="was begun in the thread .* and closed in another"):
        other.__exit__(None, None, None)
    assert state(model) == before


@torch.no_grad()
def test_what_broke_a_context_off_is_raised_and_not_the_order_it_left(given, vlm) -> None:
    """As when Ctrl-C comes while the inner context begins to be left: it never is."""
    model, inputs = given.model, given.inputs()
    before = state(model)
    outer, inner = (swapped(model, lambda: _zeros(model), what) for what in ("the outer", "the inner"))
    outer.__enter__()
    inner.__enter__()
    assert outer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert state(model) == before
    del inner  # dropped by whoever was interrupted
    gc.collect()
    vlm(inputs)
    assert state(model) == before


# interruptions


class _Interrupt:
    """A hook that raises, or sends Ctrl-C, when it is called for the n-th time."""

    def __init__(self, at: int, how: str) -> None:
        self.left, self.how = at, how

    def __call__(self, activation, hook) -> None:
        self.left -= 1
        if self.left == 0 and self.how == "raise":
            raise ZeroDivisionError
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C from outside, at whatever moment that is."""

    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    own = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own)
        signal.signal(signal.SIGINT, ctrl_c)


def _uses(
    recipient: HookedVLM, donor: HookedVLM, prompts: Any, metric: Any
) -> dict[str, Callable[[Any], Any]]:
    inputs = prompts[0].inputs
    some = Graft(("blocks.0", "blocks.1.attn.head.1"))
    wanted = [Intervention(f"blocks.{i}.attn.hook_z", "zero", "image", h) for i in range(2) for h in range(2)]
    wanted += [Intervention("blocks.1.hook_resid_pre", "replace", "image")]

    def runs(act: Any) -> None:
        recipient.run_with_hooks(inputs, [(PATTERN, flip), (POINT, act), ("blocks.0.hook_mlp_out", act)])

    def grafts(act: Any) -> None:
        with grafted(recipient, donor, some), grafted(recipient, donor, Graft(("blocks.2",), 0.5)):
            with torch.no_grad():
                for weight in recipient.model.parameters():
                    weight[:0].add_(1)
                recipient.model.get_parameter(f"{FIRST}.mlp.up_proj.weight").add_(1)
            recipient.run_with_hooks(inputs, [(POINT, act)])

    def generates(act: Any) -> None:
        with plain_greedy(recipient.model, (), 0):
            recipient.generate(inputs, [(POINT, act)], max_new_tokens=4, min_new_tokens=4)

    def sweeps(act: Any) -> None:
        with recipient.hooks([(POINT, act)]):
            sweep(recipient, prompts, wanted, metric, donor=donor, batch_size=1, progress=False)

    def left_open(act: Any) -> None:
        def generator() -> Generator[None]:
            with grafted(recipient, donor, some), recipient.hooks([(POINT, act)]):
                yield

        two = [generator(), generator()]
        for one in two:
            next(one)
        recipient(inputs)
        two[1].close()

    def copies(act: Any) -> None:
        with recipient.hooks([(POINT, act)]), ExitStack() as stack:
            stack.callback(copy.deepcopy(recipient).close)
            stack.enter_context(grafted(recipient, donor, some))
            copy.copy(recipient)(inputs)

    return {one.__name__: one for one in (runs, grafts, generates, sweeps, left_open, copies)}


@pytest.mark.filterwarnings("ignore")  # what a generator that is dropped says
def test_sixty_interruptions_leave_both_models_as_they_were() -> None:
    pair, rng = duo("qwen2_5_vl"), random.Random(0)
    recipient, donor = pair.recipient, pair.donor
    metrics = pair.metrics if not isinstance(pair.metrics, dict) else next(iter(pair.metrics.values()))
    before = [state(one.model) for one in (recipient, donor)]
    took: dict[str, float] = {}
    cut_short = 0
    for name, use in _uses(recipient, donor, pair.prompts, metrics).items():
        started = time.perf_counter()
        use(lambda activation, hook: None)
        took[name] = time.perf_counter() - started
        assert [state(one.model) for one in (recipient, donor)] == before, name
        for trial in range(10):
            how = ("raise", "ctrl-c", "outside")[trial % 3]
            act = _Interrupt(rng.randint(1, 2), how) if how != "outside" else (lambda activation, hook: None)
            moment = rng.uniform(0, took[name]) if how == "outside" else 600
            try:
                with _interrupted_after(moment):
                    use(act)
            except (KeyboardInterrupt, ZeroDivisionError):
                cut_short += 1
            # Ctrl-C inside PyTorch's own `no_grad.__exit__` leaves gradients off, one time in four hundred
            torch.set_grad_enabled(True)
            assert [state(one.model) for one in (recipient, donor)] == before, (name, how, moment)
    assert cut_short >= 45


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own, of forks under threads
def test_a_fork_under_hooks_and_grafts_leaves_the_parent_alone(given, vlm) -> None:
    before, inputs = state(given.model), given.inputs()

    swap = swapped(given.model, lambda: _zeros(given.model), "a graft")
    with torch.no_grad(), vlm.hooks([(POINT, flip)]), swap:
        inside = vlm(inputs).logits
        child = os.fork()
        if child == 0:
            same = torch.equal(vlm(inputs).logits, inside)
            next(given.model.parameters()).add_(1)
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(vlm(inputs).logits, inside)
    assert state(given.model) == before
