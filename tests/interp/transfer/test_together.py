"""Variants that write together: token by token what each writes alone, and no module runs twice for the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.memory import memory_limit
from interp.pair.generation import greedy
from interp.prompts import Prompt, PromptBuilder, collate
from interp.questions.examples import Example
from interp.regions import of_sizes
from interp.transfer import prefixes, replays
from interp.transfer.answers import answers
from interp.transfer.grafts import Graft, grafted
from interp.transfer.outcomes import Texts
from interp.transfer.transfer import transfer
from interp.transfer.variants import Variant, addressed, controls, doses, factors, orders, parts
from interp.transfer.writing import Writing
from tests.families import EACH_KIND, WORDS, redraw, tiny

STEPS, ROWS = 6, 2


class Duo:
    """Two models of a family and prompts of unequal length, two of them without an image."""

    def __init__(self, family: str) -> None:
        given = tiny(family)
        other = copy.deepcopy(given.model)
        redraw(other, seed=7)
        self.vlm = HookedVLM(given.model, given.processor, inputs=given.inputs())
        self.donor = HookedVLM(other, given.processor, inputs=given.inputs())
        self.builder = PromptBuilder(given.processor, n_logits=self.vlm.n_logits)
        pictures = given.images(3)
        images = [(pictures[0],), (pictures[2],), (), (pictures[1],), ()]
        self.examples = [
            Example(str(i), some, " ".join(["what", "color", *WORDS[4 * i : 7 * i + 1]]), "1", "sum")
            for i, some in enumerate(images)
        ]
        self.prompts = [self.builder.build(one) for one in self.examples]

    def texts(self, prompts: Sequence[Prompt] | None = None) -> Texts:
        return Texts(tuple(self.prompts if prompts is None else prompts), STEPS, ROWS)

    def variants(self) -> list[Variant]:
        """Of every kind: mixtures, controls, parts, single heads, grafts of the vision side, doses."""
        thirds = of_sizes([1, 1, 1])
        mixed = orders(thirds, self.vlm)
        apart = [one for one in factors(self.vlm) if one.name in ("vision", "embed", "ln_final")]
        found = [*mixed, *apart, *parts(self.vlm)[1:2], *addressed(["blocks.2.attn.head.1"])]
        early = [
            Variant(f"{one.name} early", one.grafts, "order")
            for one in orders(thirds, self.vlm, "early")
            if one.name.startswith("R")
        ]
        return [*found, *early, *doses(self.vlm, (0.5,), (2,)), *controls(mixed[1:2], thirds, ["random"])]


@pytest.fixture(params=EACH_KIND, scope="module")
def duo(request: pytest.FixtureRequest) -> Duo:
    return Duo(request.param)


def _alone(duo: Duo, runs: Mapping[str, Sequence[Graft]], texts: Texts) -> dict[str, list[list[int]]]:
    found = {}
    for name, grafts in runs.items():
        if not grafts:
            found[name] = greedy(duo.vlm, texts.prompts, STEPS, ROWS)
            continue
        with grafted(duo.vlm, duo.donor, grafts):
            found[name] = greedy(duo.vlm, texts.prompts, STEPS, ROWS)
    return found


def _runs(duo: Duo) -> dict[str, Sequence[Graft]]:
    return {"IN": (), **{one.name: one.grafts for one in duo.variants()}}


def test_texts_are_token_by_token_those_of_each_alone(duo: Duo) -> None:
    runs, texts = _runs(duo), duo.texts()
    names = prefixes.sharing(duo.vlm, runs)
    assert "rank 2 update" not in names and "0.5 x update" not in names  # there is nothing like them
    assert {"IN", "ln_final", "embed", "I:I:R random update", "R:I:I early"} <= set(names)
    chosen = {name: runs[name] for name in names}
    before = {name: weight.clone() for name, weight in duo.vlm.model.state_dict().items()}
    found = Writing(duo.vlm, duo.donor, chosen).written(texts)
    assert found == _alone(duo, chosen, texts)
    assert len({str(some) for some in found.values()}) > 10  # grafts change what is written
    assert all(torch.equal(w, before[name]) for name, w in duo.vlm.model.state_dict().items())
    assert not any("forward" in vars(module) for module in duo.vlm.model.modules())


@contextmanager
def _calls(vlm: HookedVLM, paths: Sequence[str]) -> Iterator[Counter[tuple[str, int]]]:
    """Calls that reach the inside of modules, by path of the module and tokens: plain hooks on a part of each."""
    counted: Counter[tuple[str, int]] = Counter()

    def count(path: str, module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        tensor = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        counted[path, tensor.shape[1] if tensor.ndim == 3 else tensor.shape[0]] += 1

    handles = [
        vlm.module(path).register_forward_pre_hook(partial(count, path), with_kwargs=True) for path in paths
    ]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _inside(vlm: HookedVLM) -> tuple[list[str], str]:
    """A norm of every decoder block, and one of the vision tower's first block."""
    vision = vlm.anatomy.vision.blocks[0].path
    norm = next(name for name, _ in vlm.module(vision).named_children() if "norm" in name)
    return [block.mid_norm for block in vlm.anatomy.text.blocks], f"{vision}.{norm}"


