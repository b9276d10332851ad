"""No raw error and nothing that takes a second: addresses, hooks, grafts, sizes, rows, claims, ledgers, graders.

A few inputs of each kind in the default suite; `make fuzz` tries 2,000 (and FUZZ=N any number).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.commands.map import COMMAND
from experiments.options import from_command_line
from experiments.settings import require_sound
from hooks import Address, HookedVLM
from hooks.memory import parse_bytes
from interp.hypotheses import Claim, Family, read_claims
from interp.hypotheses.ledger import Ledger
from interp.questions import Example, fingerprint
from interp.questions.grading import GRADERS, Grade, judge
from interp.questions.grading.mathematics import TIMEOUT
from interp.questions.readers import read_jsonl
from interp.regions import parse_partition
from interp.sweep import Intervention
from interp.sweep.intervention import KINDS, validate
from interp.transfer import Graft, Recipe
from tests import typechecker
from tests.families import tiny
from tests.fuzz.inputs import answered, anything, fuzzed, numbers, texts, words

FIELDS = (
    "question",
    "answer",
    "image",
    "id",
    "task",
    "reasoning",
    "grader",
    "choices",
    "tolerance",
    "decimals",
    "iou",
)


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Input of wrong types gets to the project's own code."""
    with typechecker.unchecked("tests.fuzz"):
        yield


@pytest.fixture(scope="module")
def vlm() -> HookedVLM:
    made = tiny("llava", 1)
    return HookedVLM(made.model, made.processor, check=False)


@fuzzed
@given(st.one_of(anything, texts, st.lists(words, min_size=1, max_size=8).map(".".join)))
def test_addresses(text: Any) -> None:
    found = answered(lambda: Address.parse(text))
    if found is not None:
        assert Address.parse(str(found)) == found
        answered(lambda: found.hook_name)
        answered(lambda: next(iter(found.expand())))


@fuzzed
@given(st.data())
def test_hook_names(vlm: HookedVLM, data: st.DataObject) -> None:
    known = st.sampled_from(sorted(vlm.hook_points))
    name = data.draw(
        st.one_of(anything, known, st.tuples(known, texts).map("".join), st.lists(known, max_size=3))
    )
    answered(lambda: vlm.names(name))
    answered(lambda: vlm.point(name))  # type: ignore[arg-type]
    hooks = data.draw(
        st.one_of(anything, st.lists(st.tuples(st.one_of(known, anything), anything), max_size=2))
    )
    answered(lambda: vlm._hooks_of(hooks))


@fuzzed
@given(st.data())
def test_interventions(vlm: HookedVLM, data: st.DataObject) -> None:
    where = st.one_of(st.sampled_from(["all", "decision", "image", "answer"]), anything)
    value = st.one_of(
        anything, st.none(), st.lists(st.integers(1, 9), max_size=4).map(lambda shape: torch.ones(shape))
    )
    made = Intervention(
        data.draw(st.one_of(st.sampled_from(sorted(vlm.hook_points)), anything)),
        data.draw(st.one_of(st.sampled_from(KINDS), anything)),
        data.draw(where),
        data.draw(st.one_of(st.none(), st.integers(-2, 9), anything)),
        data.draw(value),
        data.draw(st.one_of(st.none(), where)),
        data.draw(st.one_of(st.none(), anything)),
    )
    answered(lambda: validate(made, vlm, data.draw(st.booleans())))
    answered(lambda: validate(data.draw(anything), vlm, True))


@fuzzed
@given(st.data())
def test_grafts_and_recipes(data: st.DataObject) -> None:
    some = st.one_of(st.just(("blocks.0-1",)), anything)
    form = st.one_of(st.sampled_from(["delta", "low_rank", "random"]), anything)
    given_ = {
        name: data.draw(one)
        for name, one in {"coefficient": anything, "rank": anything, "seed": anything}.items()
    }
    graft = answered(lambda: Graft(data.draw(some), form=data.draw(form), **given_))
    assert graft is None or graft.name
    method = st.one_of(st.sampled_from(["linear", "slerp", "ties", "dare_ties"]), anything)
    names = ("weights", "density", "t", "scale", "normalize", "rescale", "seed")
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=4))
    recipe = answered(lambda: Recipe(data.draw(method), **{name: data.draw(anything) for name in chosen}))
    if recipe is not None:
        answered(lambda: recipe.check(2, True))


