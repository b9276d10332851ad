"""Claims: the test's size and power by simulation, corrections against statsmodels, measurements against plain hooks
and state dicts put together by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hooks import FrankenlensError
from interp.decision import find_decisions
from interp.hypotheses import (
    Claim,
    Family,
    Ledger,
    Measured,
    fingerprint,
    judge,
    origins,
    put_to_test,
    scores,
    unseen,
)
from interp.hypotheses.measure import measure, resolved
from interp.hypotheses.one_sided import MIN_TESTED, adjusted, detectable, examples_needed, one_sided
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.questions.tasks import sample
from interp.statistics import adjust

BOUND = 0.2


@dataclasses.dataclass(frozen=True)
class Draw:
    """A distribution of prompts on which a recovery is exactly `BOUND`: what there is to move, and what is moved."""

    total: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    effect: Callable[[np.random.Generator, np.ndarray], np.ndarray]

    def __call__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        total = self.total(rng, shape)
        return self.effect(rng, total), total

    def families(
        self, rng: np.random.Generator, shape: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """[family claim example], every claim of a family on the same examples.

        What there is to move is theirs in common, and on two examples in three what is moved.
        """
        total = np.broadcast_to(self.total(rng, (shape[0], 1, shape[2])), shape)
        common = self.effect(rng, total[:, :1])
        return np.where(rng.random(shape) < 2 / 3, common, self.effect(rng, total)), total


DRAWS: dict[str, Draw] = {
    "normal": Draw(
        lambda rng, shape: rng.normal(3, 1, shape), lambda rng, t: BOUND * t + rng.normal(0, 1, t.shape)
    ),
    # a fifth of the prompts move all the way, the others not at all
    "few carry it all": Draw(
        lambda rng, shape: rng.lognormal(0, 0.7, shape), lambda rng, t: t * (rng.random(t.shape) < BOUND)
    ),
    # every prompt moves by the same, whatever there is to move: the scores are a mirrored exponential
    "skewed left": Draw(lambda rng, shape: rng.exponential(1, shape), lambda rng, t: np.full(t.shape, BOUND)),
    "heavy tails": Draw(
        lambda rng, shape: rng.lognormal(0, 0.5, shape),
        lambda rng, t: BOUND * t + rng.standard_t(3, t.shape),
    ),
}


def _claim(name: str = "a", **changes) -> Claim:
    return Claim(
        **{"name": name, "component": "blocks.3.mlp", "at_least": BOUND, "found_on": frozenset(), **changes}
    )


def _measured(effect: np.ndarray, total: np.ndarray) -> Measured:
    return Measured(effect, np.zeros_like(effect), total, "nats")


def _judged(claims: list[Claim], drawn: list[tuple[np.ndarray, np.ndarray]], correction="holm", resamples=2):
    family = Family("f", tuple(claims), correction)
    measured = {claim.name: _measured(*own) for claim, own in zip(claims, drawn, strict=True)}
    named = {claim.name: claim for claim in claims}
    return judge(family, named, measured, {c.name: "held out" for c in claims}, resamples=resamples)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("n", [30, 40, 100])
def test_claims_on_their_bound_are_supported_and_refuted_no_oftener_than_alpha(name, n) -> None:
    """200 claims, as the bar says, then enough for the size itself: at most 1.5 points above alpha."""
    effect, total = DRAWS[name](np.random.default_rng(0), (6000, n))
    above, below = one_sided(scores(_claim(), _measured(effect, total)))
    for p in (above, below):
        assert (p[:200] <= 0.05).sum() <= 16
        assert (p <= 0.05).mean() <= 0.065, (name, (p <= 0.05).mean())


def test_students_t_alone_would_not_keep_its_size() -> None:
    effect, total = DRAWS["skewed left"](np.random.default_rng(0), (6000, 40))
    d = scores(_claim(), _measured(effect, total))
    t = d.mean(-1) / stats.sem(d, axis=-1)
    assert (stats.t.sf(t, 39) <= 0.05).mean() > 0.085


@pytest.mark.parametrize("name", DRAWS)
def test_holm_keeps_the_family_wise_rate_over_1000_families(name) -> None:
    """Families of ten claims on their bound, on the same prompts, so that they err together."""
    rng = np.random.default_rng(1)
    effect, total = DRAWS[name].families(rng, (1000, 10, 60))
    d = scores(_claim(), _measured(effect, total))
    assert np.corrcoef(d[:, 0].ravel(), d[:, 1].ravel())[0, 1] > 0.4
    above, _ = one_sided(d)
    wrong = (adjusted(above, "holm") <= 0.05).any(-1).mean()
    assert wrong <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)
    assert (above <= 0.05).any(-1).mean() > 2 * wrong  # uncorrected, it would not be kept


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), min_size=1, max_size=12),
    st.sampled_from(["holm", "bh"]),
)
def test_corrections_are_those_of_statsmodels(p, method) -> None:
    values = np.array(p)
    expected = adjust(np.where(np.isnan(values), 1.0, values), method)
    got = adjusted(np.stack([values, values]), method)
    np.testing.assert_allclose(got[0], np.where(np.isnan(values), np.nan, expected), atol=1e-12)
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("name", DRAWS)
def test_predicted_power_is_the_observed_one_within_ten_points(name) -> None:
    """Plants beyond the bound, judged on prompts drawn anew; the prediction comes from single draws of the same n."""
    rng, n, truth = np.random.default_rng(2), 60, 0.3
    effect, total = DRAWS[name](rng, (2000, n))
    effect = effect + (truth - BOUND) * total
    claim = _claim(expected=truth)
    above, _ = one_sided(scores(claim, _measured(effect, total)))
    observed = (above <= 0.05).mean()
    predicted = [_judged([claim], [(effect[i], total[i])], resamples=300)[0].power for i in range(20)]
    assert abs(np.median(predicted) - observed) < 0.1, (observed, predicted)


def test_power_of_a_family_counts_its_correction() -> None:
    rng, n = np.random.default_rng(3), 60
    effect, total = DRAWS["normal"](rng, (1500, 4, n))
    effect[:, 0] += 0.1 * total[:, 0]
    claims = [_claim(str(k), expected=0.3) for k in range(4)]
    above, _ = one_sided(scores(claims[0], _measured(effect, total)))
    observed = (adjusted(above, "holm")[:, 0] <= 0.05).mean()
    predicted = [
        _judged(claims, list(zip(effect[i], total[i], strict=True)), resamples=300)[0].power
        for i in range(12)
    ]
    alone = (above[:, 0] <= 0.05).mean()
    assert abs(np.median(predicted) - observed) < 0.1
    assert alone - observed > 0.1  # what the correction costs


def test_examples_needed_and_detectable_are_the_noncentral_t() -> None:
    shift, sd, level = 0.3, 1.0, 0.05

    def power_at(n: int, mean: float) -> float:
        return float(stats.nct.sf(stats.t.ppf(1 - level, n - 1), n - 1, mean / sd * np.sqrt(n)))

    n = examples_needed(shift, sd, level)
    assert n is not None
    assert power_at(n, shift) >= 0.8 > power_at(n - 1, shift)
    assert power_at(50, detectable(sd, 50, level)) == pytest.approx(0.8, abs=1e-4)
    assert examples_needed(-0.1, sd, level) is None


def _one_in_a_hundred(rng: np.random.Generator, draws: int, n: int) -> Measured:
    """Recovery 0.01: one example in a hundred moves all the way, the others by as good as nothing."""
    total = rng.lognormal(0, 0.3, (draws, n))
    return _measured(
        total * np.where(rng.random((draws, n)) < 0.01, 1, rng.normal(0, 1e-3, (draws, n))), total
    )


def test_few_examples_that_carry_all_are_not_overlooked() -> None:
    """60 examples without one of them are no proof that there is none; 600 are seen to hold some."""
    claim = _claim(at_least=None, at_most=0.01)
    own = _one_in_a_hundred(np.random.default_rng(6), 2000, 60)
    assert (one_sided(scores(claim, own))[0] <= 0.05).mean() > 0.4
    assert (one_sided(scores(claim, own), unseen(claim, own))[0] <= 0.05).mean() == 0
    looser = _claim(at_least=None, at_most=0.05)
    own = _one_in_a_hundred(np.random.default_rng(6), 200, 600)
    assert (one_sided(scores(looser, own), unseen(looser, own))[0] <= 0.05).mean() > 0.8


def test_the_p_of_unseen_examples_is_the_binomial_chance_of_none() -> None:
    d = np.random.default_rng(7).normal(0, 1e-3, 60)
    d += -0.02 - d.mean()
    q = 0.02 / (0.02 + 0.98)  # (1 - q) (-0.02) + q 0.98 = 0
    above, below = one_sided(d, 0.98)
    assert float(below) == pytest.approx(stats.binom.pmf(0, 60, q))
    assert float(above) == float(one_sided(d)[0])
    assert float(one_sided(-d, -0.98)[0]) == pytest.approx(float(below))


@pytest.mark.parametrize(
    ("changes", "moved_all_the_way"),
    [
        ({"at_least": 0.2}, 0.8 * 2),
        ({"at_least": None, "at_most": 0.2}, -0.8 * 2),
        ({"at_least": -0.2}, -0.8 * 2),
        ({"at_least": 0.0}, 0),
        ({"at_least": 1.2}, 0),
        ({"at_least": 0.5, "quantity": "effect"}, 1.5),
        ({"at_least": None, "at_most": 0.05, "quantity": "accuracy", "body": "weights"}, -0.95),
    ],
)
def test_what_an_unseen_example_scores(changes, moved_all_the_way) -> None:
    """Of 2 nats on average; "all the way" is on the bound's side of 0, and nowhere for a bound of 0 or beyond all."""
    total = np.array([1.0, 3.0, 2.0, np.nan])
    own = _measured(np.array([0.1, 0.2, 0.3, np.nan]), total)
    assert float(unseen(_claim(**changes), own)) == pytest.approx(moved_all_the_way)
    there = _measured(np.full(3, 2.0), np.full(3, 2.0))
    if changes == {"at_least": 0.2}:
        np.testing.assert_allclose(scores(_claim(), there), moved_all_the_way)


