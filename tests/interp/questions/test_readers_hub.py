"""MathVista, MATH-500 and GSM8K on small local data sets with their true columns; what is missing is one error."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from experiments import settings
from experiments.settings import DataSettings, load_examples
from hooks.errors import FrankenlensError
from interp.questions.grading import grade
from interp.questions.readers import read_gsm8k, read_jsonl, read_math500, read_mathvista


def vista(pid: int, answer: str, **changes) -> dict:
    return {
        "pid": str(pid),
        "question": "How wide?",
        "image": f"images/{pid}.jpg",
        "decoded_image": Image.fromarray(np.full((4, 6, 3), pid, dtype=np.uint8)),
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"category": "general-vqa", "task": "figure question answering", "source": "made"},
        "query": f"Hint: Please answer.\nQuestion: How wide is {pid}?",
    } | changes


ROWS = [
    vista(1, "3"),
    vista(2, "1.2", answer_type="float", precision=1.0),
    vista(3, "145°", question_type="multi_choice", answer_type="text", choices=["135°", "145°"]),
    vista(
        4,
        "[0, 2, 8]",
        answer_type="list",
        metadata={"category": "math-targeted-vqa", "task": "t", "source": "s"},
    ),
    vista(5, "none of them", question_type="multi_choice", answer_type="text", choices=["a b", "c d"]),
    vista(6, "7", decoded_image=None),
    vista(7, "Paris", answer_type="text"),
]


@pytest.fixture
def vistas(tmp_path) -> Path:
    features = datasets.Dataset.from_list(ROWS[:1]).features | {
        "choices": datasets.List(datasets.Value("string")),
        "precision": datasets.Value("float64"),
        "unit": datasets.Value("string"),
        "decoded_image": datasets.Image(),
    }
    rows = datasets.Dataset.from_list(ROWS, features=datasets.Features(features))
    datasets.DatasetDict({"testmini": rows}).save_to_disk(str(tmp_path / "vista"))
    return tmp_path / "vista"


def test_mathvista(vistas):
    examples, report = read_mathvista(vistas)
    assert [e.id for e in examples] == [f"mathvista-{i}" for i in (1, 2, 3, 4, 7)]
    assert [e.meta["grader"] for e in examples] == ["number", "number", "choice", "math", "text"]
    assert [e.task for e in examples] == ["general-vqa"] * 3 + ["math-targeted-vqa", "general-vqa"]
    assert examples[0].question == "Hint: Please answer.\nQuestion: How wide is 1?"
    assert examples[0].images[0].size == (6, 4) and examples[0].images[0].getpixel((0, 0)) == (1, 1, 1)
    said = [("3", "5"), ("1.24", "1.3"), ("(B)", "(A)"), ("[0,2,8]", "[0,2,9]"), ("paris.", "Rome")]
    for example, (right, wrong) in zip(examples, said, strict=True):
        assert grade(right, example) and not grade(wrong, example)
    assert [(f.row, f.reason.split(",")[0]) for f in report.failures] == [
        (5, "the reference 'none of them' is none of the options a b"),
        (6, "the field 'decoded_image' holds no image"),
    ]
    assert (report.n_rows, report.n_read) == (7, 5)


def test_a_category_and_the_first_n(vistas):
    examples, report = read_mathvista(str(vistas), category="math-targeted-vqa")
    assert [e.id for e in examples] == ["mathvista-4"] and report.n_rows == 1
    assert len(read_mathvista(vistas, n=2)[0]) == 2
    with pytest.raises(FrankenlensError, match="no row of the category 'other' can be read"):
        read_mathvista(vistas, category="other")


def test_math500_from_a_json_file(tmp_path):
    rows = {
        "problem": ["Find x.", "Name it."],
        "solution": [r"It is $\boxed{\frac{1}{2}}$.", "?"],
        "answer": [r"\frac{1}{2}", "$$"],
        "subject": ["Algebra", "Algebra"],
        "level": [2, 3],
        "unique_id": ["test/algebra/1.json", "test/algebra/2.json"],
    }
    datasets.Dataset.from_dict(rows).to_json(str(tmp_path / "test.jsonl"))
    (example,), report = read_math500(tmp_path / "test.jsonl")
    assert (example.id, example.images, example.question) == ("math-500-test/algebra/1.json", (), "Find x.")
    assert example.meta["subject"] == "Algebra" and example.reasoning == rows["solution"][0]
    assert grade("0.5", example) and not grade("2", example)
    assert "cannot be read as mathematics" in report.failures[0].reason


def test_gsm8k_from_a_parquet_file(tmp_path):
    answers = ["She sells 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "Many.\n#### 1,018", "no result"]
    rows = {"question": ["How much?", "How many?", "What?"], "answer": answers}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "test.parquet"))
    examples, report = read_gsm8k(tmp_path / "test.parquet")
    assert [e.answer for e in examples] == ["18", "1,018"]
    assert examples[0].reasoning == "She sells 9 * 2 = $18 a day." and examples[0].images == ()
    assert grade("The answer is $18.00.", examples[0]) and not grade("8", examples[0])
    assert grade("1018", examples[1]) and not grade("18", examples[1])
    assert report.failures[0].reason == "the field 'answer' has no '#### result'"


def test_what_cannot_be_loaded_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FrankenlensError, match="'some-one/no-such-data' .split 'test'. cannot be loaded.*local copy"
    ):
        read_gsm8k("some-one/no-such-data")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(FrankenlensError, match="give a file of the kind .parquet"):
        read_gsm8k(tmp_path / "x.txt")
    datasets.Dataset.from_dict({"question": ["?"], "result": ["1"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(FrankenlensError, match="no column answer; there are question, result"):
        read_gsm8k(tmp_path / "other")
    datasets.Dataset.from_dict({"question": ["?"], "answer": ["1"]}).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(FrankenlensError, match="no row can be read; row 1: the field 'answer' has no"):
        read_gsm8k(tmp_path / "bad")


def test_the_command_line_names_public_data(vistas, monkeypatch):
    monkeypatch.setattr(settings, "read_mathvista", lambda **given: read_mathvista(vistas, **given))
    examples, dropped = load_examples(DataSettings(data=Path("mathvista:general-vqa"), n=3), 0)
    ids = [e.id for e in examples]
    assert len(ids) == 3 and ids == sorted(ids) and set(ids) < {f"mathvista-{i}" for i in (1, 2, 3, 5, 7)}
    assert sum(dropped.values()) == 6 - 3  # one is of the other category
    _, dropped = load_examples(DataSettings(data=Path("mathvista"), n=9), 0)
    assert len(dropped) == 2 and all(reason.startswith("row ") for reason in dropped)
    with pytest.raises(FrankenlensError, match="MathVista has general-vqa, math-targeted-vqa, no 'vqa'"):
        load_examples(DataSettings(data=Path("mathvista:vqa")), 0)
    with pytest.raises(FrankenlensError, match="no such file"):
        load_examples(DataSettings(data=Path("nowhere.jsonl")), 0)


def test_a_row_of_a_jsonl_file_names_its_grader(tmp_path):
    rows = [
        '{"question": "?", "answer": "cat", "image": [], "grader": "choice", "choices": ["dog", "cat"]}',
        '{"question": "?", "answer": "1,018", "image": [], "grader": "number", "description": "a sum"}',
        '{"question": "?", "answer": "cat", "image": [], "grader": "choice", "choices": ["dog", "cow"]}',
        '{"question": "?", "answer": "cat", "image": [], "grader": "wise"}',
        '{"question": "?", "answer": "5", "image": [], "grader": "number", "tolerance": "some"}',
        '{"question": "?", "answer": "cat", "image": [], "grader": "choice", "choices": "cat"}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    examples, report = read_jsonl(tmp_path / "d.jsonl")
    assert (
        grade("B", examples[0]) and grade("1018", examples[1]) and examples[1].meta["description"] == "a sum"
    )
    assert "none of the options dog, cow" in report.failures[0].reason
    assert report.failures[1].reason.startswith("there is no grader 'wise', only exact")
    assert "settings of the grader 'number' cannot be read" in report.failures[2].reason
    assert report.failures[3].reason == "the choices must be a list of texts, found 'cat'"
