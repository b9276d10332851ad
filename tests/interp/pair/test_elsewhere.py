"""Traces that were written elsewhere: read as engines and trainers keep them, aligned, checked, and used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError
from interp.attention import attention_shift
from interp.decision import find_decisions, followed
from interp.knockout.traces import answered_traces
from interp.pair import greedy
from interp.pair.elsewhere import Traces, read_traces, trace_rows
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.questions.examples import Example
from interp.questions.tasks import sample

N = 6


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return sample("sum", N, seed=0, split="map")


@pytest.fixture(scope="module")
def prompts(pair: Pair, asked: list[Example]) -> list[Prompt]:
    return [pair.builder.build(example) for example in asked]


@pytest.fixture(scope="module")
def own(pair: Pair, prompts: list[Prompt]) -> dict[str, list[list[int]]]:
    return {name: greedy(pair.models[name], prompts, 60) for name in ("in", "rl")}


def plain(prompt: Prompt, ids: Sequence[int]) -> str:
    """As engines give text: without special tokens."""
    return prompt.builder.tokenizer.decode(ids, skip_special_tokens=True)


def _ours(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    return {"id": prompt.example.id, "trace_ids": ids}


def _text(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    return {"id": prompt.example.id, "trace": prompt.builder.decode(ids)}


def _vllm(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    """`RequestOutput`, whose prompt holds one placeholder for an image."""
    image = prompt.builder.image_token_id
    before = prompt.ids[: prompt.n_prompt_tokens]
    short = [t for i, t in enumerate(before) if t != image or before[i - 1] != image]
    output = {"index": 0, "text": plain(prompt, ids), "token_ids": ids, "finish_reason": "stop"}
    return {"request_id": "17", "prompt": prompt.prompt_text, "prompt_token_ids": short, "outputs": [output]}


def _openai(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": plain(prompt, ids)}, "finish_reason": "stop"}
    return {
        "id": "batch_req_1",
        "custom_id": prompt.example.id,
        "response": {"status_code": 200, "body": {"choices": [choice]}},
    }


def _sglang(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    meta = {"finish_reason": {"type": "stop", "matched": ids[-1]}}
    return {"question": prompt.example.question, "text": plain(prompt, ids), "meta_info": meta}


def _lm_eval(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    doc = {"id": prompt.example.id, "question": prompt.example.question}
    return {"doc_id": 3, "doc": doc, "resps": [[prompt.builder.decode(ids)]]}


def _verl(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    return {"input": prompt.prompt_text, "output": prompt.builder.decode(ids), "score": 1.0, "step": 7}


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "kind", [_ours, _text, _vllm, _openai, _sglang, _lm_eval, _verl], ids=lambda kind: kind.__name__[1:]
)
def test_whoever_wrote_them_the_tokens_are_the_same(
    kind: Any, prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """In another order, with rows of other questions among them."""
    distinct = {prompt.example.question: i for i, prompt in enumerate(prompts)}
    some = sorted(distinct.values(), reverse=True)
    assert len(some) >= 3
    rows = [kind(prompts[i], own["rl"][i]) for i in some]
    found = read_traces(written(tmp_path / "t.jsonl", rows), [prompts[i] for i in some])
    assert [found.ids[prompts[i].example.id] for i in some] == [tuple(own["rl"][i]) for i in some]
    assert not found.left_out and all(len(set(ids)) > 5 for ids in found.ids.values())


def test_decisions_from_them_are_those_of_ones_own_traces(
    pair: Pair, asked: list[Example], prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    rows = [
        {**_openai(prompt, ids), "model": name}
        for name in ("in", "rl")
        for prompt, ids in zip(prompts, own[name], strict=True)
    ]
    path = written(tmp_path / "both.jsonl", rows)
    given = {name: read_traces(path, prompts, name) for name in ("in", "rl")}
    for choice in ("first", "decisive", "soft"):
        whole = find_decisions(pair, asked, choice, max_new_tokens=60)
        found = find_decisions(pair, asked, choice, max_new_tokens=60, traces=given)
        assert [d.prompt.ids for d in found.decisions] == [d.prompt.ids for d in whole.decisions]
        np.testing.assert_array_equal(found.rl_values, whole.rl_values)
        np.testing.assert_array_equal(found.in_values, whole.in_values)
        assert found.summary()["given_traces"] == {"in": str(path), "rl": str(path)}
        assert "given_traces" not in whole.summary()
    mass = attention_shift(pair, asked, max_new_tokens=60, progress=False)
    again = attention_shift(pair, asked, max_new_tokens=60, progress=False, traces=given)
    np.testing.assert_array_equal(mass["mass"], again["mass"])
    traces = answered_traces(pair.rl, pair.builder, asked, max_new_tokens=60, progress=False)
    assert [p.ids for p in traces[0]] == [
        p.ids for p in answered_traces(pair.rl, pair.builder, asked, given=given["rl"])[0]
    ]


def test_nothing_is_written_where_it_is_given(
    pair: Pair, asked: list[Example], prompts: list[Prompt], own: dict[str, list[list[int]]], monkeypatch: Any
) -> None:
    given = {
        name: Traces({p.example.id: tuple(i) for p, i in zip(prompts, own[name], strict=True)})
        for name in own
    }

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("traces are given")

    for vlm in pair.models.values():
        monkeypatch.setattr(vlm, "generate", never)
    assert len(find_decisions(pair, asked, "first", traces=given)) > 0


def test_how_far_a_model_follows_them_is_told(
    pair: Pair, prompts: list[Prompt], own: dict[str, list[list[int]]]
) -> None:
    """RL its own, wholly; drawn ones less; counted here from Hugging Face's own logits."""
    traces = [p.with_tokens(ids) for p, ids in zip(prompts, own["rl"], strict=True)]
    mine = followed(pair.rl, traces)
    assert mine.n_greedy == N and mine.n_chosen == mine.n_tokens == sum(map(len, own["rl"]))
    drawn = []
    for i, prompt in enumerate(prompts):
        ids = list(own["rl"][i])
        ids[3], ids[7] = ids[7], ids[3]
        drawn.append(prompt.with_tokens(ids))
    expected = 0
    suppressed = list(pair.builder.suppressed_ids)
    for trace in drawn:
        with torch.no_grad():
            logits = pair.rl.model(**trace.inputs).logits[0].clone()
        logits[:, suppressed] = -torch.inf
        first = logits[trace.n_prompt_tokens - 1 : -1].argmax(-1).tolist()
        expected += sum(a == b for a, b in zip(first, trace.trace_ids, strict=True))
    other = followed(pair.rl, drawn)
    assert other.n_chosen == expected < other.n_tokens and other.n_greedy < N
    assert "were sampled" in str(other) and "were sampled" not in str(mine)