def test_examples_needed_and_detectable_reckon_with_the_unseen() -> None:
    """Against the share of simulated samples that pass."""
    sd, level, away = 0.1, 0.05, -0.8
    rng = np.random.default_rng(8)

    def passed(n: int, mean: float) -> float:
        return float((one_sided(rng.normal(mean, sd, (4000, n)), away)[0] <= level).mean())

    assert passed(60, detectable(sd, 60, level, unseen=away)) == pytest.approx(0.8, abs=0.03)
    assert passed(60, detectable(sd, 60, level)) < 0.5
    alone, n = (examples_needed(0.03, sd, level, unseen=one) for one in (0.0, away))
    assert n is not None and alone is not None
    assert passed(n, 0.03) == pytest.approx(0.8, abs=0.03)
    assert n > 1.2 * alone


@pytest.mark.parametrize("direction", ["rl_to_in", "in_to_rl"])
@pytest.mark.parametrize(("bound", "verdict"), [(0.3, "supported"), (0.7, "refuted"), (0.5, "undecided")])
def test_a_recovery_is_judged_by_the_ratio_of_sums(direction, bound, verdict) -> None:
    """Recovery 0.5, in both directions and from both sides."""
    rng = np.random.default_rng(4)
    total = rng.lognormal(0, 0.5, 60)
    effect = 0.5 * total + rng.normal(0, 0.2, 60)
    effect *= 0.5 * total.sum() / effect.sum()
    if direction == "in_to_rl":
        effect, total = -effect, -total
    claim = _claim(direction=direction, at_least=bound)
    mirrored = _claim("b", direction=direction, at_least=None, at_most=bound)
    found = _judged([claim, mirrored], [(effect, total)] * 2, resamples=50)
    assert found[0].verdict == verdict
    assert found[1].verdict == {"supported": "refuted", "refuted": "supported"}.get(verdict, verdict)
    assert float(found[0].interval.value) == pytest.approx(effect.sum() / total.sum())
    assert found[0].p == pytest.approx(found[1].p_against)


