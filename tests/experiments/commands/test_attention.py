"""`frankenlens attention` on the embedded pair, end to end."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import embedded
from experiments.cli import main
from experiments.commands.attention import COMMAND, AttentionConfig, check
from hooks.errors import FrankenlensError
from interp.attention.shift import attention_mass
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.tasks import REASONING, sample
from interp.results.files import load_dataset
from interp.statistics import adjust

N = 8
FILES = [
    "attention.csv", "attention.nc", "attention.png", "attention_heads.csv", "attention_heads.png",
    "finished", "report.html",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    COMMAND.run(AttentionConfig(n=N, max_new_tokens=48, out=folder))
    return folder


def test_all_files_are_written_and_nothing_else(out) -> None:
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_the_table_is_the_attention_measured_by_hand(out) -> None:
    table = pd.read_csv(out / "attention.csv")
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    examples = [example for task in REASONING for example in sample(task, N // len(REASONING), 0, "map")]
    prompts = [pair.builder.build(example) for example in examples]
    mass = {}
    for name in ("in", "rl"):
        written = greedy(pair.models[name], prompts, 48)
        traces = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
        for reader in ("in", "rl"):
            mass[reader, name] = attention_mass(pair.models[reader], traces, "reasoning", "image").mean(1)
    for traces, (before, after) in {
        "own": (("in", "in"), ("rl", "rl")), "in": (("in", "in"), ("rl", "in")), "rl": (("in", "rl"), ("rl", "rl")),
    }.items():  # fmt: skip
        own = table.loc[(table["traces"] == traces) & (table["comparison"] == "RL − IN")].sort_values("layer")
        for measure, per in (("mass", 1), ("mean", 16)):
            some = own.loc[own["measure"] == measure]
            assert set(some["n"]) == {N}
            expected = (mass[after] - mass[before]).mean(1) / per
            np.testing.assert_allclose(some["difference"], expected, atol=1e-6)
            assert np.abs(expected).max() > 1e-4
            np.testing.assert_allclose(some["p_corrected"], adjust(some["p"].to_numpy()))


def test_models_that_learnt_nothing_shift_less(out) -> None:
    table = pd.read_csv(out / "attention.csv").query("measure == 'mass'")
    largest = table.groupby("comparison")["difference"].agg(lambda d: d.abs().max())
    assert len(largest) == 3
    assert (largest.drop("RL − IN") < largest["RL − IN"]).all()
    assert largest.min() > 0
    heads = pd.read_csv(out / "attention_heads.csv")
    assert len(heads) == (3 + 2 * 2) * 9 * 4


def test_the_page_and_the_dataset_say_what_they_rest_on(out) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in ("(mass)", "Holm over the layers", f"n = {N}", "Both on RL", "random update"):
        assert text in page
    found = load_dataset(out / "attention.nc")
    assert found.sizes["looked_at"] == N
    assert found["model"].to_numpy().tolist() == ["in", "rl", "bf16", "random"]
    assert json.loads(found.attrs["provenance"])["counts"] == {"examples": N}


def test_the_paper_is_spelt_out_and_wrong_roles_are_refused() -> None:
    assert AttentionConfig(paper=True).n == 100 * len(REASONING)
    assert AttentionConfig(paper=True, data=Path("x.jsonl")).n == 100
    assert AttentionConfig(paper=True, measure="mass") == AttentionConfig(paper=True)
    with pytest.raises(FrankenlensError, match="--queries has 'reason'"):
        check(AttentionConfig(queries="reason"))


def test_traces_that_cannot_be_used_are_one_line(tmp_path, capsys) -> None:
    settings = [
        "--n",
        "4",
        "--max-new-tokens",
        "2",
        "--unparsed",
        "1",
        "--no-nulls",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["attention", *settings]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("frankenlens: None of 8 traces can be used (8: the trace does not parse")
