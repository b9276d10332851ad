"""Claims on data that hang together, say nothing of how they vary, or are looked at again and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from hooks import FrankenlensError
from interp.hypotheses import Claim, Family, Ledger, Looks, Measured, judge, one_sided, population_of
from interp.hypotheses.claim import ClaimError
from interp.hypotheses.one_sided import _three_valued, examples_needed, power
from interp.hypotheses.verdict import Verdict
from interp.questions.examples import Example, cluster_of, once_each
from interp.questions.tasks import sample
from interp.statistics import levels


def measured(effect: np.ndarray, total: float = 1.0) -> Measured:
    return Measured(effect, np.zeros(len(effect)), np.full(len(effect), total), "nats")


def verdict(claim: Claim, effect: np.ndarray, **settings) -> Verdict:
    return judge(
        Family("f", (claim,)),
        {claim.name: claim},
        {claim.name: measured(effect)},
        {},
        resamples=5,
        **settings,
    )[0]


ACCURACY: dict[str, Any] = {"quantity": "accuracy", "body": "weights"}


def test_the_same_questions_four_times_are_no_more_than_once() -> None:
    effect = np.random.default_rng(0).normal(0.15, 0.3, 24)
    claim = Claim("c", "blocks.3", at_least=0.0)
    again, of = np.tile(effect, 4), [str(i) for i in range(24)] * 4
    assert verdict(claim, again).verdict == "supported"  # taken for 96 questions
    found = verdict(claim, again, clusters=of)
    assert (found.verdict, found.n, found.units) == ("undecided", 96, 24)
    assert "24 clusters" in found.reason
    more = np.random.default_rng(1).normal(0.02, 0.3, 40)
    once = verdict(claim, more)
    four = verdict(claim, np.tile(more, 4), clusters=[str(i) for i in range(40)] * 4)
    assert four.p == pytest.approx(once.p, rel=1e-9)
    assert (float(four.interval.low), float(four.interval.high)) == pytest.approx(
        (float(once.interval.low), float(once.interval.high)), rel=1e-6
    )


def test_a_question_under_several_ids_is_asked_once() -> None:
    given = sample("sum", 5, seed=0, split="map")
    again = [replace(example, id=f"{example.id} again") for example in given]
    kept, others = once_each([*given, *again])
    assert ([e.id for e in kept], others) == ([e.id for e in given], 5)
    assert [cluster_of(e) for e in again] == [cluster_of(e) for e in given]
    shared = Example("x", given[0].images, "another question?", "1")
    assert cluster_of(shared) == cluster_of(given[0])
    assert cluster_of(replace(shared, cluster="scene 1")) != cluster_of(shared)
    texts = [
        Example("a", (), "1 + 1?", "2"),
        Example("b", (), "1 + 1?", "2"),
        Example("c", (), "1 + 2?", "3"),
    ]
    assert len({cluster_of(e) for e in texts}) == 2
    assert population_of([*given, shared, *texts]).endswith("in this mix; 7 clusters")


@pytest.mark.parametrize(
    ("effect", "claim", "expected"),
    [
        (np.zeros(500), {"at_most": 0.05}, 0.95**500),
        (np.zeros(60), {"at_most": 0.05}, 0.95**60),
        (np.zeros(40), {"at_most": 0.05}, 0.95**40),
        (np.ones(60), {"at_least": 0.05}, (1 - 0.95 / 2) ** 60),
        (np.full(60, -1.0), {"at_most": -0.05}, (1 - 0.95 / 2) ** 60),
    ],
)
def test_perfect_results_are_decided_by_the_exact_chance(effect, claim, expected: float) -> None:
    found = verdict(Claim("c", "blocks.3", **ACCURACY, **claim), effect)
    assert found.p == pytest.approx(expected, rel=1e-9)
    assert found.verdict == ("supported" if expected <= 0.05 else "undecided")
    assert np.isfinite([found.interval.low, found.interval.high]).all()


def test_none_of_500_says_no_less_than_one() -> None:
    claim = Claim("c", "blocks.3", **ACCURACY, at_most=0.05)
    none, one = np.zeros(500), np.eye(500)[0]
    assert verdict(claim, none).verdict == verdict(claim, one).verdict == "supported"
    assert verdict(claim, none).p < verdict(claim, one).p
    constant = verdict(Claim("c", "blocks.3", at_least=0.2), np.full(60, 0.5))
    assert constant.verdict == "supported"
    assert constant.p == pytest.approx((1 - 0.3 / (0.3 + 1.2)) ** 60)


def test_the_exact_test_of_two_values_is_scipys() -> None:
    scores = np.r_[np.full(3, -0.95), np.full(57, 0.05)]
    above, below = one_sided(scores)
    assert above >= stats.binomtest(57, 60, 0.95, alternative="greater").pvalue - 1e-12
    assert below >= stats.binomtest(57, 60, 0.95, alternative="less").pvalue - 1e-12
    rng = np.random.default_rng(0)
    for share in (0.05, 0.1, 0.3):
        drawn = np.where(rng.random((20_000, 40)) < share, 1.0, 0.0) - share
        for side in one_sided(drawn, far=(share, 1 - share)):
            assert np.isfinite(side).all()
            assert (side <= 0.05).mean() <= 0.055
    for hits in (
        1,
        4,
        9,
        20,
        36,
    ):  # of 40; the exact test is never undercut
        scores = np.repeat([0.9, -0.1], [hits, 40 - hits])
        exact = [stats.binomtest(hits, 40, 0.1, alternative=way).pvalue for way in ("greater", "less")]
        for side, least in zip(one_sided(scores), exact, strict=True):
            assert float(side) >= least - 1e-12
    few = np.repeat([0.95, -0.05], [5, 55])
    assert float(one_sided(few)[0]) == pytest.approx(
        stats.binomtest(5, 60, 0.05, alternative="greater").pvalue
    )


def _sides(scores: np.ndarray) -> tuple[float, float]:
    """Tango's p of one row."""
    above, below = _three_valued(scores[None], np.ones((1, len(scores)), bool), np.array([len(scores)]))
    return float(above[0]), float(below[0])