@fuzzed
@given(st.one_of(anything, st.from_regex(r"[0-9.]{0,8} ?[KMGT]?i?B?", fullmatch=True)), st.integers(1, 60))
def test_sizes(text: Any, n_layers: int) -> None:
    size = answered(lambda: parse_bytes(text))
    assert size is None or 0 < size < 2**63
    partition = answered(lambda: parse_partition(text, n_layers))
    assert partition is None or partition.n_layers == n_layers


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
raw = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"\xff\xfe", b"null", b"[]", b'{"question": 1e999}']
    ),
)
lines = st.one_of(
    raw,
    st.dictionaries(st.sampled_from(FIELDS), st.one_of(json_values, texts, numbers), max_size=9).map(
        lambda one: (
            json.dumps(one | {"answer": one.get("answer", "3")}, default=str).encode("utf-8", "replace")
            if not any(isinstance(value, int) and abs(value) >= 10**4000 for value in one.values())
            else b'{"question": "q", "answer": ' + b"7" * 5000 + b"}"
        )
    ),
)


@fuzzed
@given(st.lists(lines, max_size=4), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
def test_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], kind: str) -> None:
    path = tmp_path_factory.mktemp("rows") / f"d.{kind}"
    path.write_bytes(b"\n".join([b'{"question": "two and two ?", "answer": "4"}', *rows]))
    found = answered(lambda: read_jsonl(path))
    if found is not None:
        examples, report = found
        assert report.n_read == len(examples) and report.n_rows == report.n_read + len(report.failures)
        assert len({example.id for example in examples}) == len(examples)


yaml_values = st.one_of(
    texts,
    numbers.filter(lambda one: not isinstance(one, int) or abs(one) < 10**300).map(str),
    st.sampled_from(
        [
            "2024-13-45",
            "!!python/object/apply:os.system [ls]",
            "*a",
            "&a [*a]",
            "{[1]: 2}",
            "0x" + "f" * 5000,
            "9" * 5000,
        ]
    ),
    st.sampled_from(
        ["blocks.0", "Late", "reasoning", "weights", "holm", "0.2", "[a, b]", "~", ".nan", ".inf", "1e400"]
    ),
)
claims = st.lists(
    st.dictionaries(
        st.sampled_from(
            [
                *("name", "component", "at_least", "at_most", "role", "alpha", "body", "found_on", "x"),
                *("expected", "n_max"),
            ]
        ),
        yaml_values,
        max_size=6,
    ),
    max_size=3,
)


@fuzzed
@given(
    st.one_of(raw.map(lambda one: one), claims),
    st.dictionaries(st.sampled_from(["alpha", "found_on", "n_max"]), yaml_values),
)
def test_claims_files(tmp_path_factory: pytest.TempPathFactory, some: Any, head: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("claims") / "a.claims.yaml"
    if isinstance(some, bytes):
        path.write_bytes(some)
    else:
        text = "".join(f"{key}: {value}\n" for key, value in head.items()) + "claims:\n"
        for one in some:
            entries = [f"{key}: {value}" for key, value in ({"name": "n"} | one).items()]
            text += "".join(f"  {'- ' if i == 0 else '  '}{entry}\n" for i, entry in enumerate(entries))
        path.write_bytes(text.encode("utf-8", "replace"))
    found = answered(lambda: read_claims(path))
    assert found is None or all(claim.text for claim in found.claims)


@fuzzed
@given(st.data())
def test_claims(data: st.DataObject) -> None:
    names = (
        "at_least",
        "at_most",
        "quantity",
        "body",
        "role",
        "direction",
        "more_than",
        "expected",
        "alpha",
        "found_on",
    )
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=5))
    values: dict[str, Any] = {name: data.draw(anything) for name in chosen} | (
        {"at_least": 0.2} if data.draw(st.booleans()) else {}
    )
    name, component = (
        data.draw(st.one_of(st.just("a"), anything)),
        data.draw(st.one_of(st.just("blocks.0"), anything)),
    )
    found = answered(lambda: Claim(name, component, **values))
    n_max = data.draw(st.one_of(st.none(), numbers, anything))
    answered(lambda: Family("f", (found,) if found else data.draw(anything), data.draw(anything)))
    family = answered(lambda: Family("f", (CLAIM,), n_max=n_max))
    assert family is None or n_max is None or 1 <= family.n_max < 2**53


