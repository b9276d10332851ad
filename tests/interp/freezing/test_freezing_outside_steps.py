"""Frozen weights against optimizers and users who write outside a step, and reports after casts."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks import FrankenlensError
from interp.freezing import freeze
from interp.freezing.fingerprint import Fingerprint
from tests.families import TinyVLM, tiny
from tests.interp.freezing.test_freezing import MIXED, OPTIMIZERS, UNITS, backward, masks, train, weights

WHOLE = "model.language_model.layers.0.mlp.up_proj.weight"


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2405.15682) as `schedulefree.SGDScheduleFree` has it.

    The parameters hold y while training and x, the average, while evaluating; z is in the state.
    """

    def __init__(
        self, params: Any, lr: float = 0.05, beta: float = 0.9, decay: float = 0.3, by_data: bool = False
    ):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})
        self.by_data, self.training, self.k = by_data, True, 0

    @torch.no_grad()
    def _swap(self, training: bool) -> None:
        if self.training == training:
            return
        for group in self.param_groups:
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            for p in group["params"]:
                if "z" in self.state[p]:
                    (p.data if self.by_data else p).lerp_(self.state[p]["z"], weight)
        self.training = training

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.k += 1
        for group in self.param_groups:
            lr, share = group["lr"], 1 / self.k
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                gradient = p.grad + group["decay"] * p
                p.lerp_(z, share)
                p.add_(gradient, alpha=lr * (group["beta"] * (1 - share) - 1))
                z.sub_(gradient, alpha=lr)


@pytest.fixture
def vlm() -> TinyVLM:
    return tiny("qwen2_5_vl")


def moved(model: nn.Module, before: dict[str, Tensor], frozen: dict[str, Tensor]) -> float:
    """How far the frozen weights are from where they were."""
    parts = ((p.detach() - before[n])[frozen[n]] for n, p in model.named_parameters() if frozen[n].any())
    return max(float(part.abs().max()) for part in parts)


def steps(
    model: nn.Module, inputs: Any, optimizer: ScheduleFree, after: Callable[[], None] = lambda: None
) -> None:
    for _ in range(3):
        optimizer.train()
        after()
        backward(model, inputs)
        optimizer.step()
        after()
        optimizer.zero_grad()
        optimizer.eval()
        after()


@pytest.mark.parametrize("by_data", [False, True])
def test_schedule_free_swaps_leave_frozen_weights_alone(by_data: bool, vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, frozen, free = weights(model), masks(model, MIXED), copy.deepcopy(model)

    def kept() -> None:
        assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())

    optimizer = ScheduleFree(model.parameters(), by_data=by_data)
    with freeze(model, MIXED) as held:
        steps(model, inputs, optimizer, kept)
        report = held.report()
    kept()
    assert report.loc[report["frozen"], "identical"].all()
    assert not report.query("not frozen and gradient")["identical"].any()
    assert not vars(optimizer).keys() & {"train", "eval"}
    optimizer = ScheduleFree(free.parameters(), by_data=by_data)
    steps(free, inputs, optimizer)
    assert moved(free, before, frozen) > 1e-2  # what it guards against, by much more than rounding


def test_the_rest_is_trained_as_if_the_frozen_rows_were_constants(vlm: TinyVLM) -> None:
    """By hand: their gradient is 0, and they are put back after whatever writes."""
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, frozen, reference = weights(model), masks(model, UNITS), copy.deepcopy(model)
    by_hand = ScheduleFree(reference.parameters())

    def put_back() -> None:
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p[frozen[n]] = before[n][frozen[n]]

    for n, p in reference.named_parameters():
        p.register_hook(lambda gradient, mask=frozen[n]: gradient.masked_fill(mask, 0))
    steps(reference, inputs, by_hand, put_back)
    with freeze(model, UNITS):
        steps(model, inputs, ScheduleFree(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_rows_are_put_back_before_they_are_used_or_saved(vlm: TinyVLM) -> None:
    """Whoever writes them: here an average of weights, which no optimizer knows of."""
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, frozen = weights(model), masks(model, UNITS)
    uses: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(**inputs),
        "generation": lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False),
        "a part's forward": lambda: model.model(**inputs),
        "saving": lambda: model.state_dict(),
        "saving a part": lambda: [
            block.state_dict() for block in (model.model.visual, model.model.language_model)
        ],
    }
    for name, use in uses.items():
        with freeze(model, UNITS) as held:
            with torch.no_grad():
                for p in model.parameters():
                    p.data.add_(0.05)
            assert moved(model, before, frozen) > 1e-2 and not held.report()["identical"].any()
            with torch.no_grad():
                use()
            assert moved(model, before, frozen) == 0, name
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n])
    with freeze(model, UNITS), torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    assert moved(model, before, frozen) == 0  # released, they are themselves