def _all_tables(n: int) -> np.ndarray:
    """Changes gained, lost and none, of n paired answers."""
    return np.array([(g, k, n - g - k) for g in range(n + 1) for k in range(n + 1 - g)])


@pytest.mark.parametrize("n", [36, 60, 100])
def test_changes_of_right_answers_on_their_bound_err_as_they_say(n: int) -> None:
    """By all tables: the chance of a wrong verdict, whatever share of the answers changes."""
    tables = _all_tables(n)
    rows = np.array([np.repeat([1.0, -1.0, 0.0], table) for table in tables])
    largest = 0.0
    for bound in (0.0, 0.02, 0.05, 0.1, 0.3):
        sides = one_sided(rows - bound, far=(1 + bound, 1 - bound))
        assert np.isfinite(sides).all()
        for changed in (0.02, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9):
            if changed >= bound:
                odds = [(changed + bound) / 2, (changed - bound) / 2, 1 - changed]
                chance = stats.multinomial.pmf(tables, n, odds)
                largest = max(largest, *(float(chance @ (p <= 0.05)) for p in sides))
    assert 0.04 <= largest <= 0.055  # 7.4 % by Student's and Hall's t


@pytest.mark.parametrize(
    ("gained", "lost", "bound"), [(9, 4, 0.05), (3, 11, 0.1), (6, 6, -0.2), (2, 0, 0.05)]
)
def test_tangos_test_has_the_variance_that_is_most_likely_on_the_bound(
    gained: int, lost: int, bound: float
) -> None:
    n = 80

    def unlikely(of_lost: float) -> float:
        logs = np.log([of_lost + bound, of_lost, 1 - 2 * of_lost - bound])
        return -float(gained * logs[0] + lost * logs[1] + (n - gained - lost) * logs[2])

    ends = (max(0.0, -bound) + 1e-12, (1 - bound) / 2 - 1e-12)
    best: Any = optimize.minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12})
    z = (gained - lost - n * bound) / np.sqrt(n * (2 * best.x + bound - bound**2))
    scores = np.repeat([1.0, -1.0, 0.0], [gained, lost, n - gained - lost]) - bound
    above, below = _sides(scores)
    assert (above, below) == pytest.approx((stats.norm.sf(z), stats.norm.cdf(z)), abs=1e-5)
    assert _sides(-scores) == pytest.approx((below, above), abs=1e-9)
    uneven = np.r_[scores[:-1], 0.3]
    assert np.isnan(_sides(uneven)).all()


