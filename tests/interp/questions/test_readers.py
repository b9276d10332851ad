"""JSONL and image folders: what can be read is, what cannot is counted with its row and reason."""

import json

import numpy as np
import pytest
from PIL import Image

from hooks.errors import FrankenlensError
from interp.questions.readers import Fields, read_jsonl


def write(folder, rows) -> str:
    path = folder / "data.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n", encoding="utf-8"
    )
    return str(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.png", "RGBA")):
        Image.new(mode, (6, 4), 90 if mode == "L" else (10, 20, 30, 255)[: len(mode)]).save(
            tmp_path / "images" / name
        )
    return tmp_path


def row(**changes):
    return {"image": "images/a.png", "question": "what ?", "answer": "red"} | changes


def test_rows_become_examples(folder):
    rows = [
        row(id="x", task="colour", reasoning="it is"),
        row(image=["images/a.png", "images/b.png"], question="<image>\n<image> both ?", answer=3),
        row(image=[], question="no image ?"),
        row(image="images/c.png", question="2 < 3 ?\u2028yes"),
    ]
    examples, report = read_jsonl(write(folder, rows))
    assert [e.id for e in examples] == ["x", "2", "3", "4"]
    assert [len(e.images) for e in examples] == [1, 2, 0, 1]
    assert (examples[0].task, examples[0].reasoning) == ("colour", "it is")
    assert (examples[1].question, examples[1].answer) == ("both ?", "3")
    assert all(image.mode == "RGB" for e in examples for image in e.images)
    assert np.asarray(examples[1].images[1])[0, 0].tolist() == [90, 90, 90]
    assert (report.n_rows, report.n_read, report.failures) == (4, 4, ())
    assert str(report).endswith("4 of 4 rows read, 0 failed")


def test_rows_that_cannot_be_read_are_counted_with_the_reason(folder):
    (folder / "images" / "text.png").write_text("no image")
    whole = (folder / "images" / "a.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        folder / "big.png"
    )
    (folder / "images" / "half.png").write_bytes((folder / "big.png").read_bytes()[:3000])
    assert whole
    rows = [
        row(image="images/none.png"),
        row(image="images/text.png"),
        row(),
        row(image=["images/a.png", "images/half.png"]),
        "{not json",
        "[1]",
        row(question="  "),
        {"image": "images/a.png", "question": "what ?"},
        row(question="<image><image> what ?"),
        row(question="what <image> ?"),
        row(question="<image>"),
        row(image=7),
    ]
    examples, report = read_jsonl(write(folder, rows))
    assert [e.meta["row"] for e in examples] == [3]
    assert report.n_rows == 12 and report.n_read == 1 and len(report.failures) == 11
    reasons = {failure.row: failure.reason for failure in report.failures}
    assert list(reasons) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert "none.png does not exist" in reasons[1]
    assert "text.png cannot be read" in reasons[2]
    assert "half.png cannot be read" in reasons[4]
    assert reasons[5].startswith("no JSON") and reasons[6] == "a JSON list, not an object"
    assert reasons[7].startswith("the field 'question'") and reasons[8].startswith("the field 'answer'")
    assert "2 <image> markers and the row 1 images" in reasons[9]
    assert "row 4: image" in str(report) and "1 of 12 rows read, 11 failed" in str(report)


def test_own_names_of_fields_and_another_image_folder(folder, tmp_path):
    path = write(folder, [{"picture": "a.png", "q": "what ?", "label": "red"}])
    examples, _ = read_jsonl(path, folder / "images", Fields(question="q", answer="label", image="picture"))
    assert examples[0].answer == "red" and len(examples[0].images) == 1


def test_a_repeated_id_is_refused_with_both_rows(folder):
    rows = [row(id="x"), row(id="x"), row(id=3), row(), row(id="x"), row(id="6"), row(id=None)]
    examples, report = read_jsonl(write(folder, rows))
    assert [e.id for e in examples] == ["x", "3", "4", "6", "7"]
    why = "the id 'x' is that of row 1, too; give each row an id of its own"
    assert {failure.row: failure.reason for failure in report.failures} == {2: why, 5: why}
    examples, report = read_jsonl(write(folder, [row(), row(id="1")]))
    assert [e.id for e in examples] == ["1#1", "1"] and not report.failures


def test_a_field_that_no_row_has_names_those_there(folder):
    path = write(folder, [{"image": "images/a.png", "question": "what ?", "label": "red"}])
    with pytest.raises(
        FrankenlensError, match=r"'answer' for the answer\. Fields there: image, question, label\."
    ):
        read_jsonl(path)


def test_files_without_rows(folder):
    with pytest.raises(FrankenlensError, match="no such file"):
        read_jsonl(folder / "other.jsonl")
    with pytest.raises(FrankenlensError, match="holds no JSON objects; row 1: no JSON"):
        read_jsonl(write(folder, ["{"]))


def test_questions_without_images_need_no_field_for_them(tmp_path):
    rows = [{"question": "two and two ?", "answer": "4"}, {"question": "one ?", "answer": 1, "task": "count"}]
    examples, report = read_jsonl(write(tmp_path, rows))
    assert [example.images for example in examples] == [(), ()] and not report.failures
    assert [example.answer for example in examples] == ["4", "1"]


@pytest.mark.parametrize(
    "other", [{"img": "x"}, {"image_path": "x"}, {"file": "images/a.PNG"}, {"files": ["a.jpg", "b.jpg"]}]
)
def test_images_under_another_name_are_not_left_out(other, tmp_path):
    rows = [{"question": "what ?", "answer": "red"} | other, {"question": "what ?", "answer": "blue"}]
    with pytest.raises(FrankenlensError, match=f"and {next(iter(other))} looks like images"):
        read_jsonl(write(tmp_path, rows))