def test_the_vision_side_runs_once_a_batch_and_no_block_twice_for_the_same(
    duo: Duo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted inside of the modules; without hooks standing there the model may share, so it is asked before."""
    texts = duo.texts(duo.prompts[:2])
    width = collate(texts.prompts, "left").roles.shape[1]
    mixed = {one.name: one.grafts for one in orders(of_sizes([1, 1, 1]), duo.vlm)}
    vision = {"vision": (Graft(("vision",)),), "vision and last": (Graft(("vision", "blocks.2")),)}
    runs = {"IN": (), **mixed, **vision}
    assert replays.proved(duo.vlm, duo.vlm.opening, [1, 2, 3], True) == ""
    monkeypatch.setattr("interp.transfer.writing.proved", lambda *args, **kwargs: "")
    blocks, norm = _inside(duo.vlm)
    with _calls(duo.vlm, [*blocks, norm]) as counted:
        Writing(duo.vlm, duo.donor, runs).written(texts)
    # I or R first; II, IR, RI, RR; III, IIR, IRI, IRR, RII, RIR, RRI; and of other images: I, II, III and IIR
    assert [counted[block, width] for block in blocks] == [2 + 1, 4 + 1, 7 + 2]
    assert sum(n for (path, _), n in counted.items() if path == norm) == 2
    with _calls(duo.vlm, [*blocks, norm]) as counted:
        _alone(duo, runs, texts)
    assert [counted[block, width] for block in blocks] == [9, 9, 9]
    assert sum(n for (path, _), n in counted.items() if path == norm) == 9
    steps = Counter(path for path, n in counted.elements() if n == 1)
    assert set(steps) == set(blocks)  # what is written runs through all


def test_what_is_kept_fits_and_is_of_one_batch(duo: Duo, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts: after each run, no more is held than one batch's streams, keys and values, and features."""
    sizes: list[int] = []
    own = replays.Replays.running

    @contextmanager
    def watched(self: replays.Replays, step: prefixes.Step) -> Iterator[None]:
        with own(self, step):
            yield
        sizes.append(self.n_bytes)

    monkeypatch.setattr(replays.Replays, "running", watched)
    runs = {"IN": (), **{one.name: one.grafts for one in orders(of_sizes([1, 1, 1]), duo.vlm)}}
    most = []
    for times in (1, 4):
        sizes.clear()
        Writing(duo.vlm, duo.donor, runs).written(duo.texts(duo.prompts[:1] * ROWS * times))
        most.append(max(sizes))
    assert most[0] == most[1] > 0


def test_without_room_nothing_is_kept_and_texts_are_the_same(duo: Duo) -> None:
    runs = {"IN": (), **{one.name: one.grafts for one in orders(of_sizes([1, 1, 1]), duo.vlm)}}
    texts = Texts(tuple(duo.prompts[:2]), STEPS, 1)
    with memory_limit("1GiB"):
        expected = Writing(duo.vlm, duo.donor, runs).written(texts)
    writing = Writing(duo.vlm, duo.donor, runs)
    writing._spare = lambda texts, n_rows: 1000  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="not enough memory to keep all that variants have in common"):
        assert writing.written(texts) == expected