def test_values_that_are_infinite_or_missing_have_their_own_reasons() -> None:
    claim = Claim("c", "blocks.3", at_least=0.1)
    effect = np.random.default_rng(0).normal(0.3, 0.1, 40)
    effect[3] = np.inf
    found = verdict(claim, effect)
    assert found.verdict == "undecided" and "1 of 40 examples have an infinite value" in found.reason
    assert verdict(claim, np.full(40, np.nan)).reason == "no example has a value"
    assert "20 examples have a value" in verdict(claim, effect[10:30]).reason


@pytest.mark.parametrize("control", [np.full(40, np.nan), np.r_[np.inf, -np.inf, np.zeros(38)]])
def test_without_a_control_nothing_is_supported(control: np.ndarray) -> None:
    effect = np.random.default_rng(0).normal(0.5, 0.1, 40)
    much, little = Claim("c", "blocks.3", at_least=0.1), Claim("c", "blocks.3", at_most=0.9)
    for claim, said in ((much, "undecided"), (little, "supported")):
        own = Measured(effect, control, np.ones(40), "nats")
        (found,) = judge(Family("f", (claim,)), {"c": claim}, {"c": own}, {}, resamples=2)
        assert (found.verdict, found.p < 1e-6) == (said, True)
        assert ("no value to compare it with" in found.reason) == (said == "undecided")


# --- looks -----------------------------------------------------------------------------------------------------------


def asked(n: int, first: int = 0) -> list[Example]:
    return [Example(str(i), (), f"{i} + 1?", str(i + 1)) for i in range(first, first + n)]


def looked(ledger: Ledger, family: Family, examples: list[Example], effect: np.ndarray) -> Verdict:
    claims = {claim.name: claim for claim in family.claims}
    looks = ledger.looks("pair", family, claims, examples)
    (found,) = judge(family, claims, {"c": measured(effect)}, {"c": "held out"}, looks=looks, resamples=2)
    ledger.write("pair", family, claims, examples, {"c": found.verdict})
    return found


CLAIM = Claim("c", "blocks.3", at_least=0.0)


def test_a_later_look_is_exploratory_and_the_same_prompts_are_the_same_look(tmp_path: Path) -> None:
    family, path = Family("f", (CLAIM,)), tmp_path / "looks.jsonl"
    rng = np.random.default_rng(0)
    weak, strong = rng.normal(0.0, 1, 40), rng.normal(1.0, 1, 40)
    assert looked(Ledger(path), family, asked(40), weak).verdict == "undecided"
    again = looked(Ledger(path), family, asked(40), weak)
    assert (again.look, again.origin, len(path.read_text().splitlines())) == (1, "held out", 1)
    second = looked(Ledger(path), family, asked(40, 100), strong)
    assert (second.look, second.verdict, second.origin) == (2, "undecided", "exploratory")
    assert second.p < 1e-4 and "look 2" in second.reason and "look      2" in second.text
    moved = Family("f", (replace(CLAIM, at_least=-0.1, name="c"),))  # another bound is another look
    assert looked(Ledger(path), moved, asked(40), strong).verdict == "undecided"
    elsewhere = Family("f", (replace(CLAIM, component="blocks.4"),))
    assert looked(Ledger(path), elsewhere, asked(40), strong).look == 1
    assert looked(Ledger(path), elsewhere, asked(40, 100), strong).verdict == "supported"  # as the first was


