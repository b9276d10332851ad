"""Prompts are told apart by hashing all that they give to a model: once each, and only where something is borrowed."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hooks import HookedVLM
from interp.localization import Ablation, ablate
from interp.map.component_map import DIRECTIONS, KINDS, _map
from interp.metrics import LogitDifference
from interp.paths import path_effects
from interp.prompts import Prompt, PromptBuilder
from interp.prompts.pairing import content
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.results.store import Store
from interp.sweep import Intervention, sweep
from tests.families import redraw, tiny

QUESTIONS = ("how many red", "how many blue", "how many green")


class Made:
    """A tiny model, its redrawn copy, and prompts that line up."""

    def __init__(self) -> None:
        given = tiny("qwen2_5_vl")
        other = copy.deepcopy(given.model)
        redraw(other, seed=7)
        inputs = given.inputs()
        self.one, self.other = HookedVLM(given.model, inputs=inputs), HookedVLM(other, inputs=inputs)
        self.builder = PromptBuilder(given.processor, TraceFormat(reasoning=None, answer=None))
        size: Any = given.images(1)[0].size[::-1]
        self.images = given.images(3, sizes=[size])
        self.metric = LogitDifference(torch.arange(3) + 30, torch.arange(3) + 40)

    def prompts(self) -> list[Prompt]:
        return [self.builder.build(Example(f"e{i}", (self.images[i],), QUESTIONS[i], "5")) for i in range(3)]

    def map(self, kinds: tuple[str, ...] = KINDS, keep: Store | None = None) -> None:
        models, prompts = {"in": self.one, "rl": self.other}, self.prompts()
        asked = {"in": prompts, "rl": prompts}
        _map(
            models, asked, self.metric, DIRECTIONS, ["mlp_out"], ["decision"], 2, False, kinds=kinds,
            keep=keep,
        )  # fmt: skip

    def sweep(self, *kinds: str, out: Any = None) -> None:
        wanted = [Intervention("blocks.1.hook_mlp_out", kind, "question") for kind in kinds]
        sweep(self.one, self.prompts(), wanted, self.metric, batch_size=2, progress=False, out=out)

    def ablate(self, *kinds: str) -> None:
        wanted = [Ablation(f"blocks.{layer}.mlp", kind) for kind in kinds for layer in (0, 1, 2)]
        settings: Any = dict(max_new_tokens=2, batch_size=2, progress=False)
        ablate(self.one, self.prompts(), wanted, grader=lambda *_: True, **settings)

    def paths(self, control: bool) -> None:
        path = "blocks.0.mlp -> logits"
        settings: Any = dict(control=control, batch_size=2, progress=False)
        path_effects(self.one, self.prompts(), self.metric, [path], donor=self.other, **settings)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every prompt that is hashed."""
    seen: list[int] = []
    counted = SimpleNamespace(sha256=lambda *rest: seen.append(1) or hashlib.sha256(*rest))
    monkeypatch.setattr("interp.prompts.pairing.hashlib", counted)
    return seen


CALLS: dict[str, tuple[Callable[[Made], None], int]] = {
    "a map with its control": (lambda made: made.map(), 3),
    "a map without": (lambda made: made.map(("donor", "random", "self")), 0),
    "resampling in a sweep": (lambda made: made.sweep("resample", "zero", "mean"), 3),
    "a sweep that borrows nothing": (lambda made: made.sweep("zero", "mean"), 0),
    "resampling while generating": (
        lambda made: made.ablate("resample", "mean"),
        6,  # prompts, and they with their traces
    ),
    "ablations that borrow nothing": (lambda made: made.ablate("skip", "zero", "mean"), 0),
    "paths with their control": (lambda made: made.paths(True), 3),
    "paths without": (lambda made: made.paths(False), 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_prompts_are_hashed_once_and_only_where_something_is_borrowed(
    made: Made, hashed: list[int], call: str
) -> None:
    run, expected = CALLS[call]
    run(made)
    assert len(hashed) == expected


@pytest.fixture
def collated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that a map's part, and a sweep's, make of prompts."""
    import interp.map.batch
    import interp.sweep.engine

    own, sizes = interp.map.batch.collate, []

    def counted(prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return own(prompts, *rest)

    for module in (interp.map.batch, interp.sweep.engine):
        monkeypatch.setattr(module, "collate", counted)
    return sizes


def test_partners_are_put_together_only_where_they_are_run(made: Made, collated: list[int], tmp_path) -> None:
    """What is finished is read again: then no batch is made of partners, nor for anything else that a run needs."""

    def batches(run: Callable[[], None]) -> int:
        collated.clear()
        run()
        return len(collated)

    # of two batches, in and rl, and the partners of both
    assert batches(lambda: made.map(("donor", "random", "self"))) == 4
    keep = Store(tmp_path / "map", {})
    assert batches(lambda: made.map(keep=keep)) == 8
    assert batches(lambda: made.map(keep=keep)) == 0
    first, again = (batches(lambda: made.sweep("resample", out=tmp_path / "sweep")) for _ in range(2))
    without = batches(lambda: made.sweep("zero", out=tmp_path / "zero"))
    assert first == without + 2 and again == without


def prompt(*ids: int) -> Prompt:
    return Prompt.from_inputs({"input_ids": torch.tensor([ids]), "more": torch.zeros(2)})


def test_a_prompt_that_changes_is_not_taken_for_what_it_was() -> None:
    own, same, longer = prompt(5, 6), prompt(5, 6), prompt(5, 6, 7)
    assert content(own) == content(same) == content(own) != content(longer)
    assert isinstance(own.inputs, dict) and isinstance(same.inputs, dict)
    own.inputs["input_ids"] = torch.tensor([[5, 7]])
    assert content(own) == content(prompt(5, 7)) != content(same)
    same.inputs["input_ids"][0, 1] = 7
    assert content(same) == content(own)
    same.inputs["extra"] = torch.ones(1)
    assert content(same) != content(own)


COPIES: dict[str, Callable[[Prompt], Prompt]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda prompt: pickle.loads(pickle.dumps(prompt)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_told_by_what_it_holds_itself(way: str) -> None:
    own = prompt(5, 6)
    before = content(own)
    other = COPIES[way](own)
    assert content(other) == before
    other.inputs["input_ids"].fill_(9)
    assert content(other) == content(prompt(9, 9)) != before


def test_tensors_that_do_not_count_their_changes_are_hashed_again() -> None:
    with torch.inference_mode():
        own = prompt(5, 6)
        before = content(own)
        own.inputs["input_ids"].fill_(9)
        assert content(own) != before
