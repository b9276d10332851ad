"""Lockstep generation against Hugging Face's own output and against a loop without cache made of plain hooks."""

import copy
import itertools
import json
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from hooks import Address, FrankenlensError, HookedVLM
from interp.lockstep import (
    Moved,
    Sampling,
    confirm,
    confirmation,
    follow,
    lockstep,
    random_components,
)
from interp.lockstep.controls import kind_of, overlap, single
from interp.lockstep.places import Places
from interp.lockstep.run import alone
from interp.lockstep.sampling import Chooser
from interp.pair.generation import greedy
from interp.prompts import Prompt, PromptBuilder, collate
from interp.prompts.reading import TraceReader
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.tasks import grade, sample
from interp.statistics import change_interval, mcnemar
from tests.families import FAMILIES, QWEN, redraw, tiny, tiny_processor
from tests.hooks.interventions import intervention

STEPS = 9
EVERYTHING = ("blocks.0-2", "ln_final", "unembed")


class Duo:
    """IN and RL of one family, prompts of different lengths, one with two images, and an end that rows come to."""

    def __init__(self, family: str) -> None:
        self.common = next(found for seed in range(40) if (found := self._words(family, seed)))
        self.other = copy.deepcopy(self.given.model)
        _redraw(self.other, 97)
        inputs = self.given.inputs()
        self.in_ = HookedVLM(self.given.model, self.given.processor, inputs=inputs)
        self.rl = HookedVLM(self.other, self.given.processor, inputs=inputs)
        answer, end = self.given.processor.tokenizer.convert_ids_to_tokens(self.common)
        self.prompts = self._prompts(TraceFormat(reasoning=None, answer=(answer, None), end_of_turn=(end,)))

    def _words(self, family: str, seed: int) -> tuple[int, int] | None:
        """Two tokens of what this model writes: one that some row writes early, to open the answer, and one that some
        rows come to later, to end the turn. None where there are no such (random models often repeat one token)."""
        self.given = tiny(family)
        _redraw(self.given.model, seed)
        prompts = self._prompts(TraceFormat(reasoning=None, answer=None))
        rows = [self.generate(self.given.model, [prompt])[0] for prompt in prompts]
        decode = self.given.processor.tokenizer.decode
        words = [token for token in sorted({t for row in rows for t in row}) if decode([token]).strip()]
        for answer, end in itertools.permutations(words, 2):
            ends = [row.index(end) + 1 if end in row else STEPS for row in rows]
            if len(set(ends)) > 1 and self._answers(prompts, rows, ends, (answer, end)):
                return answer, end
        return None

    def _answers(self, prompts: list[Prompt], rows: Any, ends: list[int], words: tuple[int, int]) -> bool:
        """Whether some row's answer has three tokens or more."""
        answer, end = self.given.processor.tokenizer.convert_ids_to_tokens(words)
        trace_format = TraceFormat(reasoning=None, answer=(answer, None), end_of_turn=(end,))
        builder = PromptBuilder(self.given.processor, trace_format)
        traces = [builder.with_trace(p, ids[:n]) for p, ids, n in zip(prompts, rows, ends, strict=True)]
        return any(trace.roles.count("answer") > 2 for trace in traces)

    def _prompts(self, trace_format: TraceFormat) -> list[Prompt]:
        builder = PromptBuilder(self.given.processor, trace_format)
        size = [(32, 40)] if self.given.family in QWEN else [(16, 32)]
        images = self.given.images(5, sizes=size, seed=3)
        questions = ("how many red", "what shape in row 2 , red or blue ?", "what", "how many green in row 3")
        shown = (images[:1], images[1:3], images[3:4], images[4:])
        return [
            builder.build(Example(f"e{i}", tuple(some), question, "5"))
            for i, (question, some) in enumerate(zip(questions, shown, strict=True))
        ]

    @staticmethod
    def generate(model: Any, prompts: list[Prompt]) -> list[list[int]]:
        """Hugging Face's own greedy output, every row up to its end."""
        builder = prompts[0].builder
        batch = collate(prompts, "left")
        ids = model.generate(
            **batch.inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=list(builder.suppressed_ids),
            eos_token_id=list(builder.end_ids), pad_token_id=builder.pad_id,
        )[:, batch.roles.shape[1] :].tolist()  # fmt: skip
        ends = [next((i + 1 for i, t in enumerate(row) if t in builder.end_ids), len(row)) for row in ids]
        return [row[:end] for row, end in zip(ids, ends, strict=True)]


