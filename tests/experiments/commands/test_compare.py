"""`frankenlens compare` on the embedded triple, end to end."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from experiments import embedded
from experiments.cli import main
from experiments.commands.compare import COMMAND, CompareConfig, check, open_files
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair

TABLES = [f"compare{one}.csv" for one in ("", "_addresses", "_layers", "_regions", "_spectra", "_trends")]
FIGURES = [f"compare_{one}.png" for one in ("directions", "energy", "spectra")]
COLUMNS = (
    "param_name address section layer_index component stage fro_norm relative_norm spectral_norm nuclear_norm "
    "stable_rank effective_rank log_volume sparsity"
).split()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    COMMAND.run(CompareConfig(out=folder, regions=("blocks.3-5.mlp",)))
    return folder


def test_all_files_are_written_and_nothing_else(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted([*TABLES, *FIGURES, "report.html"])


def test_the_table_has_a_row_a_tensor_and_stage_and_says_what_it_rests_on(out: Path) -> None:
    table = pd.read_csv(out / "compare.csv")
    assert [column for column in COLUMNS if column not in table] == []
    assert table["stage"].value_counts().to_dict() == {"in": 152, "rl": 152}
    assert table["partition"].unique().tolist() == ["thirds (paper): Early 0-2, Mid 3-5, Late 6-8"]
    addresses = pd.read_csv(out / "compare_addresses.csv")
    assert {"blocks.8.attn.head.3", "vision.blocks.0.attn.kv_head.1", "blocks.3-5.mlp"} <= set(
        addresses["address"]
    )


def test_the_page_names_each_model_by_the_hash_that_the_loaded_pair_has(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    pair = Pair.from_pretrained(*(embedded.path(stage) for stage in ("in", "rl", "base")))
    for made in pair.provenance().values():
        assert made["weights_sha256"][:16] in page and made["class"] in page
    pair.close()
    assert "Gaussian" in page and "1 tied" not in page


def test_the_finding_has_n_intervals_and_controls() -> None:
    config = CompareConfig(paper=True, subspace=0)
    files = open_files(config)
    [section] = COMMAND.measure(files, files, config)
    assert "rounding to bfloat16 alone" in section.finding and "n = 21 matrices" in section.finding
    assert "n = 152 tensors" in section.finding and "Mean relative norm" in section.details
    assert "[" in section.finding and "Gaussian" in section.finding
    assert "relative to W_IN's" in section.account.definition
    assert section.account.left_out == {"tied to another tensor, counted once": 1}
    assert "energy_outside" not in section.tables["compare"]
    assert json.dumps(dict(section.account.left_out))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--regions", "blocks.30"], "blocks 0-8"),
        (["--partition", "4/4"], "the model has 9"),
        (["--partition", "halves"], "is no partition"),
        (["--subspace", "-1"], "--subspace is -1"),
        (["--in", "nowhere"], "go together"),
        (["--in", "nowhere", "--rl", "nowhere"], "no such folder: nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(tmp_path: Path, capsys, given, match) -> None:
    assert main(["compare", "--out", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert match in told[-1] and not (tmp_path / "out").exists()


def test_the_check_needs_no_file() -> None:
    with pytest.raises(FrankenlensError, match="--subspace"):
        check(CompareConfig(in_="nowhere", rl="nowhere", subspace=-2))


def test_rl_may_be_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the help of --rl says; its own table is beside the others."""
    model = AutoModelForImageTextToText.from_pretrained(embedded.path("in"))
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*up_proj")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(str(tmp_path / "rl"))
    out = tmp_path / "out"
    given = ["--in", str(embedded.path("in")), "--rl", str(tmp_path / "rl"), "--out", str(out)]
    assert main(["compare", *given, "--no-spectra", "--subspace", "0"]) == 0
    own, table = (pd.read_csv(out / f"compare{one}.csv").set_index("param_name") for one in ("_adapter", ""))
    assert own["adapter_rank"].tolist() == own["rank"].tolist() == [3] * 9
    changed = table.loc[table["fro_norm"] > 0, "fro_norm"]
    assert changed.to_dict() == pytest.approx(own["fro_norm"].to_dict(), rel=1e-4)
    assert "W + s B A in float32" in (out / "report.html").read_text(encoding="utf-8")
