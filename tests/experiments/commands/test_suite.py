"""`frankenlens suite`: every part on one page, with the part's own numbers."""

from typing import Any

import pandas as pd
import pytest
from markupsafe import escape

from experiments.cli import main
from experiments.commands import attention, compare
from experiments.commands.suite import PARTS, SuiteConfig, run, settings_of
from experiments.settings import PairSettings, load_pair
from hooks.errors import FrankenlensError

SMALL: dict[str, Any] = {"n": 8, "batch_size": 16, "max_new_tokens": 40}


def test_parts_share_a_page_and_have_the_numbers_of_their_own_commands(tmp_path):
    sections = run(SuiteConfig(out=tmp_path, parts=("compare", "attention"), **SMALL))
    assert [section.name for section in sections] == ["attention", "compare"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for section in sections:
        assert str(escape(section.finding)) in page
        assert str(escape(section.account.text)) in page
    alone = attention.AttentionConfig(n=8, batch_size=16, max_new_tokens=40)
    pair = load_pair(alone)
    examples, _ = attention.load_examples(alone, alone.seed)
    expected = attention.measure(pair, examples, alone).tables["attention"]
    found = pd.read_csv(tmp_path / "attention.csv")
    pd.testing.assert_series_equal(found["difference"], expected["difference"], check_exact=False)
    assert set(pd.read_csv(tmp_path / "compare.csv")["stage"]) == {"in", "rl"}


def test_a_part_takes_the_models_data_and_partition_and_keeps_its_own_settings():
    config = SuiteConfig(partition="3/3/3", seed=5, parts=("compare",))
    own = settings_of(config, compare.CompareConfig)
    assert own.partition == "3/3/3" and own.seed == 5 and own.subspace == compare.CompareConfig.subspace
    assert isinstance(own, PairSettings) and set(PARTS) > set(config.parts)


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--n", "2"], "--n is 2"), (["--parts"], "--parts is empty"), (["--in", "x"], "go together")],
)
def test_a_mistake_is_one_line(argv, words, tmp_path, capsys):
    assert main(["suite", *argv, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_part_that_fails_loses_no_other(tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "measure", broken)
    with pytest.raises(
        FrankenlensError, match=r"1 of 2 parts failed; .* attention: RuntimeError: out of memory"
    ):
        run(SuiteConfig(out=tmp_path, parts=("compare", "attention"), **SMALL))
    assert (tmp_path / "compare.csv").is_file() and not (tmp_path / "attention.csv").exists()
