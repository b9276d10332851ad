"""The paper's metrics, sample, prompts and images against its formulas, NumPy and plain counting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments import embedded
from hooks import HookedVLM
from interp.fine_grained import table_2_metrics
from interp.fine_grained.paper import INSTRUCTION, MAX_PIXELS, as_in_paper, resized
from interp.pair.generation import greedy
from interp.prompts import PromptBuilder
from interp.questions.examples import Example
from interp.questions.readers.draw import Draw, take
from interp.questions.tasks import sample
from interp.questions.tasks.description import describe_scene
from interp.transfer import Together, Variant, as_table_2, transfer, transfer_table
from interp.transfer.grafts import Graft

WORDS = "{description} , {question}"
N, TOKENS = 6, 24


@pytest.fixture(scope="module")
def models():
    return tuple(HookedVLM.from_pretrained(embedded.path(name)) for name in ("in", "rl"))


@pytest.fixture(scope="module")
def builder(models):
    return PromptBuilder(models[0].processor)


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Example]]:
    """Questions of their own for each metric, as the paper has them."""

    def described(example: Example) -> Example:
        return replace(example, meta={**example.meta, "description": describe_scene(example)})

    of = {
        "vis": sample("count", N, 0, "map"),
        "v2r": [described(one) for one in sample("exists", N, 1, "map")],
        "rea": [described(one) for one in sample("count", N, 2, "map")],
    }
    texts = [
        replace(
            one, images=(), question=WORDS.format(description=one.meta["description"], question=one.question)
        )
        for one in of["rea"]
    ]
    return {name: [replace(one, task=name) for one in some] for name, some in {**of, "rea": texts}.items()}


def answers(vlm: HookedVLM, builder: PromptBuilder, examples: list[Example]) -> list[bool]:
    """Right or wrong, from generation and string comparison alone."""
    prompts = [builder.build(example) for example in examples]
    written = greedy(vlm, prompts, TOKENS)
    said = [builder.read_trace(p.with_tokens(ids)).answer for p, ids in zip(prompts, written, strict=True)]
    return [answer == example.answer for answer, example in zip(said, examples, strict=True)]


def black(example: Example) -> Example:
    return replace(example, images=tuple(Image.new("RGB", image.size) for image in example.images))


def by_the_formulas(vlm, builder, asked) -> dict[str, list[bool]]:
    """f(i,p)=y and f(b,p)≠y; f(i,p)=y and f(b,d,p)=y; f(p)=y."""
    vis, v2r, rea = asked["vis"], asked["v2r"], asked["rea"]
    told = [
        replace(black(one), question=WORDS.format(description=one.meta["description"], question=one.question))
        for one in v2r
    ]
    seen, unseen = answers(vlm, builder, vis), answers(vlm, builder, [black(one) for one in vis])
    shown, described = answers(vlm, builder, v2r), answers(vlm, builder, told)
    return {
        "M_vis": [a and not b for a, b in zip(seen, unseen, strict=True)],
        "M_v2r": [a and b for a, b in zip(shown, described, strict=True)],
        "M_rea": (text := answers(vlm, builder, rea)),
        "accuracy": [*seen, *shown, *text],
    }


@pytest.fixture(scope="module")
def measured(models, builder, asked):
    metrics = table_2_metrics(builder, asked, template=WORDS, max_new_tokens=TOKENS)
    variants = [Variant("blocks.0-8", (Graft(("blocks.0-8",)),), "order")]
    return metrics, transfer(models[0], models[1], variants, {"": metrics}, progress=False)


def test_the_metrics_are_the_papers_formulas(models, builder, asked, measured) -> None:
    _, found = measured
    moved = 0
    for name, vlm in zip(("IN", "RL"), models, strict=True):
        wanted = by_the_formulas(vlm, builder, asked)
        for metric, right in wanted.items():
            own = found["right"].sel(variant=name).to_numpy()[found["metric"].to_numpy() == metric]
            assert own.tolist() == [float(one) for one in right], (name, metric)
            moved += sum(right)
    assert moved > 6  # not everything is wrong: the formulas have something to tell apart


def test_table_2_has_the_metrics_and_accuracy_stays_a_column(models, builder, asked, measured) -> None:
    _, found = measured
    table = transfer_table(found)
    wanted = {
        name: by_the_formulas(vlm, builder, asked) for name, vlm in zip(("IN", "RL"), models, strict=True)
    }
    for k, metric in enumerate(("M_vis", "M_v2r", "M_rea")):
        for name, own in wanted.items():
            row = table.loc[(table["metric"] == metric) & (table["variant"] == name)].iloc[0]
            assert row["value"] == pytest.approx(np.mean(own[metric]))
            assert row["accuracy"] == pytest.approx(np.mean(own["accuracy"][k * N : (k + 1) * N]))
    wide = as_table_2(table)
    assert wide["metric"].tolist()[:3] == ["M_vis", "M_v2r", "M_rea"]
    assert wide.loc[wide["metric"] == "accuracy", "task"].tolist() == [
        "M_vis",
        "M_v2r",
        "M_rea",
        "all questions",
    ]
    assert wide["RL"].iloc[0] == pytest.approx(100 * np.mean(wanted["RL"]["M_vis"]))


def test_what_is_measured_together_is_kept_together(models, measured, tmp_path) -> None:
    metrics, found = measured
    runs = []

    def counted(vlm):
        runs.append(vlm)
        return metrics.measure(vlm)

    together = {"": Together(metrics.names, counted)}
    first = transfer(models[0], models[1], [], together, keep=tmp_path, progress=False)
    again = transfer(models[0], models[1], [], together, keep=tmp_path, progress=False)
    assert len(runs) == 2  # one run for four metrics of each model, none the second time
    assert first["right"].equals(again["right"])
    assert first["right"].to_numpy().tolist() == found["right"].isel(variant=[0, 1]).to_numpy().tolist()


@pytest.mark.parametrize(("n_rows", "n"), [(400, 100), (7, 5), (5, 5), (3, 100)])
def test_the_sample_is_numpys_legacy_one(n_rows: int, n: int) -> None:
    rows = [(i + 1, i) for i in range(n_rows)]
    taken = take(rows, Draw(n, 123, legacy=True), str, lambda number, row: Example(str(row), (), "q", "1"))
    own = [int(example.id) for example in taken.examples]
    chosen = np.random.RandomState(123).choice(np.arange(n_rows), size=min(n, n_rows), replace=False)
    assert own == sorted(chosen.tolist())
    assert sum(taken.passed.values()) == n_rows - len(own)


def test_the_prompt_asks_step_by_step_and_boxed(builder, asked) -> None:
    one = asked["vis"][0]
    assert INSTRUCTION.endswith("\n\n") and "step by step" in INSTRUCTION and "\\boxed{}" in INSTRUCTION
    own = builder.with_instruction("how many , ").build(one)
    bare = builder.build(one)
    assert own.prompt_text == bare.prompt_text.replace(one.question, f"how many , {one.question}")
    question = [int(i) for i in own.positions("question")]
    assert (
        builder.decode(own.ids[question[0] : question[-1] + 1]).strip() == one.question
    )  # the instruction is none


def test_a_question_of_mathvista_is_bare_with_options_by_letter() -> None:
    meta = {"question": "How wide?", "choices": ("1", "2"), "grader": "choice"}
    image = Image.new("RGB", (2000, 1000), (9, 9, 9))
    own = as_in_paper(Example("1", (image,), "Hint: answer.\nHow wide?", "2", meta=meta))
    assert own.question == "How wide?\n\nChoices:\nA. 1\nB. 2"
    width, height = own.images[0].size
    scale = (MAX_PIXELS / 2_000_000) ** 0.5
    assert (width, height) == (int(2000 * scale), int(1000 * scale)) and width * height <= MAX_PIXELS
    assert resized(Image.new("RGB", (14, 56))).size == (28, 112)
    text = Example("2", (), "What is half of 3?", "1.5")
    assert as_in_paper(text).question == text.question