@pytest.mark.parametrize("direction", ["rl_to_in", "in_to_rl"])
@pytest.mark.parametrize(
    ("control", "verdict"), [(0.1, "supported"), (1.0, "undecided"), (-1.0, "undecided")]
)
def test_a_control_that_moves_more_than_the_component_is_no_support(direction, control, verdict) -> None:
    """Recovery 0.5 against 0.2: the control's size counts, whatever its sign; of something small nothing is asked."""
    rng = np.random.default_rng(9)
    way = 1 if direction == "rl_to_in" else -1
    total = rng.lognormal(0, 0.3, 60)
    noise = rng.normal(0, 0.1, (2, 60))
    own = Measured(way * (0.5 * total + noise[0]), way * (control * total + noise[1]), way * total, "nats")
    claims = [
        _claim("much", direction=direction),
        _claim("little", direction=direction, at_least=None, at_most=0.7),
    ]
    by_name = {claim.name: claim for claim in claims}
    found = judge(
        Family("f", tuple(claims)),
        by_name,
        dict.fromkeys(by_name, own),
        dict.fromkeys(by_name, "held out"),
        resamples=20,
    )
    assert found[0].p < 1e-6
    assert (found[0].verdict, found[1].verdict) == (verdict, "supported")
    assert ("moves as much or more" in found[0].reason) == (verdict == "undecided")
    over: Any = stats.ttest_1samp(
        abs(own.effect) - np.sign(control) * way * own.control, 0, alternative="greater"
    )
    expected = over.pvalue
    assert (found[0].p_control < 0.05) == (expected < 0.05)
    assert found[0].control_says == ("beyond control" if verdict == "supported" else "not told from control")


