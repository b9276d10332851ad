"""Rows are drawn by seed, halves are of what is asked, and what was looked at is passed over by content."""

from __future__ import annotations

import json
import random

import datasets
import pytest

from experiments.commands import claims
from experiments.commands.claims import ClaimsConfig
from experiments.commands.lockstep import LockstepConfig, load
from experiments.commands.map import MapConfig
from experiments.settings import DataSettings, load_examples, require_sound
from hooks.errors import FrankenlensError
from interp.hypotheses import read_claims
from interp.questions import fingerprint, with_looked_at
from interp.questions.readers import Draw, Seen, read_gsm8k, read_jsonl
from interp.results.files import provenance, save_dataset

ROWS = [{"question": f"what is {i} ?", "answer": str(i)} for i in range(60)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def answers(examples) -> list[str]:
    return [example.answer for example in examples]


def test_rows_are_drawn_by_seed(data):
    first, dropped = load_examples(DataSettings(data, n=20), 0)
    assert answers(first) == answers(load_examples(DataSettings(data, n=20), 0)[0])
    other, _ = load_examples(DataSettings(data, n=20), 1)
    assert answers(first) != answers(other) and answers(first) != [str(i) for i in range(20)]
    assert all(list(map(int, answers(some))) == sorted(map(int, answers(some))) for some in (first, other))
    assert dropped == {"rows not drawn (--n 20)": 40}
    assert set(answers(load_examples(DataSettings(data, n=40), 0)[0])) > set(answers(first))
    assert answers(load_examples(DataSettings(data, n=60), 3)[0]) == [str(i) for i in range(60)]
    drawn = [a for seed in range(200) for a in answers(read_jsonl(data, draw=Draw(3, seed))[0])]
    assert len(set(drawn)) == 60 and max(map(drawn.count, drawn)) < 30  # 10 each, on average
    assert answers(read_jsonl(data, draw=Draw(3))[0]) == ["0", "1", "2"]


def test_halves_are_of_what_is_asked_wherever_it_stands(data, tmp_path):
    explore, dropped = load_examples(DataSettings(data, split="explore"), 0)
    confirm, _ = load_examples(DataSettings(data, split="confirm"), 1)
    assert not set(answers(explore)) & set(answers(confirm)) and len(explore) + len(confirm) == 60
    assert 15 < len(explore) < 45
    assert dropped == {"rows of the other half (--split explore)": len(confirm)}
    shuffled = [row | {"id": str(n)} for n, row in enumerate(random.Random(0).sample(ROWS, 60))]
    (tmp_path / "e.json").write_text(json.dumps(shuffled))
    again, _ = load_examples(DataSettings(tmp_path / "e.json", split="explore"), 5)
    assert set(answers(again)) == set(answers(explore))
    with pytest.raises(FrankenlensError, match="--split is of data: give --data"):
        require_sound(MapConfig(split="explore"))


def test_halves_of_a_public_data_set(tmp_path):
    rows = {"question": [f"{i} ?" for i in range(30)], "answer": [f"#### {i}" for i in range(30)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "g.parquet")
    one, two = (
        read_gsm8k(tmp_path / "g.parquet", draw=Draw(split=half))[0] for half in ("explore", "confirm")
    )
    assert sorted(int(e.answer) for e in [*one, *two]) == list(range(30)) and 5 < len(one) < 25
    assert answers(read_gsm8k(tmp_path / "g.parquet", draw=Draw(5, 0))[0]) != ["0", "1", "2", "3", "4"]
    assert answers(read_gsm8k(tmp_path / "g.parquet", n=2)[0]) == ["0", "1"]


def test_ids_do_not_depend_on_the_draw(tmp_path):
    rows = [
        {"question": f"{i} ?", "answer": str(i), "id": f"x{i}"}
        if i % 2
        else {"question": f"{i} ?", "answer": str(i)}
        for i in range(6)
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    whole = {e.answer: e.id for e in read_jsonl(tmp_path / "d.json")[0]}
    assert [whole[str(i)] for i in (1, 3, 5)] == ["x1", "x3", "x5"] and len(set(whole.values())) == 6
    for seed in range(5):
        assert all(whole[e.answer] == e.id for e in read_jsonl(tmp_path / "d.json", draw=Draw(3, seed))[0])


@pytest.fixture
def looked_at(data, tmp_path):
    """A result on 25 rows, as `frankenlens map` leaves it."""
    import xarray as xr

    examples, _ = load_examples(DataSettings(data, n=25), 0)
    found = with_looked_at(
        xr.Dataset({"effect": ("example", [0.0])}, {"example": [examples[0].id]}), examples
    )
    save_dataset(found, tmp_path / "map.nc", provenance({}, {}, {"examples": 25}, {}))
    text = "found_on: map.nc\nclaims:\n  - {name: one, component: blocks.3.mlp, at_least: 0.1}\n"
    (tmp_path / "c.yaml").write_text(text)
    return examples


def test_claims_and_lockstep_are_asked_what_was_not_looked_at(data, looked_at, tmp_path):
    seen = set(answers(looked_at))
    asked = claims.load(ClaimsConfig(claims=tmp_path / "c.yaml", data=data, n=30, seed=0))
    assert len(asked.examples) == 30 and not seen & set(answers(asked.examples))
    assert asked.left_out["rows looked at when the claims were found"] > 0
    every = claims.load(ClaimsConfig(claims=tmp_path / "c.yaml", data=data, n=240))
    assert set(answers(every.examples)) == {str(i) for i in range(60)} - seen
    reused = claims.load(ClaimsConfig(claims=tmp_path / "c.yaml", data=data, allow_reuse=True))
    assert len(reused.examples) == 60
    moved = load(LockstepConfig(map=tmp_path / "map.nc", data=data, n=35))
    assert set(answers(moved.examples)) == set(answers(every.examples))
    assert moved.left_out == {"rows looked at when the map was made": 25}


def test_where_everything_was_looked_at_the_way_out_is_told(data, looked_at, tmp_path):
    rows = [ROWS[int(example.answer)] for example in looked_at]
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        FrankenlensError, match="all 25 questions were looked at when the claims .*--split explore"
    ):
        claims.load(ClaimsConfig(claims=tmp_path / "c.yaml", data=tmp_path / "seen.jsonl"))


def test_the_row_number_of_another_file_is_no_overlap(data, looked_at, tmp_path):
    """Rows without an id are called by their number; that two files have a row 7 says nothing."""
    others = [{"question": f"what is {i} ?", "answer": str(i)} for i in range(100, 160)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, others)))
    asked = claims.load(ClaimsConfig(claims=tmp_path / "c.yaml", data=tmp_path / "other.jsonl"))
    assert len(asked.examples) == 60
    keys = read_claims(tmp_path / "c.yaml").claims[0].found_on
    assert keys == {fingerprint(example) for example in looked_at}


def test_by_hand_an_id_is_passed_over_too(data):
    examples, report = read_jsonl(data, draw=Draw(n=2, seen=Seen(frozenset({"1", "3"}), "yesterday")))
    assert answers(examples) == ["1", "3"]
    assert report.passed == {"looked at yesterday": 2, "not drawn (--n 2)": 56}
