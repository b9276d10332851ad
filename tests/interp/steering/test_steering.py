"""Steering: directions against NumPy, a planted bias found and put back, generation against plain hooks."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as fed
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.lockstep import Sampling
from interp.lockstep.run import alone
from interp.pair.generation import greedy_batch
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.tasks import grade, sample
from interp.statistics import change_interval, mcnemar, mean_test
from interp.steering import (
    Direction,
    Steering,
    differences,
    dose_response,
    dose_table,
    mean_difference,
    principal_directions,
    random_directions,
    steer,
    steer_hooks,
)
from interp.steering.plots import plot_dose
from tests.families import EACH_KIND, QWEN, redraw, tiny
from tests.hooks.interventions import intervention

STEPS, DOSE = 6, 5.0
SITE = "blocks.1.hook_mlp_out"


class Planted:
    """RL is IN with a vector added to the bias that its second MLP writes; else nothing differs."""

    def __init__(self, family: str) -> None:
        self.given = tiny(family)
        with torch.no_grad():
            self.given.model.get_input_embeddings().weight.mul_(0.3)
        builder = PromptBuilder(self.given.processor, TraceFormat(("<think>", "</think>"), ("answer", None)))
        size = [(32, 40)] if family in QWEN else [(16, 32)]
        images = self.given.images(3, sizes=size, seed=3)
        questions = ("how many red", "what shape in row 2 , red or blue ?", "what")
        self.prompts = [
            builder.build(Example(f"e{i}", (images[i],), question, "5"))
            for i, question in enumerate(questions)
        ]
        self.vector = torch.randn(32, generator=torch.Generator().manual_seed(2)) * 6
        self.other = copy.deepcopy(self.given.model)
        inputs = self.given.inputs()
        self.in_ = HookedVLM(self.given.model, self.given.processor, inputs=inputs)
        down: Any = self.other.get_submodule(self.in_.anatomy.text.blocks[1].mlp_out)
        bias = torch.zeros(32) if down.bias is None else down.bias.detach()
        down.bias = torch.nn.Parameter(bias + self.vector)
        self.rl = HookedVLM(self.other, self.given.processor, inputs=inputs)


@pytest.fixture(scope="module", params=EACH_KIND)
def planted(request: pytest.FixtureRequest) -> Planted:
    return Planted(request.param)


@pytest.fixture(scope="module")
def qwen() -> Planted:
    return Planted("qwen2_5_vl")


def _differences(planted, prompts, when):
    pair = Pair.__new__(Pair)  # unchecked: it would refuse a bias that IN does not have
    pair.in_, pair.rl, pair.base = planted.in_, planted.rl, None
    return differences(pair, prompts, SITE, when, batch_size=2)


def test_a_planted_vector_is_found_and_put_back(planted) -> None:
    """At the MLP that differs, every token of every example differs by the vector; adding it to IN makes RL."""
    traces = [prompt.with_tokens(prompt.builder.encode("<think> red 3")) for prompt in planted.prompts]
    scale = float(planted.vector.abs().max())
    for when in (("prefill",), ("generated",), ("image", "reasoning"), ("question",)):
        found = _differences(planted, traces, when)
        assert (found - planted.vector).abs().max() <= 1e-5 * max(1.0, scale) * 10
    mean, first = mean_difference(found, SITE), principal_directions(found, SITE, 1)[0]
    torch.testing.assert_close(mean.vector, planted.vector, atol=1e-4, rtol=0)
    torch.testing.assert_close(first.vector, planted.vector, atol=1e-4, rtol=0)
    assert mean.share == pytest.approx(1) and first.share == pytest.approx(1)
    own, theirs = (
        [one.tokens for one in alone(vlm, planted.prompts, STEPS)] for vlm in (planted.in_, planted.rl)
    )
    steered = steer(planted.in_, planted.prompts, Steering(mean, 1.0), STEPS)
    assert own != theirs and [one.tokens for one in steered] == theirs
    back = steer(planted.rl, planted.prompts, [Steering(mean, -0.25), Steering(mean, -0.75)], STEPS)
    assert [one.tokens for one in back] == own


@torch.no_grad()
def test_differences_are_plain_means_of_plain_hooks(qwen) -> None:
    other = copy.deepcopy(qwen.given.model)
    redraw(other, 9)
    pair = Pair.__new__(Pair)
    pair.in_, pair.rl, pair.base = qwen.in_, HookedVLM(other, inputs=qwen.given.inputs()), None
    traces = [
        prompt.with_tokens(prompt.builder.encode("<think> red 3 </think> answer")) for prompt in qwen.prompts
    ]
    names = {"blocks.2.hook_resid_post": None, "blocks.0.attn.hook_z": 4}
    for site, heads in names.items():
        got = differences(pair, traces, site, ("reasoning", "template"), batch_size=2)
        for row, trace in enumerate(traces):
            means = []
            for model in (other, qwen.given.model):
                seen: list[torch.Tensor] = []

                def keep(a, seen=seen):
                    seen.append(a.clone())
                    return a

                with intervention(model, "qwen2_5_vl", site, keep):
                    model(**trace.inputs)
                chosen = [i for i, role in enumerate(trace.roles) if role in ("reasoning", "template")]
                means.append(seen[0][0, chosen].flatten(1).mean(0))
            expected = means[0] - means[1]
            assert len(expected) == 32 and (heads is None or heads * 8 == 32)
            assert (got[row] - expected).abs().max() <= 1e-5 * max(1.0, float(means[0].abs().max()))
            assert expected.abs().max() > 1e-2


@settings(max_examples=30, deadline=None)
@fed(st.integers(2, 9), st.integers(2, 12), st.integers(0, 99))
def test_directions_are_numpys(n, d, seed) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) + 0.5
    found = torch.tensor(x, dtype=torch.float32)
    mean = mean_difference(found, SITE)
    np.testing.assert_allclose(mean.vector, x.mean(0), atol=1e-6)
    assert mean.share == pytest.approx(n * (x.mean(0) ** 2).sum() / (x**2).sum(), rel=1e-4)
    values, vectors = np.linalg.eigh(x.T @ x)
    for k, one in enumerate(principal_directions(found, SITE, min(n, d))):
        value, vector = values[::-1][k], vectors[:, ::-1][:, k]
        assert one.share == pytest.approx(value / values.sum(), abs=1e-5)
        assert one.norm == pytest.approx(np.sqrt(max(value, 0) / n), abs=1e-4)
        if k == 0 and value > 1.2 * values[::-1][1]:
            assert abs(float(one.vector.double() @ torch.tensor(vector.copy())) / one.norm) == pytest.approx(
                1, abs=1e-4
            )
        assert float(one.vector @ mean.vector) >= -1e-6
    drawn = random_directions(mean, 3, seed)
    assert all(one.norm == pytest.approx(mean.norm, rel=1e-5) for one in drawn)
    assert not torch.equal(drawn[0].vector, drawn[1].vector)
    assert all(
        torch.equal(a.vector, b.vector) for a, b in zip(drawn, random_directions(mean, 3, seed), strict=True)
    )


def test_random_directions_have_no_direction_of_their_own() -> None:
    """The mean of many is as short as that of uniform draws on the sphere, 1 / sqrt(n)."""
    like = Direction("x", SITE, torch.tensor([3.0, 0, 0, 0]))
    drawn = torch.stack([one.vector for one in random_directions(like, 4000)])
    assert drawn.mean(0).norm() < 3 * 3 / 4000**0.5
    assert (drawn.T @ drawn / 4000 - torch.eye(4) * 9 / 4).abs().max() < 0.15


@torch.no_grad()
@pytest.mark.parametrize("when", [("prefill", "generated"), ("generated",), ("prefill",), ("image",)])
@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"])
def test_steering_while_generating_equals_plain_hooks_under_hugging_face(planted, site, when) -> None:
    width = planted.in_.hook_points[site].axes
    size = 32 if "head" not in width else 4 * planted.in_.anatomy.text.blocks[1].d_head
    vector = torch.randn(size, generator=torch.Generator().manual_seed(1))
    direction = Direction("random", site, vector)
    batch = collate(planted.prompts, "left")
    builder = planted.prompts[0].builder

    def edit(a: torch.Tensor) -> torch.Tensor:
        prefill = a.shape[1] > 1
        mask = (
            batch.mask("image" if "image" in when else "all")
            if prefill
            else torch.ones(a.shape[:2], dtype=torch.bool)
        )
        on = ("generated" in when) if not prefill else ("prefill" in when or "image" in when)
        mask = (mask & on).reshape(*a.shape[:2], *[1] * (a.ndim - 2))
        return torch.where(mask, a + DOSE * vector.reshape(a.shape[2:]), a)

    run = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=list(builder.suppressed_ids),
               eos_token_id=list(builder.end_ids), pad_token_id=builder.pad_id)  # fmt: skip
    width = batch.roles.shape[1]
    with intervention(planted.given.model, planted.given.family, site, edit):
        expected = planted.given.model.generate(**batch.inputs, **run)[:, width:]
    clean = planted.given.model.generate(**batch.inputs, **run)[:, width:]
    assert not torch.equal(expected, clean) or when == ("image",)
    rows = [
        row[: next((i + 1 for i, t in enumerate(row) if t in builder.end_ids), len(row))]
        for row in expected.tolist()
    ]
    found = steer(planted.in_, planted.prompts, Steering(direction, DOSE, when), STEPS)
    assert [list(one.tokens) for one in found] == rows
    assert greedy_batch(planted.in_, batch, STEPS, steer_hooks(direction, DOSE, batch, when)) == rows
    for one in found:
        prompt = {"prefill": one.prompt.n_prompt_tokens, "image": one.prompt.roles.count("image")}
        assert one.n_moved[0] == sum(prompt.get(name, len(one.tokens) - 1) for name in when)


def test_dose_response_is_steered_answers_graded_and_paired() -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    examples = sample("sum", 40, 3, "map")
    prompts = [pair.builder.build(example) for example in examples]
    found = differences(pair, prompts, "blocks.6.hook_resid_post", ("prefill",))
    directions = [mean_difference(found, "blocks.6.hook_resid_post")]
    bad = Example("empty", (), " ", "1")
    run = {"max_new_tokens": 24, "batch_size": 20, "progress": False}
    dose = dose_response(pair.in_, pair.builder, [*examples, bad], directions, (1.0, 8.0), n_random=2, **run)
    assert dose["condition"].to_numpy().tolist() == ["mean", "mean, random 1", "mean, random 2"]
    np.testing.assert_allclose(dose["norm"], directions[0].norm, rtol=1e-5)
    steered = steer(pair.in_, prompts, Steering(directions[0], 8.0), 24)
    right = np.array([grade(one.answer, one.prompt.example) for one in steered], float)
    np.testing.assert_array_equal(dose["right"].sel(condition="mean", coefficient=8.0)[:-1], right)
    clean = np.array([grade(one.answer, one.prompt.example) for one in alone(pair.in_, prompts, 24)], float)
    np.testing.assert_array_equal(dose["clean"][:-1], clean)
    assert np.isnan(dose["clean"][-1]) and np.isnan(dose["right"][..., -1]).all()
    table = dose_table(dose)
    row = table.loc[
        (table["condition"] == "mean") & (table["coefficient"] == 8.0) & (table["function"] == "all")
    ].iloc[0]
    chance = dose["right"].to_numpy()[1:, 1].mean(0)
    change = change_interval(right, clean)
    assert (row["change"], row["change_low"]) == (pytest.approx(change.value), pytest.approx(change.low))
    assert (row["p"], row["n"], row["left_out"]) == (mcnemar(right, clean).p, 40, 1)
    assert row["above"] == pytest.approx((right - chance[:-1]).mean())
    above = right - chance[:-1]
    assert np.std(above) > 0.1  # of so many that the mean has a test
    assert row["p_above"] == pytest.approx(float(mean_test(above)))
    t: Any = stats.ttest_1samp(above, 0)
    assert row["p_above"] == pytest.approx(t.pvalue, rel=0.5)
    assert table.loc[table["draw"] >= 0, "p_corrected"].isna().all()
    figure = plot_dose(table.assign(model="IN"), "all")
    assert len(figure.axes) == 1
    pair.close()


def test_refusals(qwen) -> None:
    direction = Direction("x", SITE, torch.ones(32))
    for wrong, why in (
        (
            lambda: steer(qwen.in_, qwen.prompts, Steering(Direction("x", SITE, torch.ones(7)), 1.0)),
            "has 7 entries",
        ),
        (lambda: Steering(direction, 1.0, ("thinking",)), "none of prefill"),
        (lambda: Steering(direction, 1.0, from_divergence=True), "no donor"),
        (lambda: steer_hooks(direction, 1.0, collate(qwen.prompts, "left"), ("reasoning",)), "use steer"),
        (lambda: steer(qwen.in_, qwen.prompts, Steering(direction, 1.0), 500), r"row 0 \(e0\)"),
        (
            lambda: _differences(qwen, qwen.prompts, ("generated",)),
            r"row 0 \(e0\) has none of the tokens generated",
        ),
        (lambda: principal_directions(torch.ones(2, 4), SITE, 3), "1 to 2 principal directions"),
        (lambda: dose_response(qwen.in_, qwen.prompts[0].builder, [], [direction], (0.0,)), "other than 0"),
        (lambda: dose_response(qwen.in_, qwen.prompts[0].builder, [], [direction]), "no prompt can be run"),
    ):
        with pytest.raises(FrankenlensError, match=why):
            wrong()
    bad = Direction("x", "blocks.1.attn.hook_pattern", torch.ones(3))
    with pytest.raises(FrankenlensError, match="no axis of the decoder's tokens"):
        steer(qwen.in_, qwen.prompts, Steering(bad, 1.0))


def test_a_seeded_row_draws_the_same_whoever_else_is_there(qwen) -> None:
    sampling = Sampling(1.2, 0.9, 4)
    steering = Steering(Direction("x", SITE, qwen.vector), 0.5, ("generated",))
    whole = [one.tokens for one in steer(qwen.in_, qwen.prompts, steering, STEPS, sampling)]
    assert whole == [
        one.tokens for one in steer(qwen.in_, qwen.prompts, steering, STEPS, sampling, batch_size=1)
    ]
    assert whole != [one.tokens for one in steer(qwen.in_, qwen.prompts, steering, STEPS)]