def test_a_paired_accuracy_against_0_is_mcnemars_exact_test() -> None:
    d = np.zeros(200)
    d[:7] = 1
    d[7] = -1
    above, below = one_sided(d)
    assert float(above) == pytest.approx(stats.binomtest(7, 8, alternative="greater").pvalue)
    assert float(below) == pytest.approx(max(stats.binomtest(7, 8, alternative="less").pvalue, float(below)))


def test_too_few_examples_give_no_verdict_and_no_variation_an_exact_one() -> None:
    few = np.full(60, np.nan)
    few[: MIN_TESTED - 1] = np.random.default_rng(0).normal(5, 1, MIN_TESTED - 1)
    claims = [_claim("few", quantity="effect"), _claim("same", quantity="effect")]
    found = _judged(claims, [(few, np.ones(60)), (np.full(60, 0.3), np.ones(60))])
    assert [v.verdict for v in found] == ["undecided", "supported"]
    assert (
        found[0].reason
        == f"{MIN_TESTED - 1} examples have a value; a verdict takes {MIN_TESTED}: give more (--n)"
    )
    bound = claims[1].bound  # an example can lie as far below it as the whole, 1 nat, the other way
    none = (1 - (0.3 - bound) / (0.3 - bound + 1 + bound)) ** 60
    assert found[1].p == pytest.approx(2 * none)  # Holm, of two
    assert found[1].reason == "" and np.isnan(float(found[1].interval.low))


def test_no_recovery_is_judged_where_rl_and_in_do_not_differ() -> None:
    rng = np.random.default_rng(5)
    found = _judged([_claim()], [(rng.normal(1, 1, 60), rng.normal(0, 1, 60))])[0]
    assert found.verdict == "refused"
    assert "includes 0" in found.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"component": "blocks.3.atn"}, "Did you mean"),
        ({"at_least": None}, "no effect size"),
        ({"at_most": 0.5}, "two effect sizes"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": 1.0}, "alpha is 1"),
        ({"at_least": float("nan")}, "no number"),
        ({"expected": 0.1}, "does not lie beyond the bound"),
        ({"quantity": "recovry"}, "Did you mean 'recovery'"),
        ({"quantity": "accuracy"}, "body: weights"),
        ({"body": "weights", "role": "reasoning"}, "leave role"),
    ],
)
def test_a_claim_that_cannot_be_tested_is_one_error(changes, words) -> None:
    with pytest.raises(FrankenlensError, match=words):
        _claim(**changes)


