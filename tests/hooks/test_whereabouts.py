"""Paths that are not there: said as what they are, with what is there and what to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooks import FrankenlensError, HookedVLM
from hooks.loading import load_model
from hooks.processors import load_processor
from hooks.whereabouts import looks_like_path, require_checkpoint, require_file, require_folder
from interp.comparison import Checkpoint
from interp.pair.pair import Pair

LOADERS = {
    "HookedVLM": HookedVLM.from_pretrained,
    "model": load_model,
    "processor": load_processor,
    "IN": lambda path: Pair.from_pretrained(path, path),
    "files": Checkpoint,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_checkpoint_that_is_not_there_is_no_such_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    path = tmp_path / "checkpoint-10" / "deeper"
    with pytest.raises(FrankenlensError) as refused:
        LOADERS[name](str(path))
    said = str(refused.value)
    assert said.startswith(
        f"no such folder: {path}. The nearest folder that exists is {tmp_path}. Did you mean"
    )
    assert "'checkpoint-100'" in said and "config.json" in said and "processor" not in said


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "files"])
def test_a_repository_that_is_not_in_the_cache(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for offline in ("huggingface_hub.constants.HF_HUB_OFFLINE", "transformers.utils.hub.is_offline_mode"):
        monkeypatch.setattr(offline, True if offline.endswith("OFFLINE") else lambda: True)
    with pytest.raises(FrankenlensError) as refused:
        LOADERS[name]("nobody/nothing")
    said = str(refused.value)
    assert said.startswith("no such folder: nobody/nothing (the nearest that exists is")
    assert "no copy of it in the cache" in said and "hf download nobody/nothing" in said
    assert "processor" not in said and len(said.splitlines()) == 1


def test_rl_and_base_are_looked_for_before_in_is_loaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(HookedVLM, "from_pretrained", None)  # nothing is loaded
    absent = str(tmp_path / "absent")
    for given in ((str(tmp_path), absent), (str(tmp_path), str(tmp_path), absent)):
        with pytest.raises(FrankenlensError, match="no such folder: .*absent"):
            Pair.from_pretrained(*given)


def test_which_names_can_be_a_repository() -> None:
    assert not any(map(looks_like_path, ("gpt2", "Qwen/Qwen2.5-VL-3B-Instruct", "a-b_c.d/e", "out/in")))
    assert all(
        map(looks_like_path, ("/in", "./in", "../in", "~/in", "out/run/in", "out/", r"C:\in", "a b", ""))
    )


def test_files_and_folders_and_one_for_the_other(tmp_path: Path) -> None:
    (file := tmp_path / "rows.jsonl").write_text("{}")
    require_file(file, "a file")
    require_folder(tmp_path, "a folder")
    require_checkpoint("nobody/nothing")
    for refuse, path, said in (
        (require_file, tmp_path, "is a folder, not a file; give the rows"),
        (require_folder, file, "is a file, not a folder; give the rows"),
        (require_file, tmp_path / "row.jsonl", r"no such file: .*row\.jsonl \(--data\)\. .*'rows\.jsonl'"),
        (require_folder, Path("~/in"), "~ is not read here"),
        (require_file, file / "x", "The nearest folder that exists is"),
    ):
        with pytest.raises(FrankenlensError, match=said):
            refuse(path, "the rows", "--data")
    with pytest.raises(FrankenlensError, match="is a file, not a folder"):
        require_checkpoint(str(file))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrankenlensError, match="It holds nothing"):
        require_file(tmp_path / "empty" / "a", "the rows")
