"""The table of what freezing costs, against closed forms, SciPy and statsmodels."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from hooks import FrankenlensError
from interp.freezing.losses import Retrained, losses, plot_losses

N = 200
GROUPS = {"reasoning": list(range(100)), "perception": list(range(100, N))}


def right(*ones: range) -> np.ndarray:
    out = np.zeros(N)
    for some in ones:
        out[list(some)] = 1
    return out


IN = right(range(20, 50), range(100, 190))
UNFROZEN = right(range(70), range(100, 190))
EARLY = right(range(10, 50), range(65, 70), range(100, 190))  # loses 25 of RL's gain of 40
RANDOM = right(range(72), range(102, 190))


def run(arm: str, kind: str, values: np.ndarray, seed: int = 0) -> Retrained:
    return Retrained(arm, kind, seed, "", 0, values, 0.0)


def runs(seed: int = 0) -> list[Retrained]:
    return [
        run("unfrozen", "unfrozen", UNFROZEN, seed),
        run("Early", "region", EARLY, seed),
        run("random 1", "random", RANDOM, seed),
    ]


def test_changes_shares_and_tests_are_those_of_the_counts() -> None:
    table = losses(runs(), IN, GROUPS)
    rows = table.set_index(["arm", "group"])
    early = rows.loc[("Early", "reasoning")]
    assert (early["accuracy"], early["n"], early["gained"], early["lost"]) == (0.45, 100, 0, 25)
    assert early["change"] == pytest.approx(-0.25) and early["change_high"] < -0.1
    assert early["share"] == pytest.approx(25 / 40)
    assert 0.4 < early["share_low"] < 25 / 40 < early["share_high"] < 0.85
    assert early["p"] == pytest.approx(stats.binomtest(0, 25).pvalue)
    wilson = stats.binomtest(45, 100).proportion_ci(method="wilson")
    assert (early["low"], early["high"]) == pytest.approx((wilson.low, wilson.high))
    tested = table.query("kind not in ('in', 'unfrozen')")
    assert tested["p_holm"].tolist() == pytest.approx(multipletests(tested["p"], method="holm")[1])
    assert len(tested) == 4 and table.query("kind in ('in', 'unfrozen')")["p_holm"].isna().all()
    assert rows.loc[("IN", "reasoning"), "change"] == pytest.approx(-0.4)


def test_no_share_is_given_where_rl_gained_nothing() -> None:
    table = losses(runs(), IN, GROUPS).query("group == 'perception'")
    assert table["share"].isna().all()
    assert table.query("arm == 'random 1'")["change"].item() == pytest.approx(-0.02)


def test_questions_that_one_run_lacks_are_left_out_of_its_comparison() -> None:
    gap = EARLY.copy()
    gap[:10] = np.nan
    found = losses([*runs(), run("Mid", "region", gap)], IN, GROUPS).query(
        "arm == 'Mid' and group == 'reasoning'"
    )
    assert found["n"].item() == 90
    assert found["change"].item() == pytest.approx(-15 / 90)


def test_seeds_are_compared_with_their_own_unfrozen_run_and_pooled() -> None:
    other = [
        run("unfrozen", "unfrozen", IN, 1),
        run("Early", "region", EARLY, 1),
        run("random 1", "random", IN, 1),
    ]
    table = losses([*runs(), *other], IN, GROUPS).query("group == 'reasoning'").set_index(["arm", "rl_seed"])
    assert table.loc[("Early", 0), "change"] == pytest.approx(-0.25)
    assert table.loc[("Early", 1), "change"] == pytest.approx(0.15)
    assert table.loc[("Early", "mean"), "change"] == pytest.approx(-0.05)
    assert table.loc[("Early", "mean"), "share"] == pytest.approx(0.05 / 0.2)
    with pytest.raises(FrankenlensError, match="seed 1 has no run without freezing"):
        losses([*runs(), other[1]], IN, GROUPS)


def test_the_figure_has_every_arm_at_its_accuracy() -> None:
    figure = plot_losses(losses([*runs(), run("rerun", "rerun", UNFROZEN)], IN, GROUPS))
    figure.draw_without_rendering()
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["rerun", "random 1", "Early"]
    markers = [np.asarray(line.get_xydata()) for line in left.lines if line.get_marker() in ("o", "D", "s")]
    points = {float(x): float(y) for some in markers for x, y in some}
    assert points == pytest.approx({70.0: 0, 72.0: 1, 45.0: 2})


def test_questions_of_one_cluster_count_as_one() -> None:
    """Every question four times: the interval and the p of those asked once, and not those of four times as many."""
    fourfold = [
        Retrained(one.arm, one.kind, one.seed, one.frozen, one.n_frozen, np.repeat(one.right, 4), 0.0)
        for one in runs()
    ]
    of = [str(i) for i in range(N) for _ in range(4)]
    groups = {"reasoning": list(range(400))}
    tables = (
        losses(runs(), IN, {"reasoning": GROUPS["reasoning"]}),
        losses(fourfold, np.repeat(IN, 4), groups),
        losses(fourfold, np.repeat(IN, 4), groups, of),
    )
    once, alone, together = (table.query("arm == 'Early'").iloc[0] for table in tables)
    widths = [one["change_high"] - one["change_low"] for one in (once, alone, together)]
    assert widths[2] == pytest.approx(widths[0], rel=0.1) and widths[1] < 0.6 * widths[0]
    share = [one["share_high"] - one["share_low"] for one in (once, alone, together)]
    assert share[2] == pytest.approx(share[0], rel=1e-6) and share[1] < 0.6 * share[0]
    assert alone["p"] < together["p"] < 1e-3