def test_what_the_model_computes_has_the_frozen_rows(vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, frozen = weights(model), masks(model, UNITS)
    with freeze(model, UNITS), torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.3)
        expected = copy.deepcopy(model)  # a copy is free
        wrong = expected(**inputs).logits
        for n, p in expected.named_parameters():
            p[frozen[n]] = before[n][frozen[n]]
        found = model(**inputs).logits
        assert torch.equal(found, expected(**inputs).logits)
        assert (found - wrong).abs().max() > 1e-3


def test_a_whole_tensor_that_is_written_is_refused_by_name(vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    optimizer = ScheduleFree(model.parameters())
    for _ in range(2):  # now it holds a z of everything, apart from y
        backward(model, inputs)
        optimizer.step()
    backward(model, inputs)
    with freeze(model, MIXED):
        optimizer.step()
        with pytest.raises(
            FrankenlensError, match=r"layers\.0\..* is frozen, and ScheduleFree\.eval\(\) wrote it"
        ):
            optimizer.eval()
    for write in (lambda p: p.data.add_(1e-3), lambda p: p.add_(1e-3)):
        with freeze(model, "blocks.0"):
            with torch.no_grad():
                write(model.get_parameter(WHOLE))
            with pytest.raises(FrankenlensError, match=r"up_proj\.weight is frozen.*other than a step"):
                model(**inputs)
            with pytest.raises(FrankenlensError, match=r"up_proj\.weight is frozen"):
                model.state_dict()
    with freeze(model, "blocks.0"), torch.no_grad():
        model.load_state_dict(copy.deepcopy(model.state_dict()))  # the same bits
        model(**inputs)
        model.get_parameter(WHOLE).add_(1e-3)  # announced, so seen without a gradient too
        with pytest.raises(FrankenlensError, match="Make the optimizer after freezing"):
            model(**inputs)


def test_two_freezings_and_a_pickled_model(vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, optimizer = weights(model), ScheduleFree(model.parameters())
    first, second = freeze(model, UNITS[0]), freeze(model, UNITS[1])
    steps(model, inputs, optimizer)
    first.release()
    steps(model, inputs, optimizer)
    one, other = (masks(model, [unit]) for unit in UNITS[:2])
    assert moved(model, before, other) == 0 and moved(model, before, one) > 1e-3
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    second.release()
    with torch.no_grad():
        twin.get_parameter("model.language_model.layers.1.self_attn.k_proj.weight").add_(1.0)
        twin(**inputs)
    assert moved(twin, before, other) > 0.5


CASTS = {
    "bfloat16": [torch.bfloat16],
    "half": [torch.float16],
    "double": [torch.float64],
    "half and back": [torch.float16, torch.float32],
    "bfloat16 and back": [torch.bfloat16, torch.float32],
}


@pytest.mark.parametrize("name", CASTS)
def test_a_report_after_a_cast_compares_with_the_cast_originals(name: str, vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before = weights(model)
    with freeze(model, MIXED) as held:
        for dtype in CASTS[name]:
            model.to(dtype)
        assert held.report()["identical"].all()  # nothing was trained
        model.to(torch.float32).load_state_dict(before, strict=False)
        train(model, inputs, OPTIMIZERS["sgd momentum"], steps=1)
        for dtype in CASTS[name]:
            model.to(dtype)
        report = held.report()
        assert report.loc[report["frozen"], "identical"].all()
        assert (
            report.query("not frozen")["identical"] != report.query("not frozen")["gradient"]
        ).mean() > 0.9
        with torch.no_grad():
            model.get_parameter(WHOLE)[0, 0] += 1.0
        assert held.report().query("frozen and not identical")["tensor"].tolist() == [WHOLE]


@pytest.mark.parametrize("start", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_know_casts_and_nothing_else(start: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator, dtype=torch.float64).to(start)
    own = Fingerprint.of(values)
    for to in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = values.to(to)
        assert own.fits(cast)
        other = cast.clone()
        other[7] = torch.nextafter(cast[7].float(), torch.tensor(9.0)).to(to) if to != start else -cast[7]
        other[7] = other[7] if other[7] != cast[7] else cast[7] * 1.01
        assert not own.fits(other)
    assert not own.fits(-values)
