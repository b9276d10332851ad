"""Every command asks for questions that can be asked and traces that can be read, before it measures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments import embedded
from experiments.cli import COMMANDS, main
from experiments.contract import as_options, askable
from experiments.settings import PairSettings, require_sound
from hooks.errors import FrankenlensError
from hooks.processors import load_processor
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.tasks import sample

CLAIMS = """
claims:
  - {name: one, component: blocks.3.mlp, at_least: 0.1}
"""
ASKING = {  # what each command needs to be small
    "map": "--points mlp_out",
    "metrics": "--metrics vis",
    "transfer": "",
    "localize": "--model in --modes single --parts --kinds",
    "attention": "",
    "lens": "",
    "knockout": "",
    "lockstep": "--components blocks.3.mlp",
    "paths": "--senders blocks.3.mlp",
    "planted": "--pairs 1 --kinds rl",
    "test": "",
    "suite": "--parts attention",
    "trajectory": "--points mlp_out --decision first",
}
NO_PAIR = {"compare", "train-triple", "freeze"}
"""They ask no pair anything; `freeze` asks the pair of one's own data, where it trains."""


WRITING = {"traces"}


def run(command: str, folder, *more: str) -> int:
    (folder / "claims.yaml").write_text(CLAIMS)
    given = [*ASKING[command].split(), "--n", "6", "--max-new-tokens", "48", "--out", str(folder / "out")]
    return main([command, *([str(folder / "claims.yaml")] if command == "test" else []), *given, *more])


def test_every_command_is_looked_at():
    assert {*ASKING, *NO_PAIR, *WRITING} == set(COMMANDS)


def test_what_is_written_is_shown_whether_it_can_be_read_or_not(tmp_path):
    given = ["--answer", "result", "--n", "6", "--max-new-tokens", "48", "--out", str(tmp_path / "out")]
    assert main(["traces", *given]) == 0
    assert "0% can be read" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("command", ASKING)
def test_a_pair_whose_traces_cannot_be_read_is_refused(command, tmp_path, capsys):
    assert run(command, tmp_path, "--answer", "result") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for words in (
        "0 of ",
        "no 'result'",
        "One of them: '<think> ",
        " would be read with ",
        "--answer answer",
        "--unparsed 1",
    ):
        assert words in told
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.csv"))


def test_it_goes_on_when_told_to_and_tells_the_counts(tmp_path, capsys):
    assert run("attention", tmp_path, "--answer", "result", "--unparsed", "1") == 2  # it needs answers itself
    assert "of IN's 6 traces can be read (6: no 'result')" in capsys.readouterr().err
    assert run("map", tmp_path, "--reasoning", "none", "--decision", "first", "--points", "mlp_out") == 0
    assert (
        "6 of IN's 6 traces can be read; 6 of RL's 6 traces can be read. One of them: '<think> "
        in capsys.readouterr().err
    )


def test_traces_that_were_cut_off_are_said_to_be(tmp_path, capsys):
    assert run("map", tmp_path, "--max-new-tokens", "4") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "Give more than --max-new-tokens 4, at which 12 of them were cut off, or --unparsed 1" in told


def test_a_question_that_cannot_be_asked_is_left_out_by_name(tmp_path, capsys):
    examples = sample("count", 4, seed=3, split="map")
    rows = []
    for example in examples:
        example.images[0].save(tmp_path / f"{example.id}.png")
        rows.append({"question": example.question, "answer": example.answer, "image": f"{example.id}.png"})
    builder = PromptBuilder(load_processor(embedded.path("in")))
    rows[1]["question"] += f" {builder.image_token}"
    (tmp_path / "d.json").write_text(json.dumps(rows))
    settings = ("--data", str(tmp_path / "d.json"), "--decision", "soft", "--points", "mlp_out")
    assert run("map", tmp_path, *settings) == 0
    assert (
        "left out: example '2': the question holds the image placeholder '<|image_pad|>'"
        in capsys.readouterr().err
    )
    assert "the question holds the image placeholder" in (tmp_path / "out" / "report.html").read_text()


def test_an_answer_without_reasoning_is_an_answer(tmp_path, capsys):
    """The embedded Base answers straight away, and is what `localize` looks into."""
    assert run("localize", tmp_path, "--model", "base", "--n", "2") == 0
    assert "32 of BASE's 32 traces can be read. One of them: 'answer " in capsys.readouterr().err
    assert run("map", tmp_path, "--reasoning", "<plan>", "</plan>") == 2  # an answer behind what has no role
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "0 of RL's 6 traces can be read (6: no '<plan>')" in told
        and "--reasoning '<think>' '</think>'" in told
    )


def test_only_what_no_prompt_can_be_made_of_is_left_out():
    examples = sample("count", 3, seed=3, split="map")
    builder = PromptBuilder(load_processor(embedded.path("in")))
    with_it = replace(examples[1], question=f"a {builder.image_token} b")
    empty = replace(examples[2], question=" ")
    kept, left_out = askable(builder, [examples[0], with_it, empty])
    assert [example.id for example in kept] == [examples[0].id]
    assert sorted(left_out.values()) == [1, 1] and any(
        "holds the image placeholder" in why for why in left_out
    )
    with pytest.raises(FrankenlensError, match="holds the image placeholder"):
        askable(builder, [with_it, empty])


def test_formats_without_delimiters():
    config = PairSettings(reasoning=("none",), answer=("none",))
    require_sound(config)
    assert config.trace_format.reasoning is None and config.trace_format.answer is None
    assert as_options(config.trace_format) == "--reasoning none --answer none"
    assert as_options(TraceFormat(answer=(r"\boxed{", "}"))) == (
        r"--reasoning '<think>' '</think>' --answer '\boxed{' '}'"
    )
    for wrong, why in (
        (PairSettings(reasoning=("<think>",)), "--reasoning has 1 values; .* or none where nothing does"),
        (PairSettings(answer=()), "--answer has 0 values"),
        (PairSettings(unparsed=1.2), "--unparsed is a share of the traces, 0 to 1, not 1.2"),
    ):
        with pytest.raises(FrankenlensError, match=why):
            require_sound(wrong)
