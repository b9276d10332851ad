"""Files of every kind and encoding: read alike, or one clear error; a bad row costs itself alone."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments.commands.map import COMMAND, MapConfig
from experiments.settings import DataSettings, load_examples, require_sound
from hooks.errors import FrankenlensError
from interp.questions.examples import cluster_of
from interp.questions.readers import Fields, read_jsonl

ROWS = [
    {"question": "Wie groß?", "answer": "5", "task": "größe"},
    {"question": "多少 ?", "answer": "七"},
    {"question": "how many ?", "answer": "6"},
]
WANTED = [("Wie groß?", "5"), ("多少 ?", "七"), ("how many ?", "6")]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8))


def lines(rows) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)


def said(path, **how) -> list[tuple[str, str]]:
    examples, report = read_jsonl(path, **how)
    assert not report.failures
    return [(example.question, example.answer) for example in examples]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_unicode_is_known_by_its_first_bytes(encoding, end, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(lines(ROWS).replace("\n", end).encode(encoding))
    assert said(tmp_path / "d.jsonl") == WANTED


def test_other_encodings_are_named_not_guessed(tmp_path):
    for encoding, wanted in (("gbk", WANTED[1]), ("latin-1", WANTED[0])):
        row = ROWS[WANTED.index(wanted)]
        (tmp_path / "d.jsonl").write_bytes(lines([row, ROWS[2]]).encode(encoding))
        examples, report = read_jsonl(tmp_path / "d.jsonl")
        assert [example.question for example in examples] == ["how many ?"]
        (failure,) = report.failures
        assert (
            failure.row == 1
            and "which is not of the file's encoding (name that: --encoding gbk" in failure.reason
        )
        assert said(tmp_path / "d.jsonl", encoding=encoding) == [wanted, WANTED[2]]
        config = DataSettings(data=tmp_path / "d.jsonl", encoding=encoding)
        assert [e.question for e in load_examples(config, 0)[0]] == [wanted[0], "how many ?"]
    with pytest.raises(FrankenlensError, match="there is no encoding 'gkb'; name one as Python does"):
        read_jsonl(tmp_path / "d.jsonl", encoding="gkb")
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FrankenlensError, match="is not in utf-16, as it begins"):
        read_jsonl(tmp_path / "d.jsonl")


def test_one_table_however_it_is_written(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    (tmp_path / "pretty.json").write_text(json.dumps(ROWS, indent=2))
    for path in tmp_path.iterdir():
        assert said(path) == WANTED, path
        assert [example.task for example in read_jsonl(path)[0]] == ["größe", "", ""]
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert said(tmp_path / "one.json") == WANTED[:1]


def test_parquet_as_datasets_writes_it(tmp_path):
    rows = {
        "problem": ["how red ?", "how blue ?", "how many ?"],
        "solution": [1, 2, 3],
        "images": [[IMAGE], [IMAGE, IMAGE], None],
        "decimals": [1, None, 0],
        "grader": ["number"] * 3,
    }
    features = datasets.Dataset.from_dict({k: v[:1] for k, v in rows.items() if k != "images"}).features
    features |= {"images": datasets.List(datasets.Image())}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(
        FrankenlensError,
        match=r"no row has the field 'question'.*--fields question=NAME .in Python: Fields.question=",
    ):
        load_examples(DataSettings(tmp_path / "d.parquet"), 0)
    named = ("question=problem", "answer=solution", "image=images")
    examples, dropped = load_examples(DataSettings(tmp_path / "d.parquet", fields=named), 0)
    assert [(e.question, e.answer, len(e.images)) for e in examples] == [
        ("how red ?", "1", 1),
        ("how blue ?", "2", 2),
        ("how many ?", "3", 0),
    ]
    assert np.array_equal(np.asarray(examples[1].images[1]), np.asarray(IMAGE)) and not dropped
    assert examples[0].meta["decimals"] == 1 and isinstance(examples[0].meta["decimals"], int)
    assert read_jsonl(tmp_path / "d.parquet", fields=Fields.parse(named))[1].notes == (
        "once: a row has null for an image, and is a question without one",
    )


def test_a_bad_row_costs_itself_alone(tmp_path):
    good = {"question": "?", "answer": "1"}
    deep = "[" * 100_000 + "]" * 100_000
    bad = {
        f'{{"question": "?", "answer": {"1" * 5000}}}': "found a number of 5,000 digits",
        f'{{"question": "?", "answer": "1", "meta": {deep}}}': "nested too deeply to be read",
        '{"question": "?", "answer": "1", "answer": "2"}': "in which the key 'answer' stands twice",
        '{"question": "?", "answer": NaN}': "must hold text, found nan",
        '{"question": "?", "answer": 1e999}': "must hold text, found inf",
        '{"question": "\\ud83d ?", "answer": "1"}': "half of a surrogate pair",
        '{"question": "a\\u0000b", "answer": "1"}': "holds a NUL",
        '{"question": "?", "answer": "1", "id": {"n": 1}}': "'id' must hold text, found {'n': 1}",
        '{"question": "?", "answer": "1", "id": "\\udce9"}': "the byte 0xe9",
        '{"question": "?", "answer": "1", "grader": ["number"]}': "no grader ['number']",
        '{"question": "?", "answer": "1", "grader": "number", "tolerance": NaN}': "and at most 1e+30, found nan",
        '{"question": "?", "answer": "1", "grader": "number", "tolerance": 1e999}': "and at most 1e+30, found inf",
        '{"question": "?", "answer": "1", "grader": "choice", "choices": ["1", "\\ud800"]}': "half of a surrogate",
        '{"question": "?", "answer": {"a": "' + "b" * 533_440 + '"}}': "must hold text, found {'a': 'bbb",
        '{"question": "?", "answer": true}': "must hold text, found True",
        "nothing": "no JSON",
    }
    for keys_in_unread_fields in ({"extra": float("nan")}, {"id": None, "task": None}):
        (tmp_path / "d.jsonl").write_text(lines([good | keys_in_unread_fields]))
        assert said(tmp_path / "d.jsonl") == [("?", "1")]
    (tmp_path / "d.jsonl").write_text(lines([good, *bad, good]))
    examples, report = read_jsonl(tmp_path / "d.jsonl")
    assert [example.id for example in examples] == ["1", str(len(bad) + 2)]
    for failure, reason in zip(report.failures, bad.values(), strict=True):
        assert reason in failure.reason and len(failure.reason) < 420
    array = [row for row in bad if deep not in row and row != "nothing"]
    (tmp_path / "d.json").write_text(f"[{','.join([json.dumps(good), *array])}]")
    examples, report = read_jsonl(tmp_path / "d.json")
    assert (len(examples), len(report.failures)) == (1, len(array))


def test_a_row_without_the_image_of_the_others_is_no_text_question(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    rows = [{"image": "a.png"}, {}, {"image": None}, {"image": []}, {"img": "a.png"}]
    (tmp_path / "d.jsonl").write_text(lines([{"question": "?", "answer": "1"} | row for row in rows]))
    examples, report = read_jsonl(tmp_path / "d.jsonl")
    assert [(e.id, len(e.images)) for e in examples] == [("1", 1), ("3", 0), ("4", 0)]
    assert [failure.row for failure in report.failures] == [2, 5]
    assert "no field 'image', and 3 other rows have; write [] there" in report.failures[0].reason
    assert report.notes == ("once: a row has null for an image, and is a question without one",)


@pytest.mark.parametrize(
    "other", [{"pic": "data:image/png;base64,AA"}, {"seen": {"bytes": "AA", "path": None}}]
)
def test_images_that_would_be_left_out_are_named_as_the_command_line_does(other, tmp_path):
    (tmp_path / "d.jsonl").write_text(lines([{"question": "?", "answer": "1"} | other]))
    name = next(iter(other))
    with pytest.raises(FrankenlensError, match=f"{name} looks like images.*--fields image={name} .in Python"):
        read_jsonl(tmp_path / "d.jsonl")


def test_files_of_no_kind_of_ours(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.json", "w") as archive:
        archive.writestr("d.jsonl", lines(ROWS))
    (tmp_path / "gz.jsonl").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "empty.jsonl").write_text(" \n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    pd.DataFrame({"question": []}).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "head.csv").write_text("question,answer\n")
    (tmp_path / "twice.csv").write_text("question,question\na,b\n")
    (tmp_path / "open.csv").write_text('question,answer\n"a,b\nc,d\n')
    (tmp_path / "scalar.json").write_text("[1, 2]")
    (tmp_path / "deep.json").write_text("[\n" + "[" * 100_000 + "]" * 100_000 + "\n]")
    IMAGE.save(tmp_path / "image.jsonl", "PNG")
    for name, why in {
        "zip.json": "is a zip archive; unpack it",
        "gz.jsonl": "is compressed .gzip.; unpack it",
        "empty.jsonl": "is empty; give JSON lines",
        "cut.parquet": "is no parquet file that can be read",
        "none.parquet": "holds no rows",
        "head.csv": "holds no rows under its columns 'question', 'answer'",
        "twice.csv": "a column is there twice",
        "open.csv": "line 3: no CSV: unexpected end of data",
        "scalar.json": "holds no JSON objects; row 1: a JSON int, not an object",
        "deep.json": "is one JSON array, and nested too deeply to be read; write one object a line",
        "image.jsonl": "holds no JSON objects; row 1: no JSON",
        "nowhere.jsonl": "no such file: .*Give JSON lines",
    }.items():
        with pytest.raises(FrankenlensError, match=why):
            read_jsonl(tmp_path / name)
    with pytest.raises(
        FrankenlensError, match="is a folder; give a file of questions in it: cut.parquet, deep.json"
    ):
        read_jsonl(tmp_path)


def test_rows_of_a_csv_file(tmp_path):
    text = 'question,answer,image,extra\n"two\nlines, one ""cell""",3,,\nshort,1\nlong,1,,,\n?,,,\n'
    (tmp_path / "d.csv").write_text(text)
    examples, report = read_jsonl(tmp_path / "d.csv")
    assert [(e.question, e.answer, e.images) for e in examples] == [('two\nlines, one "cell"', "3", ())]
    assert [(f.row, f.reason) for f in report.failures] == [
        (2, "2 cells under 4 columns"),
        (3, "5 cells under 4 columns"),
        (4, "the field 'answer' must hold text, found None"),
    ]