CLAIM = Claim("a", "blocks.0", at_least=0.2)
ASKED = (Example("1", (), "q", "2"), Example("2", (), "r", "3"))
PROMPTS = [[], [fingerprint(one) for one in ASKED], [fingerprint(ASKED[0])], ["another"]]


def a_look() -> dict[str, Any]:
    """As it is written, of other prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "looks.jsonl"
        Ledger(path).write("p", Family("f", (CLAIM,)), {"a": CLAIM}, ASKED[:1], {"a": "refuted"})
        return json.loads(path.read_text())


LOOK = a_look()
looks = st.tuples(
    st.dictionaries(
        st.sampled_from(list(LOOK)),
        st.one_of(json_values, st.sampled_from([*PROMPTS, "p", "supported", 0.2, 1, 2, 40, 10**400])),
        max_size=3,
    ),
    st.lists(st.sampled_from(list(LOOK)), max_size=1),
).map(
    lambda one: json.dumps({k: v for k, v in (LOOK | one[0]).items() if k not in one[1]}).encode(
        "utf-8", "replace"
    )
)


@fuzzed
@given(st.lists(st.one_of(raw, looks), max_size=4), st.one_of(st.none(), st.integers(1, 40)))
def test_ledgers(tmp_path_factory: pytest.TempPathFactory, some: list[bytes], n_max: int | None) -> None:
    path = tmp_path_factory.mktemp("looks") / "looks.jsonl"
    path.write_bytes(b"\n".join([*some, b""]))
    ledger = answered(lambda: Ledger(path))
    if ledger is None:
        return
    given_ = ("p", Family("f", (CLAIM,), n_max=n_max), {"a": CLAIM}, ASKED)
    found = answered(lambda: ledger.looks(*given_))
    assert found is None or (found["a"].number >= 1 and all(share > 0 for share in found["a"].shares))
    answered(lambda: ledger.write(*given_, {"a": "supported"}))
    assert answered(lambda: Ledger(path)) is not None


@fuzzed
@given(
    st.sampled_from(sorted(set(GRADERS) - {"math"})),
    texts,
    texts,
    st.dictionaries(st.sampled_from(["choices", "tolerance", "decimals", "iou"]), anything, max_size=2),
)
def test_graders(grader: str, answer: str, reference: str, meta: dict[str, Any]) -> None:
    example = Example("1", (), "q", reference, meta={"grader": grader} | meta)
    found = answered(lambda: judge(answer, example))
    assert found is None or (isinstance(found, Grade) and (found.right is not None or found.why))
    answered(
        lambda: judge(answer, Example("1", (), "q", "12", meta={"grader": grader, "choices": ["12", "red"]}))
    )


EXPRESSIONS = (
    r"x 2 10 ^ ^{ } { \frac{ \sqrt{ \sin \pi ( ) [ , ] + - = < \le ! \cdot / | \infty i e \cup \sum_{ _ \int"
)
expressions = st.one_of(texts, st.lists(st.sampled_from(EXPRESSIONS.split()), max_size=14).map(" ".join))


@fuzzed
@given(
    expressions,
    st.one_of(expressions, st.sampled_from(["x^2+1", r"\frac{1}{3}", r"[0, \infty)", "x < 2", "12"])),
)
def test_mathematics(answer: str, reference: str) -> None:
    before = time.monotonic()
    found = answered(lambda: judge(answer, Example("1", (), "q", reference, meta={"grader": "math"})))
    assert found is not None and (found.right is not None or found.why)
    assert time.monotonic() - before < TIMEOUT + 2  # of a process of its own, and a second to end it


OPTIONS = (
    "--in",
    "--rl",
    "--out",
    "--data",
    "--n",
    "--seed",
    "--images",
    "--encoding",
    "--fields",
    "--dtype",
    "--split",
)


@fuzzed
@given(st.dictionaries(st.sampled_from(OPTIONS), st.one_of(texts, st.just("x" * 300))))
def test_command_lines(given_: dict[str, str]) -> None:
    args = [part for name, value in given_.items() for part in (name, value)]

    def read() -> None:
        try:
            config = from_command_line(COMMAND.settings, args, "frankenlens map")
        except SystemExit:  # tyro says what is wrong, on standard error
            return
        require_sound(config)
        COMMAND.check(config)

    answered(read)


def test_a_file_that_waits_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for ask in (lambda: read_jsonl(tmp_path / "fifo"), lambda: read_claims(tmp_path / "fifo")):
        assert answered(ask) is None