def test_prompts_that_grow_keep_those_they_had(tmp_path: Path) -> None:
    family, ledger = Family("f", (CLAIM,), n_max=100), Ledger(tmp_path / "looks.jsonl")
    values = np.random.default_rng(1).normal(0.35, 1, 100)
    first = looked(ledger, family, asked(50), values[:50])
    plain = judge(family, {"c": CLAIM}, {"c": measured(values[:50])}, {}, resamples=2)[0]
    assert plain.p < first.p and first.look == 1
    with pytest.raises(FrankenlensError, match="50 of them are not among these 60"):
        looked(ledger, family, asked(60, 50), values[:60])
    with pytest.raises(FrankenlensError, match="n_max 100"):
        looked(ledger, family, asked(101), np.zeros(101))
    last = looked(ledger, family, asked(100), values)
    assert (last.look, last.verdict) == (2, "supported")
    with pytest.raises(ClaimError, match="n_max"):
        Family("f", (CLAIM,), n_max=0)
    (tmp_path / "broken").write_text("{")
    with pytest.raises(FrankenlensError, match="cannot be read"):
        Ledger(tmp_path / "broken")


def test_bounds_that_are_registered_together_are_one_look(tmp_path: Path) -> None:
    low, high = replace(CLAIM, name="low", at_least=0.1), replace(CLAIM, name="high", at_least=0.9)
    family = Family("f", (low, high))
    claims = {claim.name: claim for claim in family.claims}
    said = {"low": "supported", "high": "refuted"}
    ledger = Ledger(tmp_path / "looks.jsonl")
    for _ in range(2):  # the same look again
        assert ledger.looks("pair", family, claims, asked(40)) == {"low": Looks(), "high": Looks()}
        ledger.write("pair", family, claims, asked(40), said)
    later = Ledger(ledger.path).looks("pair", family, claims, asked(40, 100))
    assert later == {
        "low": Looks(2, "supported", implied=frozenset({"supported"})),
        "high": Looks(2, "refuted", implied=frozenset({"refuted"})),
    }
    alone = Family(
        "f", (replace(CLAIM, name="low", at_least=0.2),)
    )  # another bound, on prompts that were seen
    moved = ledger.looks("pair", alone, {"low": alone.claims[0]}, asked(40))
    assert moved["low"].number == 2


def noted(ledger: Ledger, examples: list[Example], said: str, *claims: Claim, **family) -> None:
    """A look that came to this verdict on every claim."""
    by_name = {claim.name: claim for claim in claims}
    ledger.write("pair", Family("f", claims, **family), by_name, examples, dict.fromkeys(by_name, said))


def at_next(ledger: Ledger, claim: Claim, first: int = 100, n: int = 40, **family) -> Looks:
    return ledger.looks("pair", Family("f", (claim,), **family), {"c": claim}, asked(n, first))["c"]


def test_an_easy_bound_first_does_not_buy_a_harder_one(tmp_path: Path) -> None:
    """A claim on its bound, asked eight times on fresh prompts after an easy one was supported: alpha at most."""
    easy, hard = replace(CLAIM, at_least=-1.0), replace(CLAIM, at_least=0.3)
    values = np.random.default_rng(3).normal(0.3, 1, (25, 9, 40))
    ever = {"by the ledger": 0, "by the numbers": 0}
    for pair in range(25):
        ledger, said = Ledger(tmp_path / f"{pair}.jsonl"), []
        assert looked(ledger, Family("f", (easy,)), asked(40), values[pair, 0]).verdict == "supported"
        for look in range(1, 9):
            found = looked(ledger, Family("f", (hard,)), asked(40, 100 * look), values[pair, look])
            said.append((found.verdict == "supported", found.p <= 0.05))
        for name, one in zip(ever, zip(*said, strict=True), strict=True):
            ever[name] += any(one)
    assert ever["by the numbers"] > 25 * 0.2  # 1 - 0.95^8 = 34 %
    assert ever["by the ledger"] <= 25 * 0.05


