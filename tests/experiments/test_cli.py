import subprocess
import sys

import pytest

from experiments.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mpa"], "Did you mean 'map'"),
        (["map", "--in", "somewhere"], "--in and --rl go together"),
        (["map", "--points", "mlp"], "choose of resid_pre, attn_out, cross_attn_out, mixer_out, mlp_out"),
        (["map", "--n", "0"], "--n is 0"),
        (["map", "--batch-size", "-1"], "--batch-size is -1"),
        (["map", "--images", "x"], "give --data as well"),
        (["map", "--answer", "a", "b", "c"], "--answer has 3 values"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert said.out == ""


def test_missing_checkpoints_and_data_are_one_error(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["map", "--in", str(tmp_path / "in"), "--rl", str(tmp_path / "rl"), *out]) == 2
    assert str(tmp_path / "in") in capsys.readouterr().err
    assert main(["map", "--data", str(tmp_path / "none.jsonl"), *out]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_wrong_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["map", "--direction", "sideways"])
    assert stopped.value.code == 2
    assert "sideways" in capsys.readouterr().err


def test_the_installed_command_runs():
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("frankenlens 0.")