def _redraw(model: Any, seed: int) -> None:
    """Other parameters; embeddings wide, so that where they are tied to the head not every token repeats itself."""
    redraw(model, seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.3)


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=() if f in ("qwen3_vl", "llava") else pytest.mark.slow) for f in FAMILIES],
)
def duo(request: pytest.FixtureRequest) -> Duo:
    return Duo(request.param)


@pytest.fixture(scope="module")
def qwen() -> Duo:
    return Duo("qwen2_5_vl")


def tokens(written) -> list[list[int]]:
    return [list(one.tokens) for one in written]


def test_nothing_moved_or_in_as_both_parents_is_hugging_faces_own_output(duo) -> None:
    before = {name: value.clone() for name, value in duo.given.model.state_dict().items()}
    config = duo.given.model.config.to_dict()
    expected = duo.generate(duo.given.model, duo.prompts)
    assert len({len(ids) for ids in expected}) > 1  # samples end at different steps
    assert tokens(lockstep(duo.rl, duo.in_, duo.prompts, (), STEPS)) == expected
    assert tokens(alone(duo.in_, duo.prompts, STEPS)) == expected
    every = Moved(("embed", "blocks.0-2", "blocks.1.attn.head.0-1", "projector", "ln_final", "unembed"))
    assert tokens(lockstep(duo.in_, duo.in_, duo.prompts, every, STEPS)) == expected
    late = Moved("blocks.0-2.mlp", ("generated",), from_divergence=True)
    assert tokens(lockstep(duo.in_, duo.in_, duo.prompts, late, STEPS)) == expected
    for prompt, ids in zip(duo.prompts, expected, strict=True):
        assert duo.generate(duo.given.model, [prompt]) == [ids]
    assert duo.generate(duo.given.model, duo.prompts) == expected
    assert duo.given.model.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in duo.given.model.state_dict().items())


def test_everything_moved_is_the_donors_own_output(duo) -> None:
    expected = duo.generate(duo.other, duo.prompts)
    assert expected != duo.generate(duo.given.model, duo.prompts)
    found = lockstep(duo.rl, duo.in_, duo.prompts, Moved(EVERYTHING), STEPS)
    assert tokens(found) == expected
    assert tokens(lockstep(duo.rl, duo.in_, duo.prompts, Moved("unembed"), STEPS, batch_size=3)) == expected
    for one, ids in zip(found, expected, strict=True):
        assert one.donor_choices == one.tokens and one.divergence is None
        assert one.n_moved == (len(one.prompt) - len(ids) + len(ids) - 1,)
    halves = [Moved("blocks.0-2", ("prefill",)), Moved("blocks.0-2", ("generated",)), Moved("unembed")]
    assert tokens(lockstep(duo.rl, duo.in_, duo.prompts, halves, STEPS)) == expected
    # each through its own final norm and head, RL's blocks are not RL
    assert tokens(lockstep(duo.rl, duo.in_, duo.prompts, Moved("blocks.0-2"), STEPS)) != expected


