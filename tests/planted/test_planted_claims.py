"""Claims whose truth is known, on the prompts of real pairs: a pool of them, measured once, is the population.

The quantity over the whole pool is then the truth exactly, and rows drawn from it with replacement are independent
draws of prompts. All claims of a family are judged on the same rows, as in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import stats

from interp.decision import find_decisions
from interp.hypotheses import Claim, Family, Measured, judge, one_sided, put_to_test, scores, unseen
from interp.hypotheses.measure import measure, resolved
from interp.hypotheses.one_sided import adjusted, power
from interp.pair.pair import Pair
from interp.planting import Plant, planted
from interp.questions.examples import Example
from interp.questions.tasks import REASONING, sample

ALPHA, N_DRAWS, N_FAMILIES = 0.05, 200, 1000
N_PROMPTS = 100  # of a draw; 60 of them have a first divergence
BAR = ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / N_FAMILIES)

NULLS: dict[str, dict] = {
    "mlp": {"component": "blocks.3.mlp"},
    "mlp, necessary": {"component": "blocks.8.mlp", "direction": "in_to_rl"},
    "attn, heavy tails": {"component": "blocks.4.attn"},
    "head": {"component": "blocks.6.attn.head.2", "role": "decision"},
    "head, on few prompts": {"component": "blocks.5.attn.head.0"},
    "Early": {"component": "Early", "role": "image"},
    "weights": {"component": "blocks.5.mlp", "body": "weights"},
    "nats": {"component": "blocks.5.mlp", "quantity": "effect"},
    "mlp more than another": {"component": "blocks.3.mlp", "more_than": "blocks.5.mlp"},
}
"""What claims on their bound are of; the bound is what the pool has."""


@dataclass(frozen=True)
class Pool:
    """Claims measured on every prompt of a pool; their bounds mean nothing yet."""

    claims: Mapping[str, Claim]
    measured: Mapping[str, Measured]

    def truth(self, name: str) -> float:
        """The quantity over the pool."""
        own = self.measured[name]
        if self.claims[name].quantity == "effect":
            return float(np.nanmean(own.effect))
        return float(np.nansum(own.effect) / np.nansum(own.total))

    def drawn(self, name: str, rows: np.ndarray) -> Measured:
        """The claim's own values on drawn prompts, [*draws prompt]."""
        own = self.measured[name]
        return Measured(own.effect[rows], own.control[rows], own.total[rows], own.units)

    def on_bound(self, name: str) -> Claim:
        """The claim that is true by nothing and false by nothing."""
        return replace(self.claims[name], at_least=self.truth(name))

    def p_of(self, claims: Mapping[str, Claim], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p for and p against claims on drawn prompts, each [draw claim]."""
        found = []
        for name, claim in claims.items():
            own = self.drawn(name, rows)
            found.append(one_sided(scores(claim, own), unseen(claim, own)))
        above, below = (np.stack(side, -1) for side in zip(*found, strict=True))
        return above, below

    def p_of_nulls(self, draws: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """p for and p against the claims on their bound, each [draw claim]."""
        return self.p_of({name: self.on_bound(name) for name in self.claims}, self.rows(draws, n, seed))

    def rows(self, draws: int, n: int, seed: int) -> np.ndarray:
        size = len(next(iter(self.measured.values())).effect)
        return np.random.default_rng(seed).integers(size, size=(draws, n))


def _asked(n: int, seed: int) -> list[Example]:
    return [example for task in REASONING for example in sample(task, n // len(REASONING), seed, "map")]


def _pool(pair: Pair, wanted: Mapping[str, dict], examples: list[Example], choice: str) -> Pool:
    decisions = find_decisions(pair, examples, choice, max_new_tokens=24, batch_size=64)
    claims = tuple(Claim(name, at_least=0.1, found_on=frozenset(), **own) for name, own in wanted.items())
    known = resolved(Family("nulls", claims, decision=choice), pair.in_)
    return Pool(known, measure(pair, known, examples, decisions, batch_size=64, progress=False))


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in (320, 2000)])
def pool(pair, request) -> Pool:
    return _pool(pair, NULLS, _asked(request.param, 21), "first")


def test_claims_on_their_bound_are_supported_at_most_16_times_in_200(pool) -> None:
    for name in NULLS:
        own = scores(pool.on_bound(name), pool.measured[name])
        assert abs(np.nanmean(own)) < 1e-9 * np.nanstd(own), name
    for p in pool.p_of_nulls(N_DRAWS, N_PROMPTS, seed=0):
        wrong = dict(zip(NULLS, (p <= ALPHA).sum(0), strict=True))
        assert max(wrong.values()) <= 16, wrong
    for p in pool.p_of_nulls(20_000, N_PROMPTS, seed=1):
        size = dict(zip(NULLS, (p <= ALPHA).mean(0), strict=True))
        assert max(size.values()) <= 0.065, size


def test_without_prompts_unseen_a_head_that_works_on_few_would_be_called_small(pool) -> None:
    """What the rule of three is for: one prompt in a hundred carries what the head does."""
    name = "head, on few prompts"
    claim, rows = pool.on_bound(name), pool.rows(N_DRAWS, N_PROMPTS, seed=0)
    own = scores(claim, pool.measured[name])
    assert stats.kurtosis(own, nan_policy="omit") > 30
    _, below = one_sided(scores(claim, pool.drawn(name, rows)))
    assert (below <= ALPHA).sum() > 2 * 16


def test_judge_gives_the_p_of_these_draws(pool) -> None:
    """Both ways round, uncorrected and by Holm."""
    rows = pool.rows(N_DRAWS, N_PROMPTS, seed=0)
    claims = {name: pool.on_bound(name) for name in NULLS}
    mirrored = {n: replace(c, at_least=None, at_most=c.bound) for n, c in claims.items()}
    sides = pool.p_of(claims, rows)
    for own, (above, below) in ((claims, sides), (mirrored, sides[::-1])):
        for correction in ("none", "holm"):
            family = Family("f", tuple(own.values()), correction)
            measured = {name: pool.drawn(name, rows[0]) for name in NULLS}
            found = judge(family, own, measured, dict.fromkeys(NULLS, "held out"), resamples=2)
            np.testing.assert_allclose([v.p for v in found], adjusted(above[0], correction), rtol=1e-9)
            np.testing.assert_allclose(
                [v.p_against for v in found], adjusted(below[0], correction), rtol=1e-9
            )


def test_holm_keeps_the_family_wise_rate_of_claims_on_the_same_prompts(pool) -> None:
    """1,000 families; the claims of each depend on each other as their components do."""
    together = np.ma.corrcoef(
        np.ma.masked_invalid([scores(pool.on_bound(n), pool.measured[n]) for n in NULLS])
    )
    assert np.abs(together[~np.eye(len(NULLS), dtype=bool)]).max() > 0.5
    for p in pool.p_of_nulls(N_FAMILIES, N_PROMPTS, seed=2):
        wrong = (adjusted(p, "holm") <= ALPHA).any(-1).mean()
        assert wrong <= BAR < (p <= ALPHA).any(-1).mean()  # uncorrected, it would not be kept


@pytest.mark.parametrize(
    ("noise", "decision"),
    [
        ("none", "first"),
        ("none", "soft"),
        pytest.param("bf16", "soft", marks=pytest.mark.slow),
        ("gaussian", "soft"),
    ],
)
def test_an_identical_pair_and_one_of_noise_support_none(pair, noise, decision) -> None:
    copy = planted(pair.in_, pair.rl, Plant(noise=noise))
    claims = tuple(
        Claim(f"{name} {at}", found_on=frozenset(), **{**own, at: bound})
        for name, own in NULLS.items()
        for at, bound in (("at_least", -0.1), ("at_most", 0.1))
    )
    if noise != "none":  # an effect of noise is there, if small; a recovery is a share of nothing
        claims = tuple(claim for claim in claims if claim.quantity == "recovery")
    family = Family("f", claims, decision=decision)
    outcome = put_to_test(Pair(pair.in_, copy), family, _asked(40, 3), max_new_tokens=24, progress=False)
    assert {v.verdict for v in outcome.verdicts} == {"refused"}
    copy.close()


N_POWER = 60
PLANTS: dict[tuple[str, ...], list[tuple[dict, str, float]]] = {
    ("blocks.3", "blocks.4", "blocks.5"): [
        ({"component": "blocks.3.mlp"}, "at_least", 1.9),
        ({"component": "blocks.4"}, "at_least", 1.6),
        ({"component": "blocks.4"}, "at_most", 2.3),
        ({"component": "blocks.5", "body": "weights"}, "at_least", 2.0),
    ],
    ("blocks.0-2", "blocks.6-8"): [
        ({"component": "blocks.0-2"}, "at_most", 2.0),
        ({"component": "blocks.8.mlp"}, "at_least", 2.4),
        ({"component": "blocks.6-8", "body": "weights"}, "at_least", 2.0),
        ({"component": "blocks.6-8", "direction": "in_to_rl"}, "at_least", 1.7),
    ],
    ("blocks.1-4.mlp",): [
        ({"component": "blocks.1-4.mlp", "quantity": "effect"}, "at_least", 2.0),
        ({"component": "blocks.3.mlp"}, "at_least", 2.0),
    ],
}
"""What has RL's weights, and claims of it: the bound lies so many standard errors (of n = 60) off the truth."""


@pytest.mark.parametrize(
    "plant",
    [plant if n == 0 else pytest.param(plant, marks=pytest.mark.slow) for n, plant in enumerate(PLANTS)],
    ids=" ".join,
)
def test_predicted_power_on_a_plant_is_the_observed_one_within_ten_points(pair, plant) -> None:
    """The prediction of a single draw scatters; the middle one of 100 is what is held to the ten points."""
    wanted = {f"{claim} {at}": claim for claim, at, _ in PLANTS[plant]}
    model = planted(pair.in_, pair.rl, Plant(plant, noise="none"))
    pool = _pool(Pair(pair.in_, model), wanted, _asked(100, 31), "soft")
    model.close()
    for name, (asked, at, away) in zip(wanted, PLANTS[plant], strict=True):
        if asked["component"] in plant and len(plant) == 1:  # moving all that differs moves everything
            own = pool.measured[name]
            np.testing.assert_allclose(own.effect, own.total, atol=1e-4 * np.abs(own.total).max())
        claim = _short_of_the_truth(pool, name, at, away)
        rows = pool.rows(2000, N_POWER, seed=4)
        observed = float((pool.p_of({name: claim}, rows)[0] <= ALPHA).mean())
        assert 0.3 < observed < 0.9, (name, observed)
        predicted = [_power(claim, pool.drawn(name, draw)) for draw in rows[:100]]
        assert abs(np.median(predicted) - observed) < 0.1, (name, observed, predicted)
        found = judge(
            Family("f", (claim,)), {name: claim}, {name: pool.drawn(name, rows[0])}, {}, resamples=300
        )
        assert found[0].power == predicted[0]


def _short_of_the_truth(pool: Pool, name: str, at: str, away: float) -> Claim:
    """A claim that holds, with the truth as what is expected."""
    truth, own = pool.truth(name), pool.measured[name]
    step = away * np.std(scores(pool.on_bound(name), own)) / np.sqrt(N_POWER)
    if pool.claims[name].quantity == "recovery":
        step /= abs(np.mean(own.total))
    limits = {"at_least": None, "at_most": None, at: float(truth + (-step if at == "at_least" else step))}
    return replace(pool.claims[name], **limits, expected=truth)


def _power(claim: Claim, drawn: Measured) -> float:
    """What a verdict on these prompts predicts, without its intervals."""
    assert claim.expected is not None
    shift = claim.sign * (claim.expected - claim.bound)
    if claim.quantity == "recovery":
        shift *= np.mean(drawn.total) * (1 if claim.direction == "rl_to_in" else -1)
    away = unseen(claim, drawn)[None]
    return float(power(scores(claim, drawn)[None], np.array([shift]), ALPHA, "none", away, resamples=300)[0])
