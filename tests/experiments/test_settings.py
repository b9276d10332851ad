"""What the commands' settings make of a pair: its template, its system message, what is accepted."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from experiments import embedded
from experiments.commands.map import MapConfig
from experiments.options import from_command_line
from experiments.settings import load_pair, require_there
from hooks.errors import FrankenlensError
from interp.questions.examples import Example


def parsed(*args: str) -> MapConfig:
    return from_command_line(MapConfig, args, "map")


@pytest.fixture
def rl(tmp_path: Path) -> Path:
    """RL with another template and another setting that enters the forward pass."""
    folder = tmp_path / "rl"
    shutil.copytree(embedded.path("rl"), folder)
    for name, change in (
        ("chat_template.jinja", lambda text: "Hi. " + text),
        ("config.json", lambda text: json.dumps(_other(json.loads(text)))),
    ):
        text = change((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _other(config: dict) -> dict:
    config["text_config"]["rms_norm_eps"] = 1e-6
    return config


def test_a_template_a_system_message_and_what_is_accepted_reach_the_pair(rl: Path, tmp_path: Path) -> None:
    in_ = embedded.path("in")
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}]{% endfor %}"
    )
    pair = ["--in", str(in_), "--rl", str(rl)]
    with pytest.raises(FrankenlensError, match=r"(?s)rms_norm_eps.*chat template.*accept="):
        load_pair(parsed(*pair))
    given = parsed(
        *pair, "--template", str(template), "--system", "add", "--accept", "text_config.rms_norm_eps"
    )
    with closing(load_pair(given)) as opened:
        prompt = opened.builder.build(Example("0", (), "how many red ?", "1"))
        assert prompt.prompt_text == "[system: add][user: how many red ?]"
        assert opened.provenance()["rl"]["accepted"] == ["setting text_config.rms_norm_eps: 1e-05 and 1e-06"]


def test_a_template_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FrankenlensError, match="no such file: .*nowhere.jinja .--template."):
        require_there(parsed("--template", str(tmp_path / "nowhere.jinja")))
