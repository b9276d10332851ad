"""What the commands' settings make of a pair: its template, its system message, what is accepted."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from experiments import embedded
from experiments.commands.map import MapConfig
from experiments.frame import clustered
from experiments.options import from_command_line
from experiments.settings import load_pair, load_questions, require_sound, require_there
from hooks.errors import FrankenlensError
from interp.questions.examples import Example, cluster_of
from interp.results.page import Account, Section


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


def _rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_a_field_of_the_data_says_what_hangs_together(tmp_path: Path) -> None:
    """Of each row its own; a row without it, and all rows by default, by their images."""
    asked = [{"question": f"{i} + 1?", "answer": str(i + 1), "scene": scene} for i, scene in enumerate("aab")]
    data = _rows(tmp_path / "rows.jsonl", [*asked, {"question": "9 + 1?", "answer": "10"}])
    by_image = load_questions(parsed("--data", data)).examples
    assert len({cluster_of(example) for example in by_image}) == 4
    by_scene = load_questions(parsed("--data", data, "--cluster", "scene")).examples
    found = {example.question: cluster_of(example) for example in by_scene}
    assert found["0 + 1?"] == found["1 + 1?"] == "cluster a" and found["2 + 1?"] == "cluster b"
    assert found["9 + 1?"].startswith("question ")
    with pytest.raises(FrankenlensError, match="no row has the field 'video' for the cluster"):
        load_questions(parsed("--data", data, "--cluster", "video"))
    with pytest.raises(FrankenlensError, match="--cluster is of a file of your own"):
        require_sound(parsed("--cluster", "scene"))


def test_a_cluster_that_is_named_twice_is_named_once(tmp_path: Path) -> None:
    asked = [{"question": f"{i} + 1?", "answer": str(i + 1), "a": "x", "b": str(i)} for i in range(2)]
    data = ["--data", _rows(tmp_path / "rows.jsonl", asked)]
    with pytest.raises(
        FrankenlensError, match=r"--fields cluster='a' and --cluster 'b' name two fields; give one"
    ):
        require_sound(parsed(*data, "--fields", "cluster=a", "--cluster", "b"))
    for given in (["--fields", "cluster=a"], ["--cluster", "a"], ["--fields", "cluster=a", "--cluster", "a"]):
        config = parsed(*data, *given)
        require_sound(config)
        assert {cluster_of(one) for one in load_questions(config).examples} == {"cluster x"}


@pytest.mark.parametrize("given", [["--images-anywhere"], ["--max-pixels", "1000"]])
def test_what_is_said_of_the_images_of_data_needs_data(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        FrankenlensError, match=rf"^{given[0]} is of the images of --data; give --data as well"
    ):
        require_sound(parsed(*given))
    data = _rows(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    require_sound(parsed("--data", data, *given))


def test_a_question_under_several_ids_is_asked_once(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "answer": "2"}
    data = _rows(tmp_path / "rows.jsonl", [{**row, "id": i} for i in range(4)])
    found = load_questions(parsed("--data", data))
    assert len(found.examples) == 1
    assert found.left_out == {"asked already, under another id": 3}


def test_the_account_says_how_many_clusters_there_are(tmp_path: Path) -> None:
    section = Section("x", "X", "found", Account("measured", "3 questions"))
    examples = [Example(str(i), (), f"{i}?", "1", cluster=scene) for i, scene in enumerate("aab")]
    assert "3 questions in 2 clusters" in clustered(section, examples).account.n
    assert clustered(section, examples[1:]) == section
