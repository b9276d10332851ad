"""`frankenlens suite`: every part on one page, with the part's own numbers."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from markupsafe import escape

from experiments.cli import main
from experiments.commands import attention, compare, suite
from experiments.commands.suite import COMMAND, PARTS, SuiteConfig, settings_of
from experiments.settings import load_pair, load_questions
from hooks.errors import FrankenlensError

SMALL: dict[str, Any] = {"n": 8, "batch_size": 16, "max_new_tokens": 40}


def test_parts_share_a_page_and_have_the_numbers_of_their_own_commands(tmp_path):
    sections = COMMAND.run(SuiteConfig(out=tmp_path, parts=("compare", "attention"), **SMALL))
    assert [section.name for section in sections] == ["attention", "compare"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for section in sections:
        assert str(escape(section.finding)) in page
        assert str(escape(section.account.text)) in page
    alone = attention.AttentionConfig(n=8, batch_size=16, max_new_tokens=40)
    pair = load_pair(alone)
    [section] = attention.COMMAND.measure(pair, load_questions(alone), alone)
    expected = section.tables["attention"]
    pair.close()
    found = pd.read_csv(tmp_path / "attention.csv")
    pd.testing.assert_series_equal(found["difference"], expected["difference"], check_exact=False)
    assert set(pd.read_csv(tmp_path / "compare.csv")["stage"]) == {"in", "rl"}


def test_a_part_takes_the_models_data_and_partition_and_keeps_its_own_settings():
    config = SuiteConfig(partition="3/3/3", seed=5, n=40, batch_size=7)
    own = settings_of(config, "compare")
    assert isinstance(own, compare.CompareConfig)
    assert own.partition == "3/3/3" and own.seed == 5 and own.subspace == compare.CompareConfig.subspace
    every = {part: settings_of(config, part) for part in PARTS if part != "compare"}
    assert {part: one.n for part, one in every.items()} == {
        "metrics": 40,
        "localize": 10,
        "attention": 40,
        "transfer": 40,
    }
    assert all(one.batch_size == 7 and one.out == config.out for one in every.values())
    assert settings_of(SuiteConfig(), "attention") == attention.AttentionConfig(out=SuiteConfig.out)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--n", "2"], "--n is 2"),
        (["--parts"], "--parts is empty"),
        (["--in", "x"], "go together"),
        (["--paper", "--n", "16"], "leave out --n, or --paper"),
        (["--paper", "--partition", "3/3/3", "--parts", "attention"], "leave out --partition, or --paper"),
        (["--n", "16", "--parts", "compare"], "--n 16 needs metrics or localize or attention or transfer"),
        (["--functions-data", "x", "--parts", "compare"], "--functions-data x needs localize among --parts"),
        (["--data", "x", "--parts", "compare", "localize"], "--data x needs metrics or attention"),
        (["--partition", "paper", "--parts", "metrics"], "--partition paper needs localize or attention"),
    ],
)
def test_a_mistake_is_one_line(argv, words, tmp_path, capsys):
    assert main(["suite", *argv, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_part_that_fails_loses_no_other(tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    parts = {**PARTS, "attention": replace(attention.COMMAND, measure=broken)}
    monkeypatch.setattr(suite, "PARTS", parts)
    with pytest.raises(
        FrankenlensError, match=r"1 of 2 parts failed; .* attention: RuntimeError: out of memory"
    ):
        COMMAND.run(SuiteConfig(out=tmp_path, parts=("compare", "attention"), **SMALL))
    assert (tmp_path / "compare.csv").is_file() and not (tmp_path / "attention.csv").exists()