@pytest.mark.parametrize("relation", ["at_least", "at_most"])
@pytest.mark.parametrize("said", ["supported", "refuted", "undecided"])
def test_a_later_verdict_stands_where_the_first_implies_it(tmp_path: Path, relation: str, said: str) -> None:
    """By brute force over true values: a statement implies another where all values that fit it fit the other."""
    values = np.linspace(-2, 2, 4001) + 1e-4

    def fits(claim: Claim, verdict: str) -> np.ndarray:
        above = values > claim.bound
        return above if (verdict == "supported") == (claim.relation == ">=") else ~above

    sides = {"at_least": None, "at_most": None}
    first = replace(CLAIM, **{**sides, relation: 0.2})
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(40), said, first)
    for side in sides:
        for bound in (-0.5, 0.1, 0.2, 0.3, 1.0):
            later = replace(CLAIM, **{**sides, side: bound})
            expected = {
                verdict
                for verdict in ("supported", "refuted")
                if said != "undecided" and not (fits(first, said) & ~fits(later, verdict)).any()
            }
            assert at_next(ledger, later).implied == expected, (side, bound)


def test_the_first_on_record_is_at_the_nearest_bound(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "looks.jsonl")
    bounds = dict(zip((0.9, -0.4, 0.1, 0.5), ("refuted", "supported", "undecided", "refuted"), strict=True))
    claims = [replace(CLAIM, name=str(bound), at_least=bound) for bound in bounds]
    by_name = {claim.name: claim for claim in claims}
    said = {str(bound): verdict for bound, verdict in bounds.items()}
    ledger.write("pair", Family("f", tuple(claims)), by_name, asked(40), said)
    for bound in (-3.0, -0.2, 0.0, 0.29, 0.31, 0.69, 2.0):
        nearest = min(bounds, key=lambda one: (one - bound) ** 2)
        assert at_next(ledger, replace(CLAIM, at_least=bound)).first == bounds[nearest], bound


def test_a_lax_level_first_does_not_buy_a_strict_one(tmp_path: Path) -> None:
    """What is registered is the level, the correction, the metric and how far prompts grow, too."""
    lax = replace(CLAIM, alpha=0.5)
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(40), "supported", lax)
    for n, expected in ((0, 2), (100, 2)):  # on the same prompts it is another look as well
        found = at_next(ledger, CLAIM, n)
        assert (found.number, found.implied) == (expected, frozenset())
    assert at_next(ledger, lax, 0).number == 1
    assert at_next(ledger, replace(CLAIM, alpha=0.6)).implied == {"supported"}
    for first, then, stands in (("none", "holm", False), ("holm", "bh", True), ("bh", "none", True)):
        ledger = Ledger(tmp_path / f"{first}.jsonl")
        noted(ledger, asked(40), "supported", CLAIM, correction=first)
        found = at_next(ledger, CLAIM, 0, correction=then)
        assert (found.number, bool(found.implied)) == (2, stands)
        assert at_next(ledger, CLAIM, 0, correction=first, decision="soft").number == 2
    beside = replace(CLAIM, name="other", component="blocks.5")
    both = {"c": CLAIM, "other": beside}
    found = ledger.looks("pair", Family("f", (CLAIM, beside), "bh"), both, asked(40, 100))
    assert found["c"].implied == frozenset()  # alone it passed 5 %, among two it would have to pass 2.5 %
    ledger = Ledger(tmp_path / "two.jsonl")
    wide = [replace(one, alpha=0.1) for one in (CLAIM, beside)]
    noted(ledger, asked(40), "supported", *wide)
    assert at_next(ledger, CLAIM).implied == frozenset()  # 5 % to be the strongest, but 10 % to be the second