BROKEN = {
    "a second reply": (lambda p, ids: [_ours(p, ids), _ours(p, ids[:5])], "row 2 is a second reply"),
    "several replies": (
        lambda p, ids: [{"id": p.example.id, "outputs": [{"text": "a"}, {"text": "b"}]}],
        "holds 2 replies",
    ),
    "ids of another tokenizer": (
        lambda p, ids: [{"id": p.example.id, "token_ids": [10**6]}],
        "token 1000000 is none",
    ),
    "ids and text": (
        lambda p, ids: [{"id": p.example.id, "token_ids": ids, "text": "something else"}],
        "ids are of another tokenizer",
    ),
    "words that are not there": (
        lambda p, ids: [{"id": p.example.id, "text": "Grüße aus Köln"}],
        "not what its tokens say",
    ),
    "an image": (
        lambda p, ids: [{"id": p.example.id, "token_ids": [*ids[:3], p.builder.image_token_id]}],
        "placeholder of an image",
    ),
    "an empty reply": (lambda p, ids: [{"id": p.example.id, "text": ""}], "reply is empty"),
    "another prompt": (
        lambda p, ids: [{**_vllm(p, ids), "id": p.example.id, "prompt_token_ids": p.ids[1:]}],
        "after another prompt: from token 0",
    ),
    "reasoning taken out": (
        lambda p, ids: [
            {"id": p.example.id, "choices": [{"message": {"reasoning_content": "1", "content": "2"}}]}
        ],
        "without --reasoning-parser",
    ),
    "a failed request": (
        lambda p, ids: [{"custom_id": p.example.id, "response": {"body": {"error": {"code": 500}}}}],
        "request failed",
    ),
    "no reply": (lambda p, ids: [{"id": p.example.id, "score": 1}], "no reply in it"),
    "fractions": (lambda p, ids: [{"id": p.example.id, "token_ids": [1.5]}], "whole numbers"),
    "true and false": (lambda p, ids: [{"id": p.example.id, "token_ids": [True]}], "whole numbers"),
    "strangers": (lambda p, ids: [{"id": "someone", "text": "answer 2"}], "'someone'"),
    "stopped at a text": (
        lambda p, ids: [
            {"id": p.example.id, "text": "x", "finish_reason": "stop", "stop_reason": "</answer>"}
        ],
        "stopped at the text '</answer>'",
    ),
    "stopped at a text by SGLang": (
        lambda p, ids: [
            {
                "id": p.example.id,
                "text": "x",
                "meta_info": {"finish_reason": {"type": "stop", "matched": "</a>"}},
            }
        ],
        "stopped at the text '</a>'",
    ),
    "more behind its end": (
        lambda p, ids: [{"id": p.example.id, "token_ids": [*ids, *ids[:3]]}],
        "more stands behind its token",
    ),
    "no object": (lambda p, ids: [[1, 2]], "no JSON objects"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_aligned_is_refused_with_row_and_reason(
    fault: str, prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    make, why = BROKEN[fault]
    rows = make(prompts[0], own["rl"][0])
    with pytest.raises(FrankenlensError, match=why):
        read_traces(written(tmp_path / "t.jsonl", rows), prompts[:1])
    if fault == "no object":
        return
    mixed = [*rows, _ours(prompts[1], own["rl"][1])]
    found = read_traces(written(tmp_path / "m.jsonl", mixed), prompts[:2])
    assert list(found.ids) == [prompts[1].example.id] and prompts[0].example.id in found.left_out
    with pytest.raises(FrankenlensError, match=f"no trace of example '{prompts[0].example.id}'"):
        found.of(prompts[:2])


def test_how_a_reply_ended_is_kept(
    prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Ended, cut off, or nobody says; tokens behind the end and padding are no part of it."""
    (p, q, r, s), ids = prompts[:4], own["rl"]
    end, pad = ids[0][-1], p.builder.pad_id
    assert end in p.builder.end_ids
    rows = [
        {"id": p.example.id, "text": plain(p, ids[0]), "finish_reason": "stop"},
        {"id": q.example.id, "token_ids": ids[1][:5], "finish_reason": "length"},
        {"id": r.example.id, "token_ids": ids[2][:5], "temperature": 0.7},
        {"id": s.example.id, "token_ids": [*ids[3], pad, pad]},
    ]
    found = read_traces(written(tmp_path / "t.jsonl", rows), prompts[:4])
    assert found.ids[p.example.id] == tuple(ids[0])
    assert found.ids[q.example.id] == tuple(ids[1][:5])
    assert found.open_ended == {r.example.id} == found.sampled
    assert found.ids[s.example.id] == tuple(ids[3])


def test_what_one_row_says_does_not_depend_on_the_file(tmp_path: Path) -> None:
    for name, text in {
        "a.json": '[{"id": 1, "text": "x"}, {"id": 2}]',
        "a.csv": "id,text\n1,x\n2,\n",
        "a.jsonl": '{"id": 1, "text": "x"}\n{"id": 2}\n',
    }.items():
        (tmp_path / name).write_text(text)
        rows, failures = trace_rows(tmp_path / name)
        assert [(row.names, row.text) for row in rows] == [(("1",), "x")] and len(failures) == 1


def test_a_row_of_two_questions_is_neithers(
    prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Its id is the one's and its question the other's, as where a server counts requests from 0."""
    one, other = prompts[0], next(p for p in prompts if p.example.question != prompts[0].example.question)
    row = {**_ours(one, own["rl"][0]), "question": other.example.question}
    with pytest.raises(FrankenlensError, match=f"the question of '{other.example.id}'"):
        read_traces(written(tmp_path / "t.jsonl", [row]), [one, other])


def test_traces_longer_than_what_is_written_here_keep_their_room(
    pair: Pair, asked: list[Example], prompts: list[Prompt], own: dict[str, list[list[int]]]
) -> None:
    """Whatever max_new_tokens says, continuations after a token of theirs may be as long as they are."""
    given = {
        name: Traces({p.example.id: tuple(i) for p, i in zip(prompts, own[name], strict=True)})
        for name in own
    }
    seen = [find_decisions(pair, asked, "decisive", max_new_tokens=n, traces=given) for n in (60, 5)]
    assert [d.prompt.ids for d in seen[0].decisions] == [d.prompt.ids for d in seen[1].decisions]
    assert seen[0].excluded == seen[1].excluded


def test_a_row_says_whose_it_is(
    prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """The other model's are left out; of several models' file every row must say."""
    p = prompts[0]
    rows = [{**_ours(p, own[name][0]), "model": name} for name in ("in", "rl")]
    path = written(tmp_path / "both.jsonl", rows)
    assert read_traces(path, [p], "rl").ids[p.example.id] == tuple(own["rl"][0])
    one = written(tmp_path / "rl.jsonl", rows[1:])
    with pytest.raises(FrankenlensError, match="holds no trace of IN"):
        read_traces(one, [p], "in")
    for row in (_ours(p, own["rl"][0]), {**_ours(p, own["rl"][0]), "model": "Qwen/Qwen2.5-VL-7B"}):
        silent = written(tmp_path / "silent.jsonl", [row])
        assert read_traces(silent, [p], "rl").ids
        with pytest.raises(FrankenlensError, match="is given for several models, and row 1 says"):
            read_traces(silent, [p], "rl", several=True)


def test_another_image_with_the_same_question_is_another_question(
    prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    p, ids = prompts[0], own["rl"][0]
    stranger = {"id": "other-99", "question": p.example.question, "trace_ids": ids[:5]}
    found = read_traces(written(tmp_path / "t.jsonl", [_ours(p, ids), stranger]), [p])
    assert found.ids[p.example.id] == tuple(ids)
    with pytest.raises(FrankenlensError, match="other-99"):
        read_traces(written(tmp_path / "s.jsonl", [stranger]), [p])


def test_rows_as_strangers_keep_them(
    prompts: list[Prompt], own: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Padded on the left, once for each filter, beside a question's choices, in a cell of a CSV."""
    p, ids = prompts[0], own["rl"][0]
    pad = p.builder.pad_id
    before = p.ids[: p.n_prompt_tokens]
    for rows in (
        [_ours(p, [pad, pad, *ids])],
        [{**_ours(p, ids), "prompt_token_ids": [pad, pad, *before]}],
        [_lm_eval(p, ids), _lm_eval(p, ids)],
        [{**_ours(p, ids), "choices": ["A", "B"]}],
    ):
        assert read_traces(written(tmp_path / "t.jsonl", rows), [p]).ids[p.example.id] == tuple(ids)
    (tmp_path / "t.csv").write_text(f'id,trace_ids\n{p.example.id},"{ids}"\n')
    assert read_traces(tmp_path / "t.csv", [p]).ids[p.example.id] == tuple(ids)
    (tmp_path / "gap.csv").write_text("id,text\n3,x\n")
    assert trace_rows(tmp_path / "gap.csv")[0][0].names == ("3",)
