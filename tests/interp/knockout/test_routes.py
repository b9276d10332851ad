"""Routes of a pair against one full pass per cut, the pair that is one model twice, and closed forms of the table."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks import FrankenlensError
from interp.decision import null_changes
from interp.knockout import (
    PAPER_ROUTES,
    ROUTES,
    Knockout,
    knockout_hooks,
    plot_flow,
    plot_routes,
    route_table,
    routes,
    up_to_the_answer,
    windows,
)
from interp.knockout.random_edges import control_kinds, random_edges
from interp.metrics import AnswerLogProbability
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.questions.tasks import sample
from interp.statistics import adjust, difference_interval, mean_test


@pytest.fixture(scope="module")
def prompts(pair):
    examples = [example for task in ("sum", "more") for example in sample(task, 5, 3, "test")]
    asked = [pair.builder.build(example) for example in examples]
    traces = [p.with_tokens(ids) for p, ids in zip(asked, greedy(pair.rl, asked, 48), strict=True)]
    return [up_to_the_answer(trace)[0] for trace in traces]


CUTS = {name: windows(ROUTES[name], 9, 4) for name in ("image -> reasoning", "question -> last")}


@pytest.fixture(scope="module")
def found(pair, prompts) -> xr.Dataset:
    return routes(pair, prompts, CUTS, seed=5, batch_size=4, progress=False)


def test_effects_are_full_passes_of_each_model(pair, prompts, found) -> None:
    assert found["value"].dims == ("model", "route", "window", "example")
    assert found["window"].to_numpy().tolist() == ["0-3", "1-4", "2-5", "3-6", "4-7", "5-8"]
    moved = []
    for model, vlm in (("in", pair.in_), ("rl", pair.rl)):
        for row in (0, 7):
            batch = collate([prompts[row]])
            for route, group in CUTS.items():
                cut = group[1]
                with torch.no_grad():
                    logits = vlm.run_with_hooks(batch.inputs, knockout_hooks(vlm, cut, batch)).logits
                    clean = vlm(batch.inputs).logits
                (answer,) = prompts[row].positions("answer").tolist()
                token = prompts[row].ids[answer]
                expected, before = (
                    float(one[0, answer - 1].log_softmax(-1)[token]) for one in (logits, clean)
                )
                got = found.sel(model=model, route=route, window="1-4").isel(example=row)
                assert float(got["value"]) == pytest.approx(expected, abs=1e-3)
                assert float(got["clean"]) == pytest.approx(before, abs=1e-3)
                moved.append(abs(expected - before))
    assert max(moved) > 0.1


def test_the_control_is_as_many_edges_drawn_once_for_all_windows(pair, prompts, found) -> None:
    assert found["control_kind"].to_numpy().tolist() == ["edges", "keys"]
    for number, (route, group) in enumerate(CUTS.items()):
        row = 3
        batch = collate([prompts[row]])
        source = batch.mask(str(group[0].source))
        edges = torch.zeros(len(prompts[row]), len(prompts[row]), dtype=torch.bool)
        for query in range(len(edges)):
            last = len(prompts[row]) - 2  # the answer's first token is the last
            target = batch.mask("reasoning")[0, query] if number == 0 else query == last
            edges[query, : query + 1] = source[0, : query + 1] & target
        kind = str(found["control_kind"][number].item())
        rng = np.random.default_rng((5, row, number))
        drawn = random_edges(edges, batch.mask("all")[0], kind, rng)
        assert int(drawn.sum()) == int(edges.sum()) == int(found["n_edges"].sel(route=route)[row])

        def hide(scores, hook, drawn=drawn):
            return scores.masked_fill(drawn, -torch.inf)

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(2, 6)]
        with torch.no_grad():
            logits = pair.rl.run_with_hooks(batch.inputs, hooks).logits
        expected = float(AnswerLogProbability()(logits, batch)[0])
        got = found["control"].sel(model="rl", route=route, window="2-5")[row]
        assert float(got) == pytest.approx(expected, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 14), st.integers(0, 3), st.integers(0, 10**6))
def test_random_edges_are_others_and_as_many(n: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    real = torch.arange(n + padding) < n
    cut = torch.from_numpy(rng.random((n + padding, n + padding)) < 0.15).tril() & real[:, None] & real
    others = torch.ones_like(cut).tril(-1) & ~cut & real[:, None] & real
    if int(others.sum()) >= int(cut.sum()):
        anywhere = random_edges(cut, real, "edges", np.random.default_rng(seed))
        assert not (anywhere & ~others).any() and int(anywhere.sum()) == int(cut.sum())
    if bool((others.sum(1) >= cut.sum(1)).all()):
        keys = random_edges(cut, real, "keys", np.random.default_rng(seed))
        assert not (keys & ~others).any() and torch.equal(keys.sum(1), cut.sum(1))


def test_kinds_of_control(prompts) -> None:
    everything = Knockout("all", "all")
    cuts = [ROUTES["image -> last"], ROUTES["image -> question"], everything]
    assert control_kinds(prompts, cuts) == ["keys", "edges", "none"]


def test_one_model_twice_has_no_difference(pair, prompts) -> None:
    same = Pair(pair.in_, pair.in_)
    found = routes(same, prompts, {"i": windows(ROUTES["image -> reasoning"], 9, 9)}, progress=False)
    table = route_table(found)
    assert (table["difference"] == 0).all() and (table["before"] < 0).all()
    assert table["p"].isna().all()  # where nothing varies there is no test


def test_models_that_learnt_nothing_leave_the_pair_as_it_was(pair, prompts) -> None:
    before = pair.provenance()
    cuts = {"q": windows(ROUTES["question -> last"], 9, 9)}
    found = routes(pair, prompts, cuts, nulls=null_changes(pair, 1), progress=False)
    assert pair.provenance() == before
    assert found["model"].to_numpy().tolist() == ["in", "rl", "bf16", "random"]
    plain = routes(pair, prompts, cuts, progress=False)
    assert plain["value"].equals(found["value"].sel(model=["in", "rl"]))
    rounded = route_table(found, models=("rl", "bf16"))
    assert 0 < rounded["difference"].abs().max() < 0.1


def test_a_prompt_without_a_route_is_left_out_with_the_reason(pair, prompts) -> None:
    short = prompts[0].truncated(prompts[0].n_prompt_tokens + 3)
    cuts = {"i": windows(ROUTES["image -> last"], 9, 9)}
    found = routes(pair, [*prompts, short], cuts, progress=False)
    why = found["why"].to_numpy().tolist()
    assert why[:-1] == [""] * len(prompts) and "no tokens of before answer" in why[-1]
    assert found["value"][..., -1].isnull().all() and found["clean"][..., -1].isnull().all()
    table = route_table(found)
    assert set(table["n"]) == {len(prompts)} and set(table["left_out"]) == {1}
    with pytest.raises(FrankenlensError, match="no prompt has every route.*no tokens of before answer"):
        routes(pair, [short], cuts, progress=False)


def test_up_to_the_answer_says_why_there_is_none(pair) -> None:
    (example,) = sample("sum", 1, 0, "test")
    whole = pair.builder.build(example, "<think> count red 2 </think> answer 2 2")
    cut, why = up_to_the_answer(whole)
    assert why == "" and cut is not None
    assert cut.trace_ids == pair.builder.encode("<think> count red 2 </think> answer 2")
    for trace in ("<think> count red 2", "<think> count red 2 </think> answer"):
        none, why = up_to_the_answer(pair.builder.build(example, trace))
        assert none is None and "does not parse" in why


def test_routes_that_do_not_fit_are_refused(pair, prompts) -> None:
    image = windows(ROUTES["image -> last"], 9, 3)
    wrong = [
        ({}, "at least one prompt and one route"),
        ({"a": image, "b": windows(ROUTES["question -> last"], 9, 2)}, "'b' is cut in other windows"),
        ({"a": [image[0], replace(image[1], mass="lost")]}, "differ in their layers alone"),
        ({"a": [Knockout("image", "question", (7, 9))]}, "layers 0-8"),
    ]
    for cuts, why in wrong:
        with pytest.raises(FrankenlensError, match=why):
            routes(pair, prompts, cuts, progress=False)
    assert set(PAPER_ROUTES) <= set(ROUTES)


def _planted() -> xr.Dataset:
    rng = np.random.default_rng(0)
    value = rng.normal(-1.0, 0.3, (3, 2, 4, 48))
    value[1, 1, 2] -= 1.5  # RL needs the second route in the third window more
    control = rng.normal(-0.1, 0.05, value.shape)
    clean = rng.normal(-0.5, 0.1, (3, 48))
    value += clean[:, None, None]
    control += clean[:, None, None]
    value[:, :, :, 4] = control[:, :, :, 4] = clean[:, 4] = np.nan
    dims = ("model", "route", "window", "example")
    return xr.Dataset(
        {"value": (dims, value), "control": (dims, control), "clean": (("model", "example"), clean)},
        coords={
            "model": ["in", "rl", "random"],
            "route": ["image -> question", "question -> last"],
            "control_kind": ("route", ["edges", "keys"]),
            "window": ["0-1", "1-2", "2-3", "3-4"],
            "first": ("window", range(4)),
            "last": ("window", range(1, 5)),
        },
        attrs={"units": "nats"},
    )


def test_table_of_planted_differences() -> None:
    found = _planted()
    table = route_table(found)
    effect = (found["value"] - found["clean"]).to_numpy()
    before, after = (effect[m].reshape(8, 48) for m in (0, 1))
    assert table["route"].tolist() == ["image -> question"] * 4 + ["question -> last"] * 4
    assert table["window"].tolist() == ["0-1", "1-2", "2-3", "3-4"] * 2
    assert table["control_kind"].tolist() == ["edges"] * 4 + ["keys"] * 4
    np.testing.assert_allclose(table["before"], np.nanmean(before, -1))
    np.testing.assert_allclose(table["difference"], np.nanmean(after - before, -1))
    np.testing.assert_allclose(table["after_clean"], np.nanmean(found["clean"][1]))
    interval = difference_interval(after, before)
    np.testing.assert_allclose(table["difference_low"], interval.low)
    assert table["p"].tolist() == [mean_test(a - b) for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(table["p_corrected"], adjust(table["p"].to_numpy()))
    assert (table["p_corrected"] < 0.05).tolist() == [False] * 6 + [True, False]
    assert set(table["n"]) == {47} and set(table["left_out"]) == {1}
    assert abs(table["control_difference"]).max() < 0.05
    relative = route_table(found, relative=True)
    np.testing.assert_allclose(relative["before"], 100 * np.nanmean(np.exp(before) - 1, -1))
    with pytest.raises(FrankenlensError, match="'base' is none of in, rl, random"):
        route_table(found, models=("in", "base"))


def test_figures_show_every_route_and_mark_the_difference() -> None:
    table = route_table(_planted())
    curves, flow = plot_routes(table), plot_flow(table)
    titles = [axes.get_title(loc="left") for axes in curves.axes]
    assert titles == ["image → question", "question → last"]
    stars = [line for axes in curves.axes for line in axes.lines if line.get_marker() == "*"]
    assert [len(np.ravel(line.get_xdata())) for line in stars] == [0, 1]
    arrows = [len(axes.patches) for axes in flow.axes]
    assert arrows == [8, 8, 1]
