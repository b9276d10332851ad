"""Transfer: variants against state dicts put together by hand and checkpoints that transformers loads; the table
against statsmodels."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoModelForImageTextToText

from experiments import embedded
from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.pair.pair import Pair, weights_sha256
from interp.questions.examples import Example
from interp.questions.tasks import grade, sample
from interp.regions import of_sizes, parse_partition, thirds
from interp.transfer.answers import answers
from interp.transfer.grafts import Graft, everything, grafted, save_grafted
from interp.transfer.outcomes import Outcomes
from interp.transfer.table import as_table_2, transfer_table
from interp.transfer.transfer import transfer
from interp.transfer.variants import (
    PAPER_ORDER,
    Variant,
    addressed,
    controls,
    doses,
    factors,
    orders,
    parts,
    rest_of,
)
from tests.families import EACH_KIND, redraw, tiny


@pytest.fixture(params=EACH_KIND)
def duo(request: pytest.FixtureRequest):
    given = tiny(request.param)
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    inputs = given.inputs()
    return HookedVLM(given.model, given.processor, inputs=inputs), HookedVLM(other, inputs=inputs)


def _expected(duo: Any, rest_from_donor: bool, letters: str) -> dict[str, torch.Tensor]:
    """A state dict put together by name: blocks by letter, the rest whole."""
    recipient, donor = (vlm.model.state_dict() for vlm in duo)
    paths = [block.path for block in duo[0].anatomy.text.blocks]
    chosen = {}
    for name in recipient:
        layer = next((i for i, path in enumerate(paths) if name.startswith(path + ".")), None)
        from_donor = rest_from_donor if layer is None else letters.split(":")[layer] == "R"
        chosen[name] = (donor if from_donor else recipient)[name].clone()
    return chosen


@pytest.mark.parametrize("rest", ["recipient", "early"])
def test_mixtures_hold_the_named_weights_and_no_others(duo, rest: str) -> None:
    recipient, donor = duo
    found = orders(of_sizes([1, 1, 1]), recipient, rest)
    assert tuple(variant.name for variant in found) == PAPER_ORDER
    for variant in found:
        expected = _expected(duo, rest == "early" and variant.name.startswith("R"), variant.name)
        with grafted(recipient, donor, variant.grafts):
            for name, weight in recipient.model.state_dict().items():
                assert torch.equal(weight, expected[name]), (variant.name, name)


def test_factors_take_their_own_weights_and_together_everything(duo) -> None:
    recipient, donor = duo
    found = {variant.name: variant for variant in factors(recipient)}
    rest = rest_of(recipient)
    assert list(found) == ["all blocks", "all but blocks", *rest]
    assert {"vision", "projector", "embed", "ln_final"} <= set(rest) <= set(everything(recipient))
    own, theirs = (dict(vlm.model.state_dict()) for vlm in duo)
    paths = {
        "embed": recipient.anatomy.embed,
        "ln_final": recipient.anatomy.final_norm,
        "unembed": recipient.anatomy.unembed,
    }
    tied = "unembed" not in rest
    for name in set(paths) & set(rest):
        with grafted(recipient, donor, found[name].grafts):
            for key, weight in recipient.model.state_dict().items():
                moved = key.startswith(paths[name] + ".") or (
                    tied and name == "embed" and key.startswith(paths["unembed"] + ".")
                )
                assert torch.equal(weight, theirs[key] if moved else own[key]), (name, key)
    with grafted(recipient, donor, found["all but blocks"].grafts):
        expected = _expected(duo, True, "I:I:I")
        assert all(torch.equal(w, expected[k]) for k, w in recipient.model.state_dict().items())


def test_parts_and_addresses(duo) -> None:
    recipient, donor = duo
    own, theirs = (dict(vlm.model.state_dict()) for vlm in duo)
    found = {variant.name: variant for variant in parts(recipient, of_sizes([1, 1, 1]))}
    assert list(found)[:2] == ["all attn", "all mlp"]
    assert found["Mid mlp"].grafts == (Graft(("blocks.1.mlp",)),)
    blocks = recipient.anatomy.text.blocks
    with grafted(recipient, donor, found["all attn"].grafts):
        for key, weight in recipient.model.state_dict().items():
            moved = any(key.startswith(block.attention + ".") for block in blocks)
            assert torch.equal(weight, theirs[key] if moved else own[key]), key
    (head,) = addressed(["blocks.1.attn.head.2"])
    assert head.name == "blocks.1.attn.head.2"
    assert [variant.grafts[0].coefficient for variant in doses(recipient, (0.5, 2.0))] == [0.5, 2.0]
    assert doses(recipient, ranks=(3,))[0].grafts[0].rank == 3


def test_other_partitions_give_every_mixture() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("in"))
    found = orders(parse_partition("2/3/3/1", 9), vlm)
    assert len({variant.name for variant in found}) == 2**4 - 2
    assert next(v for v in found if v.name == "I:R:I:R").grafts[0].addresses == ("blocks.2-4", "blocks.8")
    with pytest.raises(FrankenlensError, match="the model has 9"):
        orders(thirds(28), vlm)
    with pytest.raises(FrankenlensError, match="mixtures need 2 to"):
        orders(of_sizes([9], ["all"]), vlm)
    with pytest.raises(FrankenlensError, match="rest="):
        orders(thirds(9), vlm, "late")


def test_controls_are_as_large_and_elsewhere() -> None:
    in_, rl = (HookedVLM.from_pretrained(embedded.path(stage), check=False) for stage in ("in", "rl"))
    partition = thirds(9)
    mixed = orders(partition, in_)
    single = [*addressed(["blocks.3.attn.head.1", "projector"]), *doses(in_, (0.5,), (2,))]
    with pytest.warns(
        UserWarning, match=r"no control 'layers' stands beside blocks.3.attn.head.1, projector, 0.5 x"
    ):
        found = controls([*mixed, *single], partition, seed=3)
    assert len(found) == 2 * len(mixed) + len(single)
    assert found == controls(mixed, partition, seed=3) + controls(single, partition, ["random"], seed=3)
    own = {name: weight.detach().clone() for name, weight in in_.model.named_parameters()}
    theirs = {name: weight.detach() for name, weight in rl.model.named_parameters()}
    for control in found:
        variant = next(v for v in [*mixed, *single] if v.name == control.control_of)
        with torch.no_grad(), grafted(in_, rl, variant.grafts):
            changed = {
                n: (w - own[n]).norm() for n, w in in_.model.named_parameters() if not torch.equal(w, own[n])
            }
        with torch.no_grad(), grafted(in_, rl, control.grafts):
            now = {
                n: w.detach().clone() for n, w in in_.model.named_parameters() if not torch.equal(w, own[n])
            }
        if control.name.endswith("random update"):
            assert now.keys() == changed.keys()
            for name, weight in now.items():
                torch.testing.assert_close((weight - own[name]).norm(), changed[name], rtol=2e-3, atol=1e-7)
                assert not torch.allclose(
                    weight, theirs[name], atol=0.1 * float((weight - own[name]).abs().max())
                )
        else:
            layers, others = (
                {n.split("layers.")[1].split(".")[0] for n in names} for names in (changed, now)
            )
            assert len(layers) == len(others)
            assert layers != others
            assert all(torch.equal(weight, theirs[name]) for name, weight in now.items())
    for wanted, why in ((["magic"], "no control"), (["layers"], "layers are left")):
        with pytest.raises(FrankenlensError, match=why):
            controls(mixed, partition, wanted, draws=40)


def test_the_control_of_an_address_stands_beside_it_in_the_table(pair: Pair) -> None:
    own = addressed(["projector"])
    variants = [*own, *controls(own, thirds(9), ["random"])]
    name = weight_slices(pair.in_.model, pair.in_.anatomy, "projector")[0].parameter
    theirs = pair.rl.model.get_parameter(name).detach().clone()

    def is_rls(vlm: HookedVLM) -> Outcomes:
        right = float(torch.equal(vlm.model.get_parameter(name), theirs))
        ids = tuple(map(str, range(10)))
        return Outcomes(ids, ("",) * 10, (right,) * 10, ("",) * 10)

    before = weights_sha256(pair.in_.model)
    found = transfer(pair.in_, pair.rl, variants, {"is RL's": is_rls}, progress=False)
    assert weights_sha256(pair.in_.model) == before
    table = transfer_table(found).set_index("variant")
    row = table.loc["projector random update"]
    assert (row["kind"], row["control_of"]) == ("control", "projector")
    assert (row["value"], row["excess"]) == (0, 1) and np.isnan(row["p_adjusted"])


def test_random_layers_are_no_mixture_and_no_set_twice() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("in"), check=False)
    mixed = orders(thirds(9), vlm, "early")
    found = controls(mixed, thirds(9), ["layers"], draws=4)
    assert len({variant.name for variant in found}) == 4 * 6
    sets = [frozenset(a for a in v.grafts[0].addresses if a.startswith("blocks")) for v in found]
    assert len(set(sets)) == len(sets)
    assert not set(sets) & {frozenset(f"blocks.{i}" for i in r) for r in (range(3), range(3, 6), range(6, 9))}
    assert not set(sets) & {frozenset(f"blocks.{i}" for i in range(9) if i // 3 != r) for r in range(3)}
    for variant, layers in zip(found, sets, strict=True):
        assert len(layers) == 3 * variant.control_of.count("R")
        rest = set(variant.grafts[0].addresses) - layers
        assert rest == (set(rest_of(vlm)) if variant.control_of.startswith("R") else set())


def test_answers_are_those_of_the_saved_checkpoint_in_transformers(pair: Pair, tmp_path) -> None:
    examples = [example for task in ("sum", "same", "count") for example in sample(task, 2, 11, "test")]
    before = weights_sha256(pair.in_.model), weights_sha256(pair.rl.model)
    variants = [*orders(thirds(9), pair.in_)[:2], *doses(pair.in_, (0.5,))]
    metric = answers(pair.builder, examples, max_new_tokens=32, batch_size=4)
    found = transfer(pair.in_, pair.rl, variants, {"accuracy": metric}, progress=False)
    assert (weights_sha256(pair.in_.model), weights_sha256(pair.rl.model)) == before
    assert found["variant"].to_numpy().tolist() == ["IN", "RL", *(v.name for v in variants)]
    folders = {"IN": embedded.path("in"), "RL": embedded.path("rl")}
    for variant in variants:
        folders[variant.name] = tmp_path / variant.name.replace(":", "")
        save_grafted(pair.in_, pair.rl, variant.grafts, folders[variant.name])
    for name, folder in folders.items():
        model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        for example in examples:
            prompt = pair.builder.build(example)
            written = model.generate(**prompt.inputs, max_new_tokens=32, do_sample=False)
            ids = written[0, len(prompt) :].tolist()
            expected = grade(pair.builder.read_trace(prompt.with_tokens(ids)).answer, example)
            got = found["right"].sel(variant=name, example=f"accuracy: {example.id}")
            assert float(got) == float(expected), (name, example.id)
    right = found["right"].to_numpy()
    assert len(np.unique(right, axis=0)) > 1


def test_an_identical_pair_changes_nothing_and_has_no_recovery(pair: Pair) -> None:
    examples = sample("sum", 8, 1, "test")
    metric = answers(pair.builder, examples, max_new_tokens=24)
    found = transfer(
        pair.in_, pair.in_, orders(thirds(9), pair.in_)[:2], {"accuracy": metric}, progress=False
    )
    table = transfer_table(found)
    assert (table["change"] == 0).all()
    assert table["recovery"].isna().all()
    assert table["recovery_why"].str.contains("not told from 0").all()


def test_what_fails_is_left_out_with_its_reason_and_no_answer_is_wrong(pair: Pair) -> None:
    examples = sample("sum", 3, 1, "test")
    empty = Example("empty", examples[0].images, " ", "1", "sum")

    def grader(answer: str | None, example: Example) -> bool:
        if example.id == examples[1].id:
            raise ZeroDivisionError("no digits")
        return grade(answer, example)

    outcomes = answers(pair.builder, [*examples, empty], grader=grader, max_new_tokens=32)(pair.rl)
    assert np.isnan(outcomes.right).tolist() == [False, True, False, True]
    assert "no digits" in outcomes.why[1]
    assert "empty question" in outcomes.why[3]
    short = answers(pair.builder, examples, max_new_tokens=2)(pair.rl)
    assert short.right == (0, 0, 0)
    assert set(short.why) == {"no answer can be read: cut off at 2 tokens"}
    with pytest.raises(FrankenlensError, match="no prompt"):
        answers(pair.builder, [empty])


def test_refusals_come_before_any_model_runs(pair: Pair) -> None:
    def explode(vlm: HookedVLM) -> Outcomes:
        raise AssertionError("it ran")

    with pytest.raises(FrankenlensError, match="not an address"):
        Graft(("blokcs.1",))
    for variants, why in (
        ([Variant("a", (Graft(("blocks.99",)),), "address")], "variant 'a'.*0-8"),
        ([Variant("a", (Graft(("blocks.1", "blocks.0-3")),), "address")], "both name weights"),
        ([*addressed(["blocks.1"]), *addressed(["blocks.1"])], "must be unique"),
    ):
        with pytest.raises(FrankenlensError, match=why):
            transfer(pair.in_, pair.rl, variants, {"m": explode})
    with pytest.raises(FrankenlensError, match="needs a metric"):
        transfer(pair.in_, pair.rl, [], {})
    smaller = tiny("qwen2_5_vl")
    other = HookedVLM(smaller.model, smaller.processor, check=False)
    with pytest.raises(FrankenlensError, match="in the donor"):
        transfer(pair.in_, other, factors(pair.in_), {"m": explode})


def _bunch(found: Any) -> Any:
    return found


def _made(n: int = 60) -> tuple[xr.Dataset, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ["Base", "IN", "RL", "I:R:R", "R:I:I", "vision", "I:R:R random update"]
    shares = np.array([0.1, 0.4, 0.8, 0.7, 0.45, 0.4, 0.42])
    right = (rng.random((len(names), 2 * n)) < shares[:, None]).astype(float)
    right[3, 5] = right[1, 7] = np.nan
    right[2, n:] = right[1, n:]  # on the second task RL is IN
    kinds = ["model"] * 3 + ["order"] * 2 + ["factor", "control"]
    found = xr.Dataset(
        {"right": (("variant", "example"), right), "why": (("variant", "example"), np.full(right.shape, ""))},
        coords={
            "variant": names,
            "kind": ("variant", kinds),
            "control_of": ("variant", [""] * 6 + ["I:R:R"]),
            "norm_ratio": ("variant", [np.nan] * 3 + [1.0] * 4),
            "cosine": ("variant", [np.nan] * 3 + [1.0] * 4),
            "held": ("variant", [np.nan] * 3 + [1.0] * 4),
            "refused": ("variant", [False] * 7),
            "lacking": ("variant", [""] * 7),
            "metric": ("example", ["accuracy"] * 2 * n),
            "task": ("example", ["sum"] * n + ["same"] * n),
        },
    )
    return found, right


def test_the_table_is_statsmodels_and_closed_forms() -> None:
    found, right = _made()
    table = transfer_table(found, {"reasoning": ("sum", "same")}).set_index(["task", "variant"])
    assert set(table.index.get_level_values(0)) == {"sum", "same", "reasoning, mean", "all questions"}
    row = table.loc[("sum", "I:R:R")]
    own, in_, rl = right[3, :60], right[1, :60], right[2, :60]
    there = own[~np.isnan(own)]
    assert (row["n"], row["left_out"]) == (59, 1)
    assert row["accuracy"] == pytest.approx(there.mean())
    low, high = proportion_confint(int(there.sum()), len(there), method="wilson")
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    both = ~np.isnan(own) & ~np.isnan(in_)
    a, b = own[both], in_[both]
    assert row["change"] == pytest.approx((a - b).mean())
    assert row["change_low"] < row["change"] < row["change_high"]
    counts = [[(a * b).sum(), (a * (1 - b)).sum()], [((1 - a) * b).sum(), ((1 - a) * (1 - b)).sum()]]
    assert row["p"] == pytest.approx(_bunch(mcnemar(np.array(counts), exact=True)).pvalue)
    assert (row["gained"], row["lost"]) == (counts[0][1], counts[1][0])
    family = ["I:R:R", "R:I:I", "vision"]
    p = [table.loc[("sum", name), "p"] for name in family]
    np.testing.assert_allclose(
        [table.loc[("sum", name), "p_adjusted"] for name in family],
        _bunch(multipletests(p, method="holm"))[1],
    )
    for name in ("Base", "IN", "RL", "I:R:R random update"):
        assert np.isnan(table.loc[("sum", name), "p_adjusted"])
    three = both & ~np.isnan(rl)
    expected = (own - in_)[three].sum() / (rl - in_)[three].sum()
    assert row["recovery"] == pytest.approx(expected)
    assert row["recovery_low"] < expected < row["recovery_high"]
    assert table.loc[("sum", "RL"), "recovery"] == 1
    control = table.loc[("sum", "I:R:R random update")]
    kept = ~np.isnan(own)
    assert control["excess"] == pytest.approx((own - right[6, :60])[kept].mean())
    assert np.isnan(row["excess"])


def test_recovery_is_refused_where_rl_is_not_told_from_in() -> None:
    found, _ = _made()
    table = transfer_table(found)
    same = table.loc[table["task"] == "same"]
    assert same["recovery"].isna().all()
    assert same["recovery_why"].str.startswith("RL − IN = 0.00").all()
    assert (table.loc[table["task"] == "sum", "recovery_why"] == "").all()


def test_the_shape_of_table_2() -> None:
    found, right = _made()
    wide = as_table_2(transfer_table(found, {"reasoning": ("sum", "same")}))
    assert list(wide) == ["metric", "task", "Base", "IN", "I:R:R", "R:I:I", "RL"]
    assert list(wide["task"]) == ["sum", "same", "reasoning, mean", "all questions"]
    assert wide.loc[0, "R:I:I"] == pytest.approx(100 * right[4, :60].mean())


def test_several_metrics_stand_side_by_side(pair: Pair) -> None:
    def metric(name: str, size: int):
        def measure(vlm: HookedVLM) -> Outcomes:
            share = float(vlm.model.get_parameter(f"{vlm.anatomy.final_norm}.weight").sum() != 0)
            ids = tuple(f"{name}{i}" for i in range(size))
            return Outcomes(ids, ("",) * size, (share,) * size, ("",) * size)

        return measure

    metrics = {"M_vis": metric("v", 9), "M_rea": metric("r", 12)}
    found = transfer(pair.in_, pair.rl, factors(pair.in_)[:1], metrics, {"Base": pair.in_}, progress=False)
    table = transfer_table(found)
    assert dict(table.groupby("metric")["n"].first()) == {"M_vis": 9, "M_rea": 12}
    calls = iter(range(10))

    def fickle(vlm: HookedVLM) -> Outcomes:
        return Outcomes((f"{next(calls)}",), ("",), (1.0,), ("",))

    with pytest.raises(FrankenlensError, match="other examples"):
        transfer(pair.in_, pair.rl, [], {"m": fickle}, progress=False)


def test_a_killed_transfer_goes_on_where_it_was(pair: Pair, tmp_path) -> None:
    examples = sample("sum", 4, 1, "test")
    metric = answers(pair.builder, [*examples, Example("empty", (), " ", "1", "sum")], max_new_tokens=32)
    variants = factors(pair.in_)[:3]
    calls = []

    def dies(vlm: HookedVLM) -> Outcomes:
        calls.append(weights_sha256(vlm.model))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return metric(vlm)

    before = weights_sha256(pair.in_.model)
    with pytest.raises(KeyboardInterrupt):
        transfer(pair.in_, pair.rl, variants, {"m": dies}, keep=tmp_path, progress=False)
    assert weights_sha256(pair.in_.model) == before
    again = transfer(pair.in_, pair.rl, variants, {"m": dies}, keep=tmp_path, progress=False)
    assert len(calls) == 4 + 2 + len(variants) - 3
    assert set(calls[4:]).isdisjoint(calls[:3])
    xr.testing.assert_identical(again, transfer(pair.in_, pair.rl, variants, {"m": metric}, progress=False))
