"""`frankenlens map` on the embedded pair, end to end."""

import csv
import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from experiments import embedded
from experiments.cli import main
from experiments.commands.map import COMMAND, MapConfig
from experiments.settings import load_examples
from hooks.errors import FrankenlensError
from interp.hypotheses import examples_of
from interp.questions.examples import fingerprint
from interp.questions.tasks import REASONING, sample
from interp.results.files import load_dataset

FILES = ["finished", "map.csv", "map.nc", "map.png", "report.html"]
SMALL = {
    "n": 16,
    "points": ("mlp_out", "projector"),
    "decision": "first",
    "batch_size": 16,
    "max_new_tokens": 48,
}


@pytest.fixture(scope="module")
def hashed():
    """The images whose pixels are hashed for fingerprints and clusters, once for each time."""
    seen = []

    class Counted:
        def __init__(self, text: bytes) -> None:
            self._own = hashlib.sha256(text)
            self.hexdigest = self._own.hexdigest

        def update(self, pixels: bytes) -> None:
            seen.append(pixels)
            self._own.update(pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.questions.examples.hashlib", SimpleNamespace(sha256=Counted))
        yield seen


@pytest.fixture(scope="module")
def out(tmp_path_factory, hashed):
    folder = tmp_path_factory.mktemp("map")
    COMMAND.run(MapConfig(out=folder, **SMALL))
    hashed.append(None)  # the run ends here
    return folder


def test_a_run_hashes_no_image_twice_for_the_same_thing(out, hashed):
    """Of each example once with its question (what was looked at), and once without (what hangs together)."""
    of_the_run = hashed[: hashed.index(None)]
    assert len(set(of_the_run)) > 1
    assert max(Counter(of_the_run).values()) <= 2 and len(of_the_run) <= 2 * SMALL["n"]


def test_all_four_files_are_written_and_nothing_else(out):
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_the_dataset_has_the_axes_and_the_controls(out):
    result = load_dataset(out / "map.nc")
    assert set(result["direction"].to_numpy()) == {"rl_to_in", "in_to_rl"}
    assert set(result["point"].to_numpy()) == {"mlp_out", "projector"}
    assert {"image", "question", "template", "decision", "all"} <= set(result["role"].to_numpy())
    assert float(abs(result["control_self"]).max()) == 0.0
    decisions, made = (json.loads(result.attrs[name]) for name in ("decisions", "provenance"))
    assert decisions["n_prompts"] == SMALL["n"]
    assert decisions["n_qualify"] == result.sizes["example"] == made["counts"]["decisions"]
    assert len(made["checkpoints"]["rl"]["weights_sha256"]) == 64
    assert made["settings"]["seed"] == 0


def test_the_dataset_names_all_that_were_looked_at_not_only_those_with_a_decision(out):
    examples, _ = load_examples(MapConfig(**SMALL), 0)
    assert load_dataset(out / "map.nc").sizes["example"] < len(examples) == SMALL["n"]
    expected = {example.id for example in examples} | {fingerprint(example) for example in examples}
    assert examples_of(out / "map.nc") == expected


def test_the_table_and_the_page_agree_with_the_dataset(out):
    result = load_dataset(out / "map.nc")
    rows = list(csv.DictReader((out / "map.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * result.sizes["component"] * result.sizes["role"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{result.sizes['example']} of {SMALL['n']} prompts qualify" in page
    assert (out / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_the_diagonal_of_the_2x2_is_the_two_models_themselves(out):
    result = load_dataset(out / "map.nc")
    for model, end in (("in", "recipient"), ("rl", "donor")):
        own = result["two_by_two"].sel(weights=model, prefix=model)
        assert float(abs(own - result[end].sel(direction="rl_to_in")).max()) < 1e-4


def test_the_same_seed_gives_the_same_map(out, tmp_path):
    [section] = COMMAND.run(MapConfig(out=tmp_path, **SMALL))
    again = section.dataset
    assert again is not None and again["effect"].equals(load_dataset(out / "map.nc")["effect"])
    assert again["recovery_low"].equals(load_dataset(out / "map.nc")["recovery_low"])


def test_ones_own_data_and_a_row_that_cannot_be_read(tmp_path, capsys):
    examples = sample(REASONING[0], 8, 1, "map")
    (tmp_path / "images").mkdir()
    rows = []
    for example in examples:
        example.images[0].save(tmp_path / "images" / f"{example.id}.png")
        rows.append({"question": example.question, "answer": example.answer, "image": f"{example.id}.png"})
    rows.insert(3, {"question": "how many", "answer": "1", "image": "missing.png"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = MapConfig(data=tmp_path / "data.jsonl", images=tmp_path / "images", n=9)
    found, dropped = load_examples(config, 0)
    assert [e.question for e in found] == [e.question for e in examples]
    assert [(reason[:5], n) for reason, n in dropped.items()] == [("row 4", 1)]
    assert "missing.png" in capsys.readouterr().err


def test_a_file_without_one_readable_row_is_one_error(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "a", "image": "missing.png"}')
    with pytest.raises(FrankenlensError, match=r"No row of .* row 1: image .*missing.png"):
        load_examples(MapConfig(data=tmp_path / "data.jsonl"), 0)


def test_synthetic_examples_are_shared_out_over_the_reasoning_tasks():
    examples, dropped = load_examples(MapConfig(n=len(REASONING) * 2 + 1), 0)
    assert len({example.id for example in examples}) == len(REASONING) * 2 + 1
    counts = [sum(example.task == task for example in examples) for task in REASONING]
    assert sorted(counts) == [2] * (len(REASONING) - 1) + [3]
    assert not dropped


def test_a_pair_without_a_difference_has_no_map(tmp_path, capsys):
    same = str(embedded.path("in"))
    settings = ["--n", "4", "--decision", "first", "--max-new-tokens", "24", "--out", str(tmp_path / "out")]
    assert main(["map", "--in", same, "--rl", same, *settings]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        "frankenlens: None of 4 prompts qualifies for the decision 'first' (4: no divergence"
    )
    assert "To go on, give more than 4 examples (--n)" in said and "(--decision): soft, which every" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["finished"]  # the traces, no result