def test_a_column_without_a_name_says_nothing_of_clusters(tmp_path):
    """What pandas writes in front, an index: rows about one image hang together all the same."""
    other = IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, image in (("a.png", IMAGE), ("b.png", other)):
        image.save(tmp_path / name)
    asked = [{"question": f"how many {i} ?", "answer": "3", "image": f"{'aab'[i]}.png"} for i in range(3)]
    for index in (True, False):
        pd.DataFrame(asked).to_csv(tmp_path / "d.csv", index=index)
        assert (tmp_path / "d.csv").read_text().startswith(",question" if index else "question")
        examples, report = read_jsonl(tmp_path / "d.csv")
        assert not report.failures and [one.cluster for one in examples] == ["", "", ""]
        first, second, third = map(cluster_of, examples)
        assert first == second != third and first.startswith("images ") and third.startswith("images ")


def test_names_of_fields_on_the_command_line(tmp_path):
    (tmp_path / "d.jsonl").write_text(lines(ROWS))
    for fields, why in {
        ("answers=solution",): r"--fields has 'answers=solution'.*Ours are question, .*Did you mean 'answer'",
        ("answer",): "--fields has 'answer'; give each field once, as ours=yours",
        ("answer=a", "answer=b"): "--fields has 'answer=b'; give each field once",
    }.items():
        with pytest.raises(FrankenlensError, match=why):
            require_sound(MapConfig(data=tmp_path / "d.jsonl", fields=fields))
    with pytest.raises(FrankenlensError, match="no row has the field 'group' for the task"):
        load_examples(DataSettings(tmp_path / "d.jsonl", fields=("task=group",)), 0)
    for data in (None, Path("gsm8k")):
        with pytest.raises(FrankenlensError, match="--encoding is of a file of your own"):
            COMMAND.prepare(MapConfig(data=data, encoding="gbk"))