def test_looks_at_the_same_prompts_under_other_claims_are_all_kept(tmp_path: Path) -> None:
    other = replace(CLAIM, name="other", component="blocks.5")
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(40), "undecided", CLAIM)
    noted(ledger, asked(40), "undecided", CLAIM, other)
    noted(ledger, asked(40), "undecided", CLAIM, other)  # the same again
    assert len(ledger.path.read_text().splitlines()) == 3
    assert at_next(Ledger(ledger.path), CLAIM).number == 3


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ({"component": ("blocks.3", "blocks.4")}, {"component": ("blocks.4", "blocks.3", "blocks.4")}),
        ({"component": "blocks.3-4.attn"}, {"component": ("blocks.4.attn", "blocks.3.attn")}),
        (
            {"component": "blocks.7", "more_than": "blocks.3", "at_least": 0.1},
            {"component": "blocks.3", "more_than": "blocks.7", "at_least": None, "at_most": -0.1},
        ),
        (
            {"component": "blocks.3", "more_than": ("blocks.7", "blocks.5"), "at_least": 0.0},
            {
                "component": ("blocks.5", "blocks.7"),
                "more_than": "blocks.3",
                "at_least": None,
                "at_most": 0.0,
            },
        ),
    ],
)
def test_the_same_question_written_otherwise_is_the_same_look(
    tmp_path: Path, first: dict, again: dict
) -> None:
    one, two = replace(CLAIM, **first), replace(CLAIM, **again)
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(40), "supported", one)
    assert at_next(ledger, two, 0) == Looks()
    assert at_next(ledger, two) == Looks(2, "supported", implied=frozenset({"supported"}))
    assert at_next(ledger, replace(one, component="blocks.9")).number == 1
    if one.more_than:  # the same sides the other way is another claim, which the first refutes
        turned = replace(one, component=one.more_than, more_than=one.component)
        assert at_next(ledger, turned).first == "refuted"


def test_how_far_prompts_grow_and_what_grows_with_them_is_fixed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(50), "undecided", CLAIM, n_max=100)
    for n_max in (200, None):
        with pytest.raises(FrankenlensError, match=r"another n_max than (200|none) before \(100\)"):
            at_next(ledger, CLAIM, 0, n=50, n_max=n_max)
    edited = replace(CLAIM, at_least=0.1)
    with pytest.raises(FrankenlensError, match="claim 'c' was looked at on these 50 prompts"):
        at_next(ledger, edited, 0, n=50, n_max=100)
    assert at_next(ledger, edited, 0, n=60, n_max=100).shares == (0.5, 0.6)
    assert at_next(ledger, CLAIM, 0, n=50, n_max=100) == Looks(shares=(0.5,))


def test_a_later_look_that_confirms_is_held_out_and_one_that_does_not_is_exploratory(tmp_path: Path) -> None:
    """As the README says it."""
    strong = np.random.default_rng(0).normal(1.0, 1, 40)
    ledger, family = Ledger(tmp_path / "looks.jsonl"), Family("f", (CLAIM,))
    looked(ledger, family, asked(40), strong)
    confirmed = looked(ledger, family, asked(40, 100), strong)
    assert (confirmed.verdict, confirmed.origin) == ("supported", "held out")
    assert "EXPLORATORY" not in confirmed.text
    turned = looked(ledger, family, asked(40, 200), -strong)
    assert (turned.verdict, turned.origin) == ("undecided", "exploratory")
    assert "EXPLORATORY: tested on prompts it was found on, or looked at again" in turned.text


def test_power_counts_that_looks_are_planned() -> None:
    """Normal scores: at a half of n_max, what a look spends by then; each number against the noncentral t or draws."""
    n, truth, share = 60, 0.35, 0.5
    claim = replace(CLAIM, at_least=0.1, expected=truth, quantity="effect")
    spent_by_then = float(
        2 * stats.norm.sf(stats.norm.isf(0.025) / np.sqrt(share))
    )  # O'Brien and Fleming's kind
    values = np.random.default_rng(5).normal(truth, 0.6, (4000, n))
    observed = (one_sided(values - 0.1)[0] <= spent_by_then).mean()
    once = (one_sided(values - 0.1)[0] <= 0.05).mean()

    def judged(effect: np.ndarray, looks: Looks) -> Verdict:
        given: dict[str, Any] = {"looks": {"c": looks}, "resamples": 300}
        own = Measured(effect, np.zeros(len(effect)), np.full(len(effect), 9.0), "nats")
        return judge(Family("f", (claim,)), {"c": claim}, {"c": own}, {}, **given)[0]

    found = [judged(row, Looks(shares=(share,))) for row in values[:15]]
    assert abs(np.median([one.power for one in found]) - observed) < 0.08
    assert once - observed > 0.2  # what looking at a half costs
    one = found[0]
    sd = float(np.std(values[0], ddof=1))

    def power_at(size: int, mean: float, level: float) -> float:
        return float(stats.nct.sf(stats.t.ppf(1 - level, size - 1), size - 1, mean / sd * np.sqrt(size)))

    assert power_at(n, one.detectable - 0.1, spent_by_then) == pytest.approx(0.8, abs=1e-3)
    few = judged(values[0, :40], Looks(shares=(0.25,)))  # of 160
    sd, needed = float(np.std(values[0, :40], ddof=1)), few.n_needed
    assert needed is not None and 40 < needed < 160
    enough = [
        power_at(size, truth - 0.1, float(levels((0.25, size / 160))[-1])) >= 0.8
        for size in (needed - 1, needed)
    ]
    assert enough == [False, True]