HEAD, NEURON, KV = (slice(2, 3),), (slice(5, 6),), (slice(1, 2),)
CASES: dict[str, tuple[Moved, dict[str, tuple[slice, ...]]]] = {
    "block": (Moved("blocks.1"), {"blocks.1.hook_resid_post": ()}),
    "attention, while reading": (Moved("blocks.1.attn", ("prefill",)), {"blocks.1.hook_attn_out": ()}),
    "mlp, while writing": (Moved("blocks.0.mlp", ("generated",)), {"blocks.0.hook_mlp_out": ()}),
    "head": (Moved("blocks.1.attn.head.2"), {"blocks.1.attn.hook_result": HEAD}),
    "neuron": (Moved("blocks.2.mlp.neuron.5"), {"blocks.2.mlp.hook_post": NEURON}),
    "kv head": (
        Moved("blocks.1.attn.kv_head.1", ("image", "question")),
        {"blocks.1.attn.hook_k": KV, "blocks.1.attn.hook_v": KV},
    ),
    "stream, by hook": (Moved("blocks.1.hook_resid_pre", ("image",)), {"blocks.1.hook_resid_pre": ()}),
    "middle, reasoning": (Moved("blocks.0.hook_resid_mid", ("reasoning",)), {"blocks.0.hook_resid_mid": ()}),
    "mlp, answer": (Moved("blocks.0-1.mlp", ("answer",)), {f"blocks.{i}.hook_mlp_out": () for i in (0, 1)}),
    "norm, template": (Moved("ln_final", ("template",)), {"ln_final.hook_normalized": ()}),
    "embeddings": (Moved("embed", ("question",)), {"hook_embed": ()}),
    "from the divergence": (Moved("blocks.1", from_divergence=True), {"blocks.1.hook_resid_post": ()}),
}


def reference(duo: Duo, prompt: Prompt, moved: Moved, points: dict[str, tuple[slice, ...]]):
    """Tokens and logits of one prompt without padding and without cache: both models run anew at every step."""
    family, ids, kept, start = duo.given.family, [], [], None
    mask: Any = torch.zeros(0)
    for _ in range(STEPS):
        now = prompt.with_tokens(ids)
        place = range(len(now))
        in_prompt = [i < prompt.n_prompt_tokens for i in place]
        mask = torch.tensor([
            (now.roles[i] in moved.when or ("prefill" if in_prompt[i] else "generated") in moved.when)
            for i in place
        ])  # fmt: skip
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in points:
                stack.enter_context(intervention(duo.other, family, name, _keep(seen, name)))
            theirs = duo.other(**now.inputs).logits[0, -1]

        def run(mask=mask, now=now, seen=seen):
            with ExitStack() as stack:
                for name, part in points.items():
                    edit = _put(seen[name], mask, part)
                    stack.enter_context(intervention(duo.given.model, family, name, edit))
                return duo.given.model(**now.inputs).logits[0, -1]

        if moved.from_divergence:
            own = duo.given.model(**now.inputs).logits[0, -1]
            if start is None and _allowed(prompt, theirs).argmax() != _allowed(prompt, own).argmax():
                start = len(now) - 1
            mask &= torch.arange(len(now)) >= (len(now) if start is None else start)
        logits = run(mask)
        kept.append(logits)
        ids.append(int(_allowed(prompt, logits).argmax()))
        if ids[-1] in prompt.builder.end_ids:
            break
    return ids, torch.stack(kept), int(mask.sum())