def test_a_family_has_one_alpha_and_names_that_differ() -> None:
    with pytest.raises(FrankenlensError, match=r"share one alpha; these have 0.01, 0.05"):
        Family("f", (_claim("a"), _claim("b", alpha=0.01)))
    with pytest.raises(FrankenlensError, match="two claims are named 'a'"):
        Family("f", (_claim("a"), _claim("a")))


def test_prompts_a_claim_was_found_on_are_refused_by_id_and_by_content() -> None:
    examples = sample("sum", 4, seed=3, split="map")
    renamed = [dataclasses.replace(e, id=f"other {i}") for i, e in enumerate(examples)]
    by_id = _claim(found_on=frozenset({examples[1].id}))
    by_content = _claim(found_on=frozenset({fingerprint(examples[1])}))
    for claim, prompts in ((by_id, examples), (by_content, examples), (by_content, renamed)):
        family = Family("f", (claim,))
        with pytest.raises(FrankenlensError, match="found on 1 of the 4 prompts"):
            origins(family, prompts)
        assert origins(family, prompts, allow_reuse=True) == {"a": "exploratory"}
    assert origins(Family("f", (by_id,)), renamed) == {"a": "held out"}
    assert origins(Family("f", (_claim(found_on=None),)), examples) == {"a": "not stated"}


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return sample("sum", 52, seed=11, split="map")


@pytest.fixture(scope="module")
def decisions(pair, held_out):
    return find_decisions(pair, held_out, "first", max_new_tokens=48)


@torch.no_grad()
def test_components_moved_together_are_those_of_plain_hooks(pair, decisions, held_out) -> None:
    """A block (attn and mlp at once) and all heads of a layer, against hooks on one prompt at a time."""
    heads = tuple(f"blocks.4.attn.head.{h}" for h in range(pair.in_.anatomy.text.blocks[4].n_heads))
    claims = (
        _claim("block", component="blocks.4"),
        _claim("heads", component=heads, role="decision"),
        _claim("region", component="Mid", direction="in_to_rl"),
    )
    family = Family("f", claims, partition="3/3/3")
    found = measure(pair, resolved(family, pair.in_), held_out, decisions, progress=False)
    names = {
        "block": ["blocks.4.hook_attn_out", "blocks.4.hook_mlp_out"],
        "heads": ["blocks.4.hook_attn_out"],  # the sum of its heads: no bias is added after W_O
        "region": [f"blocks.{i}.hook_{part}_out" for i in (3, 4, 5) for part in ("attn", "mlp")],
    }
    largest = 0.0
    for claim in claims:
        recipient, donor = (pair.in_, pair.rl) if claim.direction == "rl_to_in" else (pair.rl, pair.in_)
        for decision in decisions.decisions[:3]:
            inputs, at = decision.prompt.inputs, decision.prompt
            _, cache = donor.run_with_cache(inputs, names[claim.name])
            columns = slice(len(at) - 1, None) if claim.role == "decision" else slice(None)

            def put(activation, hook, cache=cache, columns=columns):
                activation[:, columns] = cache[hook.name][:, columns]
                return activation

            clean = recipient.model(**inputs).logits[0, -1]
            moved = recipient.run_with_hooks(inputs, fwd_hooks=[(n, put) for n in names[claim.name]]).logits[
                0, -1
            ]
            tokens = [decision.rl_token, decision.in_token]
            expected = float((moved - clean)[tokens[0]] - (moved - clean)[tokens[1]])
            tolerance = 1e-5 * max(1.0, float(clean.abs().max()))
            assert abs(found[claim.name].effect[decision.row] - expected) < tolerance
            largest = max(largest, abs(expected) / tolerance)
    assert largest > 100


def test_weights_moved_are_those_of_a_state_dict_put_together_by_hand(pair, decisions, held_out) -> None:
    family = Family("f", (_claim("w", component="blocks.4.mlp", body="weights"),))
    found = measure(pair, resolved(family, pair.in_), held_out, decisions, progress=False)["w"]
    own = {name: tensor.clone() for name, tensor in pair.in_.model.state_dict().items()}
    path = pair.in_.anatomy.text.blocks[4].mlp + "."
    theirs = pair.rl.model.state_dict()
    mixed = {name: theirs[name] if name.startswith(path) else tensor for name, tensor in own.items()}
    decision = decisions.decisions[0]
    tokens = [decision.rl_token, decision.in_token]
    with torch.no_grad():
        clean = pair.in_.model(**decision.prompt.inputs).logits[0, -1, tokens]
        pair.in_.model.load_state_dict(mixed)
        moved = pair.in_.model(**decision.prompt.inputs).logits[0, -1, tokens]
        pair.in_.model.load_state_dict(own)
    expected = float((moved - clean)[0] - (moved - clean)[1])
    assert abs(found.effect[decision.row] - expected) < 1e-4 < abs(expected) / 100
    assert np.isnan(found.effect).sum() == len(held_out) - len(decisions)