def test_what_is_beyond_the_plan_is_needed_at_the_last_look() -> None:
    values = np.random.default_rng(6).normal(0.12, 1, 40)
    claim = replace(CLAIM, expected=0.1, quantity="effect")
    own = {"c": measured(values)}
    given: dict[str, Any] = {"looks": {"c": Looks(shares=(0.8,))}, "resamples": 2}
    (found,) = judge(Family("f", (claim,)), {"c": claim}, own, {}, **given)
    level = float(levels((0.8, 1.0))[-1])
    assert level < 0.05
    assert found.n_needed == examples_needed(0.1, float(np.std(values, ddof=1)), level)


def test_power_of_rare_changes_counts_draws_without_any() -> None:
    """Two of 60 answers changed: a draw in seven holds none, and is decided by the exact chance."""
    d = 0.05 - np.r_[1.0, 1.0, np.zeros(58)]
    far = np.array([[0.95], [1.05]])
    shift = np.array([d.mean()])
    found, without = (
        power(d[None], shift, 0.05, "none", np.zeros(1), far=given, resamples=4000)[0]
        for given in (far, None)
    )
    assert (1 - 0.05) ** 60 <= 0.05  # none of 60: supported
    none_drawn = (58 / 60) ** 60
    assert found - without == pytest.approx(none_drawn, abs=0.02)


def test_looks_too_near_to_be_reckoned_are_refused_before_anything_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "looks.jsonl")
    noted(ledger, asked(50), "undecided", CLAIM, n_max=30_000)
    with pytest.raises(FrankenlensError, match="of n_max 30000 each look adds 3 at least"):
        at_next(ledger, CLAIM, 0, n=52, n_max=30_000)
    assert at_next(ledger, CLAIM, 0, n=53, n_max=30_000).number == 2


def test_a_pilot_too_small_for_a_test_says_how_many_a_test_takes() -> None:
    values = np.random.default_rng(0).normal(0.5, 1.0, 20)
    claim = replace(CLAIM, at_least=0.1)
    (small,) = judge(Family("f", (claim,)), {"c": claim}, {"c": measured(values)}, {}, resamples=2)
    assert small.verdict == "undecided" and np.isnan(small.p)
    assert small.n_needed is not None and small.n_needed >= 36


def test_ten_looks_err_as_one() -> None:
    """A claim on its bound: undeclared looks at new prompts, and prompts that grow to ten times as many."""
    rng, pairs = np.random.default_rng(2), 4000
    values = rng.normal(0, 1, (pairs, 360))
    shares = tuple(np.arange(1, 11) / 10)
    bounds = levels(shares, 0.05)
    grown = np.stack([one_sided(values[:, : 36 * k])[0] for k in range(1, 11)])
    assert (grown <= 0.05).any(0).mean() > 0.15  # until it works
    assert (grown <= bounds[:, None]).any(0).mean() <= 0.06
    fresh = np.stack([one_sided(values[:, 36 * k : 36 * k + 36])[0] for k in range(10)])
    assert (fresh <= 0.05).any(0).mean() > 0.3
    for case in range(60):  # by the ledger's rule, what the first look does not support stays unsupported
        said = judge(
            Family("f", (CLAIM,)), {"c": CLAIM}, {"c": measured(values[case, 36:72])}, {}, resamples=2,
            looks={"c": Looks(2, "undecided")},
        )[0]  # fmt: skip
        assert said.verdict == "undecided"
