"""`frankenlens lens` on the embedded pair, end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import embedded
from experiments.cli import main
from experiments.commands.lens import COMMAND, LensConfig, check
from hooks import FrankenlensError, HookedVLM
from interp.lens import TunedLens
from interp.results.files import load_dataset

TABLES = ["answers.csv", "dla.csv", "kl.csv", "lens.csv"]
FIGURES = [f"lens_{one}.png" for one in ("answers", "dla", "image", "kl", "own", "tokens")]
SMALL: dict[str, Any] = {"n": 16, "tuned_steps": 12, "batch_size": 16}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens")
    COMMAND.run(LensConfig(out=folder, lenses=folder / "lenses", **SMALL))
    return folder


def test_all_files_are_written_and_nothing_else(out: Path) -> None:
    expected = [*TABLES, *FIGURES, "lens.nc", "lenses", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


def test_the_tables_have_n_intervals_and_controls(out: Path) -> None:
    kl, lens, answers, dla = (pd.read_csv(out / f"{name}.csv") for name in ("kl", "lens", "answers", "dla"))
    assert kl["comparison"].unique().tolist() == ["rl", "bf16", "random"]
    own = kl.query("comparison == 'rl' and role == 'reasoning' and layer == 9").iloc[0]
    assert own["kl"] > own["excess"] > 0 and own["n"] == 16
    assert np.isnan(own[["kl_low", "excess_low", "p"]].to_numpy(float)).all()  # too few prompts for either
    random = kl.query("comparison == 'random' and role == 'reasoning' and layer == 9").iloc[0]
    assert random["kl"] < 0.05 * own["kl"]
    last = lens.query("layer == 9")
    assert (last["kl"] == 0).all() and (last["agrees"] == 1).all() and (last["tuned_kl"] == 0).all()
    assert lens["tuned_n"].max() == 8
    assert {"random_difference", "bf16_low", "p_corrected", "same_answer"} <= set(answers)
    assert dla["component"].iloc[-1] == "logit" and {"random_difference", "bf16_difference"} <= set(dla)
    parts = dla[dla["component"] != "logit"]
    for side in ("in", "rl", "difference"):
        np.testing.assert_allclose(parts[side].sum(), dla[side].iloc[-1], atol=1e-4)
    assert dla["in"].iloc[-1] < 0 < dla["rl"].iloc[-1]  # each prefers its own token, whose logits are these
    assert "seed" in kl and kl["definition"].str.contains("gain folded into W_U").all()


def test_the_dataset_holds_every_token_and_the_page_its_provenance(out: Path) -> None:
    found = load_dataset(out / "lens.nc")
    assert found["model"].to_numpy().tolist() == ["in", "rl"]
    assert len(np.unique(found["example"])) == found.sizes["looked_at"] == 16
    assert (found["kl"].sel(layer=9) == 0).all()
    made = json.loads(found.attrs["provenance"])
    assert made["settings"]["tuned_steps"] == 12 and len(made["checkpoints"]["rl"]["weights_sha256"]) == 64
    assert "learnt nothing" in (out / "report.html").read_text(encoding="utf-8")


def test_the_lenses_that_were_kept_are_those_of_their_models(out: Path) -> None:
    rl = HookedVLM.from_pretrained(embedded.path("rl"))
    lens = TunedLens.load(out / "lenses" / "rl.safetensors", rl)
    assert lens.made["steps"] == 12 and lens.made["n_prompts"] == 8
    with pytest.raises(FrankenlensError, match="was trained on"):
        TunedLens.load(out / "lenses" / "in.safetensors", rl)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--top-k", "0"], "--top-k is 0"),
        (["--tuned-steps", "-1"], "--tuned-steps is -1"),
        (["--tuned-steps", "0", "--lenses", "kept"], "trains none"),
        (["--n", "1"], "--n 2"),
        (["--in", "nowhere"], "go together"),
        (["--n", "4", "--tuned-steps", "0", "--top-k", "5000", "--unparsed", "1"], "top_k is 5000"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(tmp_path: Path, capsys, given, match) -> None:
    assert main(["lens", "--max-new-tokens", "4", *given, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert match in told[-1] and not (tmp_path / "out").exists()


def test_traces_without_an_answer_and_a_pair_without_a_difference(tmp_path: Path, capsys) -> None:
    """No answers and no attribution, and the page says why; IN beside itself is nowhere apart."""
    same = str(embedded.path("in"))
    settings = [
        "--n",
        "9",
        "--max-new-tokens",
        "3",
        "--unparsed",
        "1",
        "--tuned-steps",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(["lens", "--in", same, "--rl", same, *settings]) == 0
    assert not any((tmp_path / name).exists() for name in ("answers.csv", "dla.csv"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "holds none" in page and "both models write the same" in page
    kl = pd.read_csv(tmp_path / "kl.csv").query("comparison == 'rl'")
    assert (
        (kl["kl"] == 0).all()
        and (kl["overlap"] == 1).all()
        and "KL(RL || IN) is 0 [no interval]" in capsys.readouterr().out
    )


def test_the_check_needs_no_file() -> None:
    with pytest.raises(FrankenlensError, match="--top-k"):
        check(LensConfig(in_="nowhere", rl="nowhere", top_k=0))
