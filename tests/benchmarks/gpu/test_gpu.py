"""`make gpu` without a GPU: every step at tiny size, its arithmetic, and what becomes of steps that fail."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3VLForConditionalGeneration

from hooks import HookedVLM
from tests.benchmarks.gpu import needed, table
from tests.benchmarks.gpu.__main__ import GROUPS
from tests.benchmarks.gpu.exactness import family_cases
from tests.benchmarks.gpu.floor import Floor
from tests.benchmarks.gpu.groups import budgets, steps_of
from tests.benchmarks.gpu.shapes import PROMPTS, SMALL, config_of, inputs_of, model_of, prompt_of
from tests.benchmarks.gpu.steps import Record, Step, run_steps
from tests.families import redraw

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def test_all_of_it_ends_in_ten_minutes() -> None:
    starts = 10 * (len(GROUPS) + 1)
    assert sum(sum(budgets(group, "full").values()) for group in GROUPS) + starts <= 600


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
def test_the_steps_of_a_shape_at_tiny_size(name: str, tmp_path: Path) -> None:
    record = Record(tmp_path / "found.json")
    record.begin({"device": "cpu", "shape": "tiny"})
    run_steps(name, steps_of(name, "tiny", CPU), record, CPU)
    assert not record.failed()
    steps = record.of(name)
    assert list(steps) == list(budgets(name, "tiny"))
    scan = steps["head map" if name != "llama" else "head scan"]
    assert scan["sites"] == scan["of_sites"] == 12
    assert scan["difference"] <= scan["tolerance"] < scan["largest_effect"] / 100
    assert scan["floor_s"] > 0 and scan["share_of_floor"] == pytest.approx(scan["floor_s"] / scan["seconds"])
    if name != "llama":
        assert (steps["weights"]["tokens"], steps["weights"]["image_tokens"]) == (40, 24)


def test_a_family_is_exact_in_every_case() -> None:
    found = family_cases("qwen3_vl", CPU)
    assert {"float32 eager", "float32 sdpa", "bfloat16 eager", "bfloat16 sdpa"} <= set(found)


def test_a_full_prompt_has_1300_tokens_1000_of_them_image() -> None:
    for name in ("qwen2_5_vl", "qwen3_vl"):
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(config_of("qwen3_vl", "tiny"))
        model.config.vision_config = config_of(name, "full").vision_config
        for key, value in config_of(name, "full").to_dict().items():
            if key.endswith("token_id"):
                setattr(model.config, key, value)
        ids = inputs_of(model, "full", PROMPTS[name, "full"], 0)["input_ids"]
        assert ids.shape == (1, 1300) and int((ids == 151655).sum()) == 1000


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3_vl", Qwen3VLForConditionalGeneration), ("llama", LlamaForCausalLM)]
)
def test_a_model_made_without_its_own_initialization_is_the_same(name: str, kind: Any) -> None:
    quick, slow = model_of(name, "tiny", CPU, torch.float32), kind(config_of(name, "tiny")).eval()
    redraw(slow, 0)
    inputs = inputs_of(quick, "tiny", PROMPTS[name, "tiny"], 0)
    with torch.no_grad():
        assert torch.equal(quick(**inputs).logits, slow(**inputs).logits)


def test_the_floor_is_what_one_forward_from_there_costs() -> None:
    """From the first layer and token on: all of a forward, but for the last block's queries and MLP, and the words."""
    model = model_of("llama", "tiny", CPU, torch.float32)
    vlm = HookedVLM(model, inputs=inputs_of(model, "tiny", SMALL, 0))
    n = len(prompt_of(model, "tiny", PROMPTS["llama", "tiny"], 0))
    d, d_mlp, d_head, heads, kv, words = 64, 96, 16, 4, 2, 256
    projections, mlp = 2 * d * d_head * (2 * heads + 2 * kv), 2 * 3 * d * d_mlp
    block = n * (projections + mlp) + 4 * n * n * heads * d_head
    last = n * 2 * d * d_head * 2 * kv + 2 * d * d_head * 2 * heads + mlp + 4 * n * heads * d_head
    assert Floor(vlm, n).of_residual(0, 0) == 2 * block + last + 2 * d * words
    own = n * (2 * d_head * d + mlp)
    assert Floor(vlm, n).of_head(0) == own + block + last + 2 * d * words
    assert Floor(vlm, n).of_head(2) == 2 * d_head * d + mlp + 2 * d * words