def _allowed(prompt: Prompt, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[list(prompt.builder.suppressed_ids)] = -torch.inf
    return logits


def _keep(seen: dict[str, torch.Tensor], name: str):
    def edit(a: torch.Tensor) -> torch.Tensor:
        seen[name] = a.clone()
        return a

    return edit


def _put(value: torch.Tensor, mask: torch.Tensor, part: tuple[slice, ...]):
    def edit(a: torch.Tensor) -> torch.Tensor:
        new = a.clone()
        axis = (..., *part) if a.ndim == 3 else (..., *part, slice(None))
        here = mask.reshape(1, -1, *[1] * (a.ndim - 2))
        new[axis] = torch.where(here, value[axis], a[axis])
        return new

    return edit


@pytest.fixture
def logits_seen(monkeypatch) -> dict[int, list[torch.Tensor]]:
    seen: dict[int, list[torch.Tensor]] = {}
    choose = Chooser.choose

    def watch(self, logits, rows, step):
        for row, own in zip(rows, logits, strict=True):
            seen.setdefault(row, []).append(own.clone())
        return choose(self, logits, rows, step)

    monkeypatch.setattr(Chooser, "choose", watch)
    return seen


QUICK = ("attention, while reading", "mlp, while writing", "head", "from the divergence")
"""Of the families other than Qwen2.5-VL; the rest of the cases are slow there."""


def _cases():
    for family in FAMILIES:
        for case in CASES:
            slow = () if family == "qwen2_5_vl" or case in QUICK else (pytest.mark.slow,)
            yield pytest.param(family, case, marks=slow)


@torch.no_grad()
@pytest.mark.parametrize(("duo", "case"), list(_cases()), indirect=["duo"])
def test_what_is_moved_equals_plain_hooks_without_a_cache(duo, case, logits_seen) -> None:
    moved, points = CASES[case]
    found = lockstep(duo.rl, duo.in_, duo.prompts, moved, STEPS)
    ours = {row: torch.stack(some) for row, some in logits_seen.items()}
    acted = 0.0
    for row, prompt in enumerate(duo.prompts):
        ids, logits, n_moved = reference(duo, prompt, moved, points)
        assert list(found[row].tokens) == ids, case
        assert found[row].n_moved == (n_moved,)
        own = ours[row][: len(ids)]
        allowed = 1e-5 * max(1.0, float(logits.abs().max()))
        assert (own - logits).abs().max() <= allowed
        plain = duo.given.model(**prompt.with_tokens(ids).inputs).logits[0, len(prompt) - 1 : -1]
        acted = max(acted, float((plain - logits).abs().max()) / allowed)
    assert acted > 100  # the move shows, in some row, in more than rounding


@torch.no_grad()
@pytest.mark.parametrize("address", ["projector", "vision.blocks.1", "vision.blocks.1.attn.head.0"])
def test_the_vision_side_moved_equals_plain_hooks(duo, address, logits_seen) -> None:
    """Two images in one row, so that values of the batch must go to the rows that they belong to."""
    names = {"projector": "projector.hook_out", "vision.blocks.1": "vision.blocks.1.hook_resid_post"}
    points = {names.get(address, "vision.blocks.1.attn.hook_result"): HEAD if "head" in address else ()}
    if "head" in address:
        points = {"vision.blocks.1.attn.hook_result": (slice(0, 1),)}
    if address == "projector":
        points |= {name: () for name in duo.in_.hook_points if name.endswith("deepstack")}
    found = lockstep(duo.rl, duo.in_, duo.prompts, Moved(address, ("image",)), 3)
    for row, prompt in enumerate(duo.prompts):
        seen: dict[str, torch.Tensor] = {}
        now = prompt.with_tokens(found[row].tokens[:-1])
        with ExitStack() as stack:
            for name in points:
                stack.enter_context(intervention(duo.other, duo.given.family, name, _keep(seen, name)))
            duo.other(**now.inputs)
        with ExitStack() as stack:
            for name, part in points.items():
                axis = (..., *part, slice(None))

                def edit(a, value=seen[name], axis=axis):
                    new = a.clone()
                    new[axis] = value[axis]
                    return new

                stack.enter_context(intervention(duo.given.model, duo.given.family, name, edit))
            expected = duo.given.model(**now.inputs).logits[0, len(prompt) - 1 :]
        got = torch.stack(logits_seen[row])[: len(expected)]
        allowed = 1e-5 * max(1.0, float(expected.abs().max()))
        assert (got - expected).abs().max() <= allowed
        plain = duo.given.model(**now.inputs).logits[0, len(prompt) - 1 :]
        assert (plain - expected).abs().max() > 100 * allowed


@pytest.mark.parametrize("sampling", [None, Sampling(1.3, 0.9, seed=5)])
def test_who_else_is_in_the_batch_changes_nothing(qwen, sampling) -> None:
    moved = [Moved("blocks.1.attn"), Moved("blocks.2", ("answer",)), Moved("blocks.0", from_divergence=True)]
    whole = lockstep(qwen.rl, qwen.in_, qwen.prompts, moved, STEPS, sampling)
    for size in (1, 3):
        some = lockstep(qwen.rl, qwen.in_, qwen.prompts, moved, STEPS, sampling, batch_size=size)
        assert some == [_at(one, other.prompt) for one, other in zip(whole, some, strict=True)]
    back = lockstep(qwen.rl, qwen.in_, qwen.prompts[::-1], moved, STEPS, sampling, batch_size=2)
    assert tokens(back)[::-1] == tokens(whole)


def _at(one, prompt):
    return type(one)(**{**one.__dict__, "prompt": prompt})


def test_sampling_draws_from_the_warped_distribution(qwen) -> None:
    """One prompt 400 times: rows with one id have draws of their own. Chi-squared against the model's own softmax."""
    prompt, sampling = qwen.prompts[0], Sampling(temperature=1.5, top_p=0.8, seed=1)
    drawn = [one.tokens[0] for one in alone(qwen.in_, [prompt] * 400, 1, sampling, batch_size=200)]
    with torch.no_grad():
        logits = _allowed(prompt, qwen.given.model(**prompt.inputs).logits[0, -1])[None]
    none: Any = None
    warped = TopPLogitsWarper(0.8)(none, TemperatureLogitsWarper(1.5)(none, logits))  # type: ignore[arg-type]
    p = warped[0].double().softmax(-1).numpy()
    counts = np.bincount(drawn, minlength=len(p))
    assert counts[p == 0].sum() == 0 and (p > 0).sum() > 3
    often = p * 400 >= 5
    observed = [*counts[often], counts[~often].sum()]
    expected = [*(p[often] * 400), p[~often].sum() * 400]
    some = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    assert stats.chisquare(*np.array(some).T).pvalue > 0.01
    again = [one.tokens[0] for one in alone(qwen.in_, [prompt] * 400, 1, sampling)]
    assert again == drawn
    other = alone(qwen.in_, [prompt] * 400, 1, Sampling(1.5, 0.8, seed=2))
    assert [one.tokens[0] for one in other] != drawn
    cold = alone(qwen.in_, qwen.prompts, STEPS, Sampling(temperature=1e-4))
    assert tokens(cold) == tokens(alone(qwen.in_, qwen.prompts, STEPS))


WORDS = st.lists(st.sampled_from("red <think> </think> \\boxed{ } 3 <|im_end|> answer".split()), max_size=12)


@settings(max_examples=30, deadline=None)
@given(WORDS, st.integers(0, 12))
def test_roles_of_a_growing_trace_are_those_of_the_finished_one_but_for_answers_that_others_follow(
    words, cut
) -> None:
    builder = PromptBuilder(
        tiny_processor("qwen2_5_vl"), TraceFormat(("<think>", "</think>"), ("\\boxed{", "}"))
    )
    plain = builder.build(Example("e", (), "what", ""))
    ids = builder.encode(" ".join(words))
    reader = TraceReader(plain.with_tokens(ids[:cut]))
    roles = [reader.feed(token)[0] for token in ids[cut:]]
    finished = plain.with_tokens(ids).roles[plain.n_prompt_tokens + len(ids[:cut]) :]
    differing = {(a, b) for a, b in zip(roles, finished, strict=True) if a != b}
    assert differing <= ({("answer", "template")} if words.count("\\boxed{") > 1 else set())


@torch.no_grad()
def test_follow_counts_what_a_loop_over_prefixes_counts(qwen) -> None:
    written = lockstep(qwen.rl, qwen.in_, qwen.prompts, Moved("blocks.0"), STEPS)
    for vlm, model in ((qwen.in_, qwen.given.model), (qwen.rl, qwen.other)):
        own = qwen.generate(model, qwen.prompts)
        for one, found, theirs in zip(written, follow(vlm, written, own, batch_size=3), own, strict=True):
            same = []
            for step, token in enumerate(one.tokens):
                prefix = qwen.prompts[written.index(one)].with_tokens(one.tokens[:step])
                same.append(int(_allowed(prefix, model(**prefix.inputs).logits[0, -1]).argmax()) == token)
            shared = [a == b for a, b in zip(one.tokens, theirs, strict=False)]
            assert found.share == pytest.approx(np.mean(same))
            assert found.prefix == (shared.index(False) if False in shared else len(shared))
            assert (found.own, found.whole) == (len(theirs), list(one.tokens) == theirs)
    for one, found in zip(written, follow(qwen.rl, written, own), strict=True):
        assert found.share == pytest.approx(
            np.mean([a == b for a, b in zip(one.donor_choices, one.tokens, strict=True)])
        )


COMPONENTS = st.lists(
    st.sampled_from(
        [f"blocks.{i}.{p}" for i in range(9) for p in ("attn", "mlp", "attn.head.1", "attn.kv_head.0")]
    ),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(chosen=COMPONENTS, seed=st.integers(0, 5))
def test_random_components_are_as_many_of_each_kind_and_none_of_those_chosen(pair, chosen, seed) -> None:
    found = random_components(pair.in_, chosen, 3, seed)
    assert found == random_components(pair.in_, chosen, 3, seed) and len(set(found)) == 3
    kinds = Counter(kind_of(Address.parse(name)) for name in chosen)
    for some in found:
        assert len(set(some)) == len(some) == len(chosen)
        assert Counter(kind_of(Address.parse(name)) for name in some) == kinds
        assert not any(overlap(Address.parse(a), Address.parse(b)) for a in some for b in chosen)


def test_what_overlaps() -> None:
    def both(one: str, other: str) -> bool:
        pairs = Address.parse(one), Address.parse(other)
        assert overlap(*pairs) == overlap(*pairs[::-1])
        return overlap(*pairs)

    assert both("blocks.1.attn", "blocks.1.attn.head.0") and both("blocks.1", "blocks.1.mlp.neuron.3")
    assert both("projector", "projector") and both("blocks.1.attn.head.0", "blocks.1.attn.head.0")
    assert not both("blocks.1.attn.head.1", "blocks.1.attn.head.0") and not both("blocks.1", "blocks.2")
    assert not both("blocks.1.attn", "blocks.1.mlp") and not both("blocks.1", "vision.blocks.1")
    assert not both("projector", "blocks.0")
    assert single(["blocks.0-1.mlp", "blocks.1.mlp"]) == ("blocks.0.mlp", "blocks.1.mlp")


def test_confirm_is_lockstep_graded_and_paired(pair) -> None:
    examples = [example for task in ("sum", "same") for example in sample(task, 8, 3, "map")]
    bad = Example("empty", (), " ", "1")
    sets = {"all": ["blocks.0-8", "ln_final"], "one": ["blocks.3.mlp"]}
    with pytest.raises(FrankenlensError, match=r"of the kind text are chosen and 0 others"):
        confirm(pair, examples, sets, n_random=1)
    assert not pair.in_._standing._layers
    found = confirm(
        pair, [*examples, bad], sets, n_random=0, batch_size=16, max_new_tokens=16, progress=False
    )
    drawn = confirm(
        pair,
        examples,
        sets["one"],
        n_random=2,
        directions=["rl_to_in"],
        batch_size=16,
        max_new_tokens=16,
        progress=False,
    )
    prompts = [pair.builder.build(example) for example in examples]
    own = {}
    for name, vlm in pair.models.items():
        own[name] = greedy(vlm, prompts, 16)
        answers = [
            p.builder.read_trace(p.with_tokens(i)).answer for p, i in zip(prompts, own[name], strict=True)
        ]
        right = [grade(a, e) for a, e in zip(answers, examples, strict=True)]
        np.testing.assert_array_equal(found["own"].sel(model=name)[:-1], right)
    assert np.isnan(found["right"][..., -1]).all() and "empty question" in str(
        found["why"].to_numpy()[0, 0, -1]
    )
    # ln_final moved, and the head shared by both (RL's training moved the tied embedding hardly): RL's answers
    moved = lockstep(pair.rl, pair.in_, prompts, Moved(("blocks.3.mlp",)), 16)
    right = np.array(
        [grade(one.answer, example) for one, example in zip(moved, examples, strict=True)], float
    )
    np.testing.assert_array_equal(found["right"].sel(direction="rl_to_in", condition="one")[:-1], right)
    np.testing.assert_array_equal(drawn["right"].sel(direction="rl_to_in")[0], right)
    followed = follow(pair.rl, moved, own["rl"])
    np.testing.assert_allclose(
        found["share_donor"].sel(direction="rl_to_in", condition="one")[:-1], [f.share for f in followed]
    )
    table = confirmation(drawn)
    row = table.loc[(table["function"] == "all") & (table["direction"] == "rl_to_in")].iloc[0]
    before = found["own"].sel(model="in").to_numpy()[:-1]
    interval = change_interval(right, before)
    assert (row["change"], row["change_low"]) == (pytest.approx(interval.value), pytest.approx(interval.low))
    test = mcnemar(right, before)
    assert (row["p"], row["gained"], row["lost"], row["n"]) == (test.p, test.gained, test.lost, 16)
    chance = drawn["right"].sel(direction="rl_to_in").to_numpy()[1:].mean(0)
    assert row["above"] == pytest.approx((right - chance).mean()) and row["random"] == pytest.approx(
        chance.mean()
    )
    assert (drawn["draw"].to_numpy() == [-1, 0, 1]).all()
    assert confirmation(found)["left_out"].max() == 1
    assert found["direction"].to_numpy().tolist() == ["rl_to_in", "in_to_rl"]


def test_refusals_name_the_thing_and_the_row(qwen) -> None:
    def refused(why: str, *args, prompts=qwen.prompts, donor=qwen.rl, steps=STEPS, **kwargs) -> None:
        with pytest.raises(FrankenlensError, match=why):
            lockstep(donor, qwen.in_, prompts, Moved(*args, **kwargs) if args else (), steps)

    wide = copy.deepcopy(qwen.other)
    wide.resize_token_embeddings(120)
    refused("120 entries and the recipient's", donor=HookedVLM(wide, inputs=qwen.given.inputs()))
    blind = qwen.prompts[0].builder.build(Example("blind", (), "how many", ""))
    rows = [*qwen.prompts[:2], blind]
    refused(r"row 2 \(blind\) has no token of the role 'image'", "blocks.0", ("image",), prompts=rows)
    refused(r"row 2 \(blind\) has no token of the role 'image'", "projector", prompts=rows)
    refused(r"row 1 \(e1\): \d+ tokens and 460 to be written are longer", prompts=rows, steps=460)
    refused("blocks 0-2", "blocks.3-7")
    refused("heads 0-3", "blocks.1.attn.head.4")
    refused("neurons 0-39", "blocks.1.mlp.neuron.99")
    refused("vision has weights but no activation", "vision")
    refused("computed once, while the prompt is read", "vision.blocks.0", ("generated",))
    refused("computed once", "projector", ("image",), from_divergence=True)
    refused("no axis of the decoder's tokens", "blocks.1.attn.hook_pattern")
    refused("none of prefill.* Did you mean 'reasoning'", "blocks.0", ("reasonin",))
    refused("at least one component", ())
    plain = PromptBuilder(qwen.given.processor, TraceFormat(reasoning=None, answer=None))
    silent = [plain.build(qwen.prompts[0].example)]
    refused(r"row 0 \(e0\): its trace format has no reasoning", "blocks.0", ("reasoning",), prompts=silent)
    faults: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.0}, {"seed": -1}]
    for wrong in faults:
        with pytest.raises(FrankenlensError, match="temperature is above 0"):
            Sampling(**wrong)
    assert lockstep(qwen.rl, qwen.in_, []) == []


def test_a_run_that_fails_leaves_no_hook_behind(qwen, monkeypatch) -> None:
    expected = tokens(alone(qwen.in_, qwen.prompts, STEPS))

    def fail(self, tokens, ended):
        raise RuntimeError("midway")

    with monkeypatch.context() as patched:
        patched.setattr(Places, "advance", fail)
        with pytest.raises(RuntimeError, match="midway"):
            lockstep(qwen.rl, qwen.in_, qwen.prompts, Moved("blocks.0-2"), STEPS)
    assert not qwen.in_._standing._layers and not qwen.rl._standing._layers
    assert qwen.generate(qwen.given.model, qwen.prompts) == expected


@pytest.mark.slow
def test_lockstep_is_as_fast_as_the_two_models_generating_one_after_the_other() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.interp.lockstep.lockstep_speed"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    print({name: round(value, 3) for name, value in found.items()})
    assert min(found.values()) >= 0.8
