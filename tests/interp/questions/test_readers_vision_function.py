"""The vision-function format, on a synthetic sample of it, and on the real one where it lies beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hooks.errors import FrankenlensError
from interp.questions.grading import Ungraded, grade
from interp.questions.readers import FUNCTIONS, read_vision_function, read_vision_functions

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "vision_function_sample"
META = {
    "counting": {"target_answer": "3", "source_answer": "10"},
    "ocr": {"target_text": "spectrum", "source_text": "token"},
    "grounding": {
        "object_name": "red circle",
        "target_bbox_xyxy": [28, 27, 36, 34],
        "source_bbox_xyxy": [1, 2, 8, 8],
        "iou_threshold": 0.5,
    },
    "recognition": {"target_answer": "Yes", "source_answer": "No"},
}


def row(function: str, n: int = 0, meta: dict | None = None, **changes) -> dict:
    name = f"{function}_{n:06}"
    return {
        "id": name,
        "task": function,
        "target_image": f"images/{name}_t.png",
        "source_image": f"images/{name}_s.png",
        "prompt": "<image>What is it?",
        "meta": META[function] | (meta or {}),
    } | changes


def write(folder: Path, function: str, rows: list[dict]) -> Path:
    (folder / function / "images").mkdir(parents=True, exist_ok=True)
    for one in rows:
        for side in ("target", "source"):
            image = Image.new("RGB", (40, 40), "grey")
            if side == "target":
                image.paste("red", (3, 3, 9, 9))
            image.save(folder / function / one[f"{side}_image"])
    path = folder / function / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_pairs_of_every_function_score_answers_for_target_and_source(tmp_path):
    for function in FUNCTIONS:
        write(tmp_path, function, [row(function)])
    pairs, reports = read_vision_functions(tmp_path)
    said = {
        "counting": ("There are 3.", "10"),
        "ocr": ("Spectrum", "token."),
        "grounding": ("28,27,36,33", '{"bbox_2d": [1, 2, 8, 9]}'),
        "recognition": ("Yes, there is", "no"),
    }
    for function in FUNCTIONS:
        ((target, source),) = pairs[function]
        assert target.question == source.question == "What is it?"
        assert (target.task, target.id, source.id) == (
            function,
            f"{function}_000000",
            f"{function}_000000-source",
        )
        assert target.images[0].getpixel((5, 5)) == (255, 0, 0) != source.images[0].getpixel((5, 5))
        right = [[grade(answer, side) for side in (target, source)] for answer in said[function]]
        assert right == [[True, False], [False, True]]
        assert reports[function].n_read == 1 and reports[function].failures == ()


def test_grounding_is_scored_by_overlap_with_the_sources_own_box(tmp_path):
    boxes = {"target_bbox_xyxy": [0, 0, 10, 10], "source_bbox_xyxy": [20, 20, 30, 30]}
    ((_, source),), _ = read_vision_function(write(tmp_path, "grounding", [row("grounding", meta=boxes)]))
    assert not grade("20,20,30,25", source)  # half of it: IoU 0.5 is not above 0.5
    assert grade("20,20,30,26", source)
    assert not grade("0,0,10,10", source)


def test_pairs_that_can_show_no_change_are_left_out_with_the_reason_or_kept_with_a_note(tmp_path):
    same = {"target_text": "token", "source_text": "Token"}
    path = write(tmp_path, "ocr", [row("ocr"), row("ocr", 1, same), row("ocr", 2)])
    pairs, report = read_vision_function(path)
    assert [target.id for target, _ in pairs] == ["ocr_000000", "ocr_000002"]
    assert [(f.row, f.reason) for f in report.failures] == [(2, "both images have the same answer, 'token'")]
    pairs, report = read_vision_function(path.parent, distinct=False)
    assert len(pairs) == 3 and "1 pairs have one answer that is right for both images" in str(report)

    near = {"target_bbox_xyxy": [29, 13, 38, 25], "source_bbox_xyxy": [30, 13, 38, 25]}
    _, report = read_vision_function(
        write(tmp_path, "grounding", [row("grounding"), row("grounding", 1, near)])
    )
    assert report.failures[0].reason == "the boxes of both images overlap: 29,13,38,25 and 30,13,38,25"


def test_what_holds_of_all_rows_is_told(tmp_path):
    _, report = read_vision_function(
        write(tmp_path, "recognition", [row("recognition", n) for n in range(3)])
    )
    assert report.notes == (
        "every target has the same answer, 'Yes'",
        "every source has the same answer, 'No'",
        "3 of 3 source images are blank",
    )


def test_rows_that_cannot_be_read_are_counted(tmp_path):
    rows = [
        row("counting"),
        row("counting", 1, {"target_answer": "some"}),
        row("counting", 2, {"source_answer": None}),
        row("counting", 3, prompt="what <image> ?"),
        row("counting", 4, task="smelling"),
        row("counting", 5),
        row("counting", 0),
    ]
    path = write(tmp_path, "counting", rows)
    (path.parent / "images" / "counting_000005_s.png").unlink()
    pairs, report = read_vision_function(path)
    assert [target.id for target, _ in pairs] == ["counting_000000"]
    reasons = {failure.row: failure.reason for failure in report.failures}
    assert list(reasons) == [2, 3, 4, 5, 6, 7] and report.n_rows == 7
    assert reasons[7].startswith("the id 'counting_000000' is that of row 1, too")
    assert "'some' cannot be read as a number" in reasons[2]
    assert "'source_answer' must hold text" in reasons[3]
    assert "not one of counting, ocr" in reasons[5] and "does not exist" in reasons[6]


def test_nothing_to_read_is_one_error(tmp_path):
    with pytest.raises(FrankenlensError, match="no such file"):
        read_vision_functions(tmp_path)
    with pytest.raises(FrankenlensError, match="no visual function 'reading', only counting, ocr"):
        read_vision_functions(tmp_path, ["reading"])
    path = write(tmp_path, "counting", [row("counting", meta={"target_answer": "10"})])
    with pytest.raises(FrankenlensError, match="no row of .* can be read; row 1: both images have the same"):
        read_vision_function(path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sample does not lie beside the repository")
def test_the_real_sample():
    pairs, reports = read_vision_functions(REAL)
    assert {name: len(some) for name, some in pairs.items()} == {
        "counting": 8,
        "ocr": 8,
        "grounding": 7,
        "recognition": 8,
    }
    assert reports["grounding"].failures[0].row == 3  # IoU of its two boxes: 4200 / 6312
    assert "8 of 8 source images are blank" in reports["recognition"].notes
    for some in pairs.values():
        for target, source in some:
            assert "<image>" not in target.question and target.question == source.question
            try:
                assert [grade(target.answer, one) for one in (target, source)] == [True, False]
            except Ungraded as error:
                pytest.fail(str(error))