def test_a_real_plant_the_whole_decoder_is_found_and_a_null_head_is_not(pair, held_out) -> None:
    """All of RL's weights are RL: their recovery is 1 by construction, whatever the training did."""
    whole = ("blocks.0-8", "vision", "projector", "embed", "ln_final")
    claims = (
        _claim("everything", component=whole, body="weights", at_least=0.9),
        _claim("too much", component=whole, body="weights", at_least=1.2),
        _claim("one head", component="blocks.8.attn.head.0", at_least=0.5, role="template"),
    )
    before = {name: tensor.clone() for name, tensor in pair.in_.model.state_dict().items()}
    outcome = put_to_test(
        pair, Family("f", claims, decision="first"), held_out, max_new_tokens=48, progress=False
    )
    by_name = {v.claim.name: v for v in outcome.verdicts}
    assert float(by_name["everything"].interval.value) == pytest.approx(1, abs=1e-4)
    assert [v.verdict for v in outcome.verdicts] == ["supported", "refuted", "refuted"]
    assert by_name["everything"].control_says == "beyond control"
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.in_.model.state_dict().items())


def test_a_look_at_the_prompts_that_a_claim_was_found_on_is_no_test_of_it(pair, held_out, tmp_path) -> None:
    found_on, fresh = held_out, sample("sum", 20, seed=12, split="map")
    claim = _claim(
        component=("blocks.0-8", "embed"), body="weights", found_on=frozenset(e.id for e in found_on)
    )
    family, ledger = Family("f", (claim,), decision="first"), tmp_path / "looks.jsonl"
    settings = {"max_new_tokens": 48, "progress": False, "allow_reuse": True}
    (seen,) = put_to_test(pair, family, found_on, ledger=Ledger(ledger), **settings).verdicts
    assert (seen.verdict, seen.origin) == ("supported", "exploratory")
    assert not ledger.exists()
    (test,) = put_to_test(pair, family, fresh, ledger=Ledger(ledger), **settings).verdicts
    assert (test.look, test.origin) == (1, "held out")
    assert len(ledger.read_text().splitlines()) == 1


def test_an_identical_pair_supports_nothing(pair, held_out) -> None:
    same = Pair(pair.in_, pair.in_)
    claims = tuple(
        _claim(f"{quantity} {at}", quantity=quantity, body="weights", **{"at_least": None, at: value})
        for quantity in ("recovery", "effect", "accuracy")
        for at, value in (("at_least", -0.1), ("at_least", 0.0), ("at_most", 0.1))
        if not (at == "at_least" and value == 0.0)
    )
    for decision in ("first", "decisive", "soft"):
        outcome = put_to_test(same, Family("f", claims, decision=decision), held_out, progress=False)
        assert {v.verdict for v in outcome.verdicts} == {"refused"}
        assert "same weights" in outcome.verdicts[0].reason


def test_a_component_the_model_does_not_have_is_refused_before_anything_runs(pair, held_out) -> None:
    for component, role, words in (
        ("blocks.40.mlp", "all", "blocks.40.mlp"),
        ("blocks.3.attn.head.99", "all", "blocks.3.attn.head.99"),
        ("unembed", "all", "no activation"),
        ("projector", "all", "role: image"),
        ("region 7", "all", "no region 'region 7'"),
    ):
        claim = _claim("x", component=component, role=role, where="f.yaml:7")
        with pytest.raises(FrankenlensError, match=words) as caught:
            put_to_test(pair, Family("f", (claim,)), held_out)
        assert str(caught.value).startswith("f.yaml:7: claim 'x': ")