def test_hooks_on_a_model_are_not_passed_over(duo: Duo) -> None:
    """A hook inside of a block that would not run acts in every variant: all run as wholes, and that is said."""
    runs = {one.name: one.grafts for one in orders(of_sizes([1, 1, 1]), duo.vlm)}
    texts = duo.texts(duo.prompts[:2])
    plain = _alone(duo, runs, texts)
    handle = duo.vlm.module(duo.vlm.anatomy.text.blocks[0].mlp).register_forward_hook(
        lambda module, args, out: -out
    )
    try:
        with pytest.warns(UserWarning, match="as wholes, .*hooks stand on its modules"):
            found = Writing(duo.vlm, duo.donor, runs).written(texts)
        assert found == _alone(duo, runs, texts) != plain
    finally:
        handle.remove()


def test_what_the_first_block_is_given_is_looked_at(duo: Duo) -> None:
    """Were a graft overlooked that changes the stream before the blocks, an error would say so, not a wrong text."""
    batch = collate(duo.prompts[:2], "left").to(duo.vlm.device)
    kept = replays.Replays(duo.vlm)
    with kept.running(prefixes.Step("a", 0, False, (2,))):
        duo.vlm.generate(batch.inputs, max_new_tokens=2)
    with (
        grafted(duo.vlm, duo.donor, Graft(("embed",))),
        pytest.raises(replays.Unsupported, match="first block is not given"),
        kept.running(prefixes.Step("b", prefixes.BLOCKS + 2, False, ())),
    ):
        duo.vlm.generate(batch.inputs, max_new_tokens=2)
    assert kept.n_bytes == 0 and kept.start == 0


def test_a_model_that_is_not_understood_runs_as_a_whole(duo: Duo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose output is not what it was is found by the proof; a cache without layers too."""
    monkeypatch.setattr(replays, "_cache_of", lambda args, kwargs: object())
    assert replays.proved(duo.vlm, duo.vlm.opening, [1], True) == (
        "its cache does not have a layer for every block"
    )
    monkeypatch.undo()
    own = replays._taken_apart
    monkeypatch.setattr(replays, "_taken_apart", lambda out: (own(out)[0] * 1.001, None))
    assert "other logits" in replays.proved(duo.vlm, duo.vlm.opening, [1], True)
    runs = {one.name: one.grafts for one in orders(of_sizes([1, 1, 1]), duo.vlm)}
    with pytest.warns(UserWarning, match="as wholes, .*other logits"):
        found = Writing(duo.vlm, duo.donor, runs).written(duo.texts())
    assert found == _alone(duo, runs, duo.texts())


def test_a_killed_transfer_of_texts_goes_on_where_it_was(
    duo: Duo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = answers(duo.builder, duo.examples, max_new_tokens=STEPS, batch_size=ROWS)
    variants = [*orders(of_sizes([1, 1, 1]), duo.vlm), *factors(duo.vlm)[:3]]
    arguments: Any = (duo.vlm, duo.donor, variants, {"accuracy": metric})
    whole = transfer(*arguments, progress=False)
    asked: list[int] = []

    def dies(vlm: HookedVLM, batch: Any, *args: Any, own: Any = None) -> Any:
        asked.append(len(batch))
        if len(asked) == 11:
            raise KeyboardInterrupt
        return own(vlm, batch, *args)

    from interp.transfer import writing

    monkeypatch.setattr(writing, "greedy_batch", partial(dies, own=writing.greedy_batch))
    with pytest.raises(KeyboardInterrupt):
        transfer(*arguments, keep=tmp_path, progress=False)
    assert not any("forward" in vars(module) for module in duo.vlm.model.modules())
    resumed = transfer(*arguments, keep=tmp_path, progress=False)
    xr.testing.assert_identical(resumed, whole)
    grouped = prefixes.sharing(duo.vlm, {"IN": (), **{one.name: one.grafts for one in variants}})
    assert len(grouped) == 1 + 6 + 1  # not what changes the vision side
    n_asked = 1 + -(-len(duo.examples) // ROWS) * len(grouped)  # the one that died, and every other once
    assert len(asked) == n_asked
    xr.testing.assert_identical(transfer(*arguments, keep=tmp_path, progress=False), whole)
    assert len(asked) == n_asked


def test_a_variant_that_cannot_be_put_in_is_one_error(duo: Duo) -> None:
    with pytest.raises(FrankenlensError, match="both name weights"):
        Writing(duo.vlm, duo.donor, {"twice": (Graft(("blocks.1", "blocks.0-2")),)})