def test_steps_that_fail_or_take_too_long_are_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    def fails() -> dict:
        raise ValueError("no such thing")

    def waits() -> dict:
        time.sleep(30)
        return {}

    record = Record(tmp_path / "found.json")
    record.begin({"device": "none"})
    steps = [
        Step("first", 5, lambda: {"seconds": 1.5}),
        Step("fails", 5, fails),
        Step("waits", 0.1, waits, ("first",)),
        Step("needs", 5, dict, ("fails",)),
        Step("last", 5, lambda: {"seconds": 2.5}, ("first",)),
    ]
    run_steps("group", steps, record, CPU)
    found = json.loads(record.path.read_text())["steps"]["group"]
    assert [name for name, one in found.items() if "error" not in one] == ["first", "last"]
    assert found["fails"]["error"] == "ValueError: no such thing"
    assert found["waits"]["error"] == "took longer than its 0.1 s" and found["waits"]["took_s"] < 5
    assert "fails did not go well" in found["needs"]["error"]
    assert len(record.failed()) == 3


def test_missing_wheels_are_named_together(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert needed.missing() == [] and needed.main() == 0
    gone = {"torch": "torch>=99", "no_such_module": "no-such-wheel>=1", "numpy": "numpy>=1.26"}
    monkeypatch.setattr(needed, "WHEELS", gone)
    assert needed.missing() == ["torch>=99", "no-such-wheel>=1"] and needed.main() == 1
    told = capsys.readouterr().err
    assert "needs torch>=99, no-such-wheel>=1, which" in told and told.count("\n") == 1
    assert "pip install 'no-such-wheel>=1'" in told and "pytorch.org" in told


def test_the_section_of_results_names_what_ran_and_what_did_not() -> None:
    assert "no GPU was at hand" in table.section(None)
    scan = {
        "seconds": 20.0,
        "sites": 392,
        "of_sites": 784,
        "share_of_floor": 0.81,
        "forwards_one_by_one_s": 300.0,
        "peak_gib": 21.0,
    }
    steps = {
        "exactness": {"llava": {}, "smolvlm": {"error": "AssertionError: off | by 1"}},
        "qwen2_5_vl": {"head map": scan, "attribution": {"error": "took longer than its 15 s"}},
    }
    about = {"date": "2030-01-02", "device": "G1", "torch": "2.9", "transformers": "5.1", "shape": "full"}
    made = table.section({**about, "steps": steps})
    assert "| Qwen2.5-VL-7B | head map | 392 of 784 | 20.0 | 300 | 0.81 | 21.0 |" in made
    assert "did not run: took longer than its 15 s" in made
    assert "forward each): llava." in made and "- Not so: smolvlm: AssertionError: off / by 1" in made


def test_the_newest_results_of_a_gpu_are_shown(tmp_path: Path) -> None:
    for name, about in {
        "2030-01-01-a": {"device": "A", "shape": "full"},
        "2030-01-02-b": {"device": "B", "shape": "full"},
        "2030-01-03-c": {"device": "C", "shape": "tiny"},
        "2030-01-04-cpu": {"device": "cpu", "shape": "full"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(about))
    found = table.newest(tmp_path)
    assert found is not None and found["device"] == "B"
    assert table.newest(tmp_path / "none") is None


@pytest.mark.slow
def test_the_whole_command_on_a_python_with_no_more_than_the_wheels_it_names(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for wheel in {name for named in needed.WHEELS.values() for name in _brought_along(named.split(">=")[0])}:
        for top in {
            file.parts[0] for file in importlib.metadata.files(wheel) or () if ".." not in file.parts
        }:
            found = importlib.metadata.distribution(wheel).locate_file(top)
            if not (bare / top).exists():
                os.symlink(str(found), bare / top)
    command = [sys.executable, "-S", "-m", "tests.benchmarks.gpu", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(bare), "OMP_NUM_THREADS": "1"}
    lacks = [sys.executable, "-S", "-c", "import nnsight"]
    assert subprocess.run(lacks, env=environment, capture_output=True).returncode
    ran = subprocess.run(
        [*command, "--shape", "tiny", "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (found,) = tmp_path.glob("*-cpu.json")
    steps = json.loads(found.read_text())["steps"]
    assert {group: list(own) for group, own in steps.items()} == {
        group: list(budgets(group, "tiny")) for group in GROUPS
    }


def _brought_along(wheel: str) -> set[str]:
    """A wheel, and all that it requires."""
    found, todo = set(), [wheel]
    while todo:
        name = todo.pop().lower().replace("_", "-")
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            todo += [re.split(r"[\s<>=!~;\[(]", one)[0] for one in required if "extra ==" not in one]
    return found
