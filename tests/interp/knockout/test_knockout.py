"""Attention knockout against attention masks, teacher forcing, eager hooks written here and the sweep engine."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError, HookedVLM
from interp.decision.controls import position_ids
from interp.knockout import (
    Knockout,
    around,
    before_answer,
    before_reasoning,
    greedy_knockout,
    knocked_out,
    knockout_effects,
    knockout_hooks,
    patch_centres,
    region,
    singles,
    suffixes,
    windows,
)
from interp.knockout.attached import _implementation
from interp.knockout.places import BEFORE, Unfolding, place_mask
from interp.knockout.routes import up_to_the_answer
from interp.lens.tables import answer_position
from interp.metrics import AnswerLogProbability, LogitDifference, TraceLogLikelihood
from interp.pair.generation import plain_greedy
from interp.prompts import PromptBuilder, collate
from interp.prompts.reading import TraceReader
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.sweep import Intervention, sweep
from tests.families import FAMILIES, tiny

QUESTIONS = ("how many red", "what shape in row 2 is there", "what color is the star")
TRACES = (
    "<think> red 3 , blue 2 </think> answer 5",
    "<think> red </think> answer 2",
    "<think> 3 </think> answer 4 1",
)
TEXT = ("question", "template", "reasoning", "answer")


class Opened:
    """A tiny model, its prompts of different lengths and images, with traces."""

    def __init__(self, family: str) -> None:
        self.given = tiny(family)
        self.vlm = HookedVLM(self.given.model, inputs=self.given.inputs())
        self.builder = PromptBuilder(self.given.processor, TraceFormat(answer=("answer", None)))
        images = self.given.images(4)
        shown = [(images[0],), (images[1],), (images[2], images[3])]
        self.examples = [Example(f"e{i}", shown[i], QUESTIONS[i], "5") for i in range(3)]
        self.prompts = [self.builder.build(e, t) for e, t in zip(self.examples, TRACES, strict=True)]


_OPENED: dict[str, Opened] = {}


def opened(family: str) -> Opened:
    if family not in _OPENED:
        _OPENED[family] = Opened(family)
    return _OPENED[family]


@torch.no_grad()
def run(vlm: HookedVLM, inputs, hooks=()) -> torch.Tensor:
    return vlm.run_with_hooks(inputs, hooks, use_cache=False).logits


@torch.no_grad()
def cut_logits(vlm: HookedVLM, cut, batch) -> torch.Tensor:
    with knocked_out(vlm, cut, batch):
        return vlm(batch.inputs, use_cache=False).logits


def allowed(logits: torch.Tensor) -> float:
    return 1e-5 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_edge_from_image_to_text_is_the_image_hidden_by_the_attention_mask(family: str) -> None:
    """The keys of the image masked for everyone, positions as in the unmasked run; the text sees no difference."""
    given = opened(family)
    for prompt in given.prompts:
        batch = collate([prompt])
        inputs = dict(batch.inputs)
        image, text = batch.mask("image"), ~batch.mask("image")
        positions = position_ids(given.vlm.model, inputs)
        hidden = inputs | {"attention_mask": (inputs["attention_mask"].bool() & ~image).long()}
        with torch.no_grad():
            expected = given.vlm(hidden | {"position_ids": positions}, use_cache=False).logits
            clean = given.vlm(inputs, use_cache=False).logits
        cut = Knockout("image", TEXT)
        for got in (
            cut_logits(given.vlm, cut, batch),
            run(given.vlm, inputs, knockout_hooks(given.vlm, cut, batch)),
        ):
            assert (got - expected)[text].abs().max() <= allowed(expected)
        assert (clean - expected)[text].abs().max() > 100 * allowed(expected)


CUTS = {
    "roles": Knockout("image", "question", (0, 1)),
    "reasoning": Knockout("question", "reasoning"),
    "decision": Knockout(("image", "question"), "decision", (1, 2)),
    "before answer": Knockout("image", "before answer"),
    "before reasoning": Knockout("question", "before reasoning", {0, 2}),
    "heads": Knockout("image", ("reasoning", "answer"), 1, heads=(0, 3)),
    "lost": Knockout("question", "all", (1, 2), mass="lost"),
    "lost head": Knockout("all", ("reasoning", "decision"), heads=(2,), mass="lost"),
    "written": Knockout("reasoning", ("reasoning", "answer")),
    "position": Knockout(0, 36),
    "several": (Knockout("image", "reasoning"), Knockout("question", "decision", 2, mass="lost")),
}


CASES = [("qwen2_5_vl", name) for name in CUTS] + [(family, "several") for family in FAMILIES]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_generation_with_a_cache_is_one_teacher_forced_pass(family: str, name: str) -> None:
    given, cut, n = opened(family), CUTS[name], 12
    prompts = [prompt.truncated(prompt.n_prompt_tokens + 1) for prompt in given.prompts]
    batch = collate(prompts, "left")
    words = given.builder.encode("red 3 </think> answer 5 , red answer") * 2
    forced = [words[i:] + words[:i] for i in (0, 3, 1)]  # what is written, whatever the model would choose

    def choose(batch_id: int, ids: torch.Tensor) -> list[int]:
        return [forced[batch_id][len(ids) - batch.roles.shape[1]]]

    with (
        torch.no_grad(),
        plain_greedy(given.vlm.model, [], given.builder.pad_id),
        knocked_out(given.vlm, cut, batch, generating=True) as cutting,
    ):
        out = given.vlm.generate(
            batch.inputs, max_new_tokens=n, prefix_allowed_tokens_fn=choose, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    stepwise = torch.stack(out.logits, dim=1)
    whole = collate([p.with_tokens(ids[:n]) for p, ids in zip(prompts, forced, strict=True)], "left")
    assert torch.equal(out.sequences, whole.inputs["input_ids"])
    start = batch.roles.shape[1]
    if name in (
        "decision",
        "lost head",
        "several",
    ):  # while generating: every token whose next one is decided

        def written(some):
            mask = torch.zeros_like(some.roles, dtype=torch.bool)
            mask[:, start - 1 :] = True
            return mask

        def swapped(one):
            parts = one.target if isinstance(one.target, tuple) else (one.target,)
            return replace(one, target=tuple(written if part == "decision" else part for part in parts))

        cut = tuple(map(swapped, cut)) if isinstance(cut, tuple) else swapped(cut)
    expected = run(given.vlm, whole.inputs, knockout_hooks(given.vlm, cut, whole))[:, start - 1 : -1]
    assert (stepwise - expected).abs().max() <= allowed(expected)
    clean = run(given.vlm, whole.inputs)[:, start - 1 : -1]
    assert (clean - expected).abs().max() > 100 * allowed(expected)
    edges = sum(
        Unfolding(whole, (p.source, p.target)).edges(p.source, p.target)[:, :-1].flatten(1).sum(1)
        for p in (cut if isinstance(cut, tuple) else (cut,))
    )
    assert torch.equal(cutting.n_edges, torch.as_tensor(edges))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ("left", "right"))
def test_a_mask_stays_on_sdpa_and_is_the_dense_way(family: str, side) -> None:
    given = opened(family)
    batch = collate(given.prompts, side)
    attentions: list[Any] = [given.vlm.module(block.attention) for block in given.vlm.anatomy.text.blocks]
    real = batch.mask("all")
    for cut in (Knockout("image", "question", (0, 1)), Knockout("question", "decision", 2, heads=(1,))):
        seen: list[str] = []
        handles = [
            module.register_forward_hook(lambda m, *_, seen=seen: seen.append(m.config._attn_implementation))
            for module in attentions
        ]
        got = cut_logits(given.vlm, cut, batch)
        for handle in handles:
            handle.remove()
        assert seen == ["sdpa"] * len(attentions)
        dense = run(given.vlm, batch.inputs, knockout_hooks(given.vlm, cut, batch))
        assert (got - dense)[real].abs().max() <= allowed(dense)
        assert (got - run(given.vlm, batch.inputs))[real].abs().max() > 100 * allowed(dense)
    lost = Knockout("image", "question", 1, mass="lost")
    with knocked_out(given.vlm, lost, batch):
        assert [m.config._attn_implementation for m in attentions] == ["sdpa", "frankenlens", "sdpa"]
        assert {_implementation(m) for m in attentions} == {"sdpa"}


def test_lost_mass_is_the_zeroed_pattern_and_renormalized_is_divided_by_what_is_left() -> None:
    """Patterns read inside the run against the clean pattern of the same layer."""
    given = opened("qwen2_5_vl")
    batch, name = collate(given.prompts[:1]), "blocks.0.attn.hook_pattern"
    source, target = batch.mask("image")[0], batch.mask("question")[0]
    with torch.no_grad():
        clean = given.vlm.run_with_cache(batch.inputs, name)[1][name][0]
        for mass in ("lost", "renormalized"):
            with knocked_out(given.vlm, Knockout("image", "question", 0, mass=mass), batch):
                got = given.vlm.run_with_cache(batch.inputs, name)[1][name][0]
            kept = clean * ~(target[:, None] & source[None])
            expected = kept if mass == "lost" else kept / kept.sum(-1, keepdim=True)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (clean[:, target][:, :, source].sum(-1) > 1e-3).all()


METRICS = (
    AnswerLogProbability(),
    TraceLogLikelihood(),
    LogitDifference(torch.arange(3) + 30, torch.arange(3) + 40),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_one_full_pass_per_cut_and_prompt(family: str) -> None:
    """Plain hooks on the scores of one unpadded prompt at a time."""
    given = opened(family)
    cuts = [
        *(cut for name, cut in CUTS.items() if name != "position"),
        *windows(Knockout("image", "reasoning"), 3, 2),
        *singles(Knockout("question", "answer"), 3),
        Knockout("all", "decision"),
        Knockout(0, -4, 1),
    ]
    found = []
    for metric in METRICS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(
                knockout_effects(given.vlm, given.prompts, cuts, metric, batch_size=2, progress=False)
            )
    assert found[0]["value"].dims == ("cut", "example")
    moved = []
    for row, prompt in enumerate(given.prompts):
        batch = collate([prompt])
        for number, cut in enumerate(cuts):
            logits = run(given.vlm, batch.inputs, _plain(given.vlm, cut, batch))
            for one, metric in zip(found, METRICS, strict=True):
                expected = float(metric.select([row])(logits, batch)[0])
                terms = len(prompt.trace_ids) if isinstance(metric, TraceLogLikelihood) else 2
                assert abs(float(one["value"][number, row]) - expected) <= terms * allowed(logits), (cut, row)
                moved.append(abs(expected - float(one["clean"][row])) / (terms * allowed(logits)))
    assert np.median(moved) > 100


def _plain(vlm, cut, batch):
    """Query by query and key by key."""
    hooks = []
    for one in cut if isinstance(cut, tuple) else (cut,):
        keys, queries = (place_mask(p, batch)[0].nonzero()[:, 0].tolist() for p in (one.source, one.target))

        def write(square, hook, one=one, keys=keys, queries=queries):
            out = square.clone()
            for head in range(out.shape[1]) if one.heads is None else one.heads:
                for query in queries:
                    for key in keys:
                        if key <= query:
                            out[0, head, query, key] = 0.0 if one.mass == "lost" else -torch.inf
            return out

        leaf = "hook_pattern" if one.mass == "lost" else "hook_attn_scores"
        hooks += [(f"blocks.{layer}.attn.{leaf}", write) for layer in one.layers_in(vlm.n_layers)]
    return hooks


def test_one_layer_is_what_the_sweep_says() -> None:
    given = opened("qwen3_vl")
    cuts = [Knockout("image", "reasoning", 1), Knockout("question", "decision", 2, heads=(3,))]
    wanted = [
        Intervention("blocks.1.attn.hook_attn_scores", "knockout", "reasoning", source="image"),
        Intervention("blocks.2.attn.hook_attn_scores", "knockout", "decision", 3, source="question"),
    ]
    metric = METRICS[2]
    found = knockout_effects(given.vlm, given.prompts, cuts, metric, progress=False)
    expected = sweep(given.vlm, given.prompts, wanted, metric, progress=False)
    np.testing.assert_allclose(found["value"], expected["value"][0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["clean"], expected["clean"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_shortcuts_gives_the_same_numbers(family: str, monkeypatch) -> None:
    given = opened(family)
    cuts = [CUTS["roles"], CUTS["lost head"], CUTS["several"]]
    fast = knockout_effects(given.vlm, given.prompts, cuts, METRICS[0], progress=False)
    from interp.knockout import effects

    def refuses(*_, **__):
        raise effects.Unsupported("a test says so")

    monkeypatch.setattr(effects, "StoredRun", refuses)
    with pytest.warns(UserWarning, match="a test says so"):
        slow = knockout_effects(given.vlm, given.prompts, cuts, METRICS[0], progress=False)
    np.testing.assert_allclose(fast["value"], slow["value"], rtol=0, atol=1e-4)
    assert float(abs(fast["value"] - fast["clean"]).max()) > 1e-2


@pytest.mark.parametrize("family", ("qwen2_5_vl", "llava", "idefics3"))
def test_a_model_set_to_eager_is_cut_as_well(family: str) -> None:
    given = opened(family)
    batch = collate(given.prompts, "left")
    for cut in (CUTS["roles"], CUTS["heads"], CUTS["lost"]):
        expected = cut_logits(given.vlm, cut, batch)
        given.vlm.model.set_attn_implementation("eager")
        try:
            got = cut_logits(given.vlm, cut, batch)
        finally:
            given.vlm.model.set_attn_implementation("sdpa")
        assert (got - expected)[batch.mask("all")].abs().max() <= allowed(expected)


FORMATS = {
    "think": (TraceFormat(answer=("answer", None)), "<think> red 3 </think> answer 5", (0, 4)),
    "boxed": (TraceFormat(answer=("\\boxed{", "}")), "<think> red </think> 3 \\boxed{ 5 }", (0, 4)),
    "all reasoning": (TraceFormat(None, ("answer", None)), "red 3 answer 5", (-1, 2)),
    "all answer": (TraceFormat(None, None), "red 3", (None, -1)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_token_before_the_reasoning_and_the_answer(name: str) -> None:
    """It is the one after which the next role begins, and it is so however much of the trace there is."""
    trace_format, trace, expected = FORMATS[name]
    given = opened("qwen2_5_vl")
    builder = PromptBuilder(given.given.processor, trace_format)
    whole = builder.build(given.examples[0], trace)
    for n in range(whole.n_prompt_tokens, len(whole) + 1):
        prompt = whole.truncated(n)
        for side in ("left", "right"):
            batch = collate([prompt, builder.build(given.examples[1], trace)], side)
            for place, step in zip((before_reasoning, before_answer), expected, strict=True):
                found = place(batch)[0].nonzero()[:, 0] - int(batch.columns(torch.zeros(2).long())[0])
                there = step is not None and whole.n_prompt_tokens + step < n
                assert found.tolist() == ([whole.n_prompt_tokens + (step or 0)] if there else []), (n, place)
    for role, place in zip(("reasoning", "answer"), (before_reasoning, before_answer), strict=True):
        for column in place(collate([whole]))[0].nonzero()[:, 0].tolist():
            assert whole.roles[column] != role and whole.roles[column + 1] == role
    assert set(BEFORE) == {"before reasoning", "before answer"}


def test_roles_of_written_tokens_are_those_of_the_prompt_with_them() -> None:
    given = opened("qwen2_5_vl")
    prompt = given.prompts[0].truncated(given.prompts[0].n_prompt_tokens)
    ids = given.builder.encode("<think> red 3 </think> answer 5 <|im_end|> red")
    reader, whole = TraceReader(prompt), prompt.with_tokens(ids)
    assert [reader.feed(token)[0] for token in ids] == list(whole.roles[whole.n_prompt_tokens :])


def test_of_two_answers_the_last_is_the_one_that_routes_lens_and_grader_mean() -> None:
    given = opened("qwen2_5_vl")
    builder = PromptBuilder(given.given.processor, TraceFormat(reasoning=None, answer=("answer", "star")))
    whole = builder.build(given.examples[0], "red answer 3 star blue answer 5 star circle")
    start = whole.n_prompt_tokens
    template, reasoning = "template", "reasoning"
    assert list(whole.roles[start : start + 5]) == [reasoning, template, reasoning, template, reasoning]
    assert list(whole.roles[start + 5 :]) == [template, "answer", template, template]
    assert whole.trace.answer == "5"
    assert (
        before_answer(collate([whole]))[0].nonzero()[:, 0].tolist() == [start + 5] == [answer_position(whole)]
    )
    cut, why = up_to_the_answer(whole)
    assert cut is not None and why == "" and len(cut) == start + 7
    assert cut.positions("answer").tolist() == [start + 6]
    assert before_answer(collate([cut]))[0].nonzero()[:, 0].tolist() == [start + 5]


def test_generation_under_a_cut_of_nothing_is_generation() -> None:
    given = opened("qwen2_5_vl")
    batch = collate([p.truncated(p.n_prompt_tokens) for p in given.prompts], "left")
    from interp.pair.generation import greedy_batch

    never = Knockout("answer", "reasoning")
    written, n_edges = greedy_knockout(given.vlm, batch, never, 8)
    clean = greedy_batch(given.vlm, batch, 8)
    assert (written == clean) or bool(n_edges.any())
    cut, n = greedy_knockout(given.vlm, batch, Knockout("image", "all"), 8)
    assert cut != clean and bool((n > 0).all())


def test_windows_suffixes_singles_and_those_around_a_layer() -> None:
    cut = Knockout("image", "question", heads=(1,), mass="lost")
    assert [one.layers for one in windows(cut, 4, 3)] == [(0, 2), (1, 3)]
    assert [one.layers for one in suffixes(cut, 3)] == [(0, 2), (1, 2), (2, 2)]
    assert [one.layers for one in singles(cut, 2)] == [(0, 0), (1, 1)]
    assert [one.layers for one in around(cut, 5, 3)] == [(0, 1), (0, 2), (1, 3), (2, 4), (3, 4)]
    assert [one.layers for one in around(cut, 4, 2)] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert {(one.heads, one.mass) for one in windows(cut, 4, 3)} == {((1,), "lost")}
    assert windows(cut, 4, 3)[0].name == "image -> question @ 0-2 heads 1 lost"
    with pytest.raises(FrankenlensError, match="windows of 9 layers: the tower has 4; give 1 to 4"):
        windows(cut, 4, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tower_is_cut_between_patches(family: str) -> None:
    """Against scores (or the pattern) written by a plain hook, patch by patch; in windows and in whole images."""
    given = opened(family)
    batch, vlm = collate(given.prompts[:1]), given.vlm
    clean = run(vlm, batch.inputs)
    for mass, leaf, value in (
        ("renormalized", "hook_attn_scores", -torch.inf),
        ("lost", "hook_pattern", 0.0),
    ):
        cut = Knockout(1, (2, 0), (0, 1), heads=(1,), tower="vision", mass=mass)

        def write(square, hook, value=value):
            out = square.clone()
            out[..., 1, [0, 2], 1] = value
            return out

        expected = run(vlm, batch.inputs, [(f"vision.blocks.{layer}.attn.{leaf}", write) for layer in (0, 1)])
        got = cut_logits(vlm, cut, batch)
        assert (got - expected).abs().max() <= allowed(expected)
        assert (clean - expected).abs().max() > 10 * allowed(expected)
        metric = METRICS[0]
        effect = knockout_effects(
            vlm, given.prompts[:1], [cut, Knockout("image", "answer")], metric, progress=False
        )
        assert float(effect["value"][0, 0]) == pytest.approx(float(metric(expected, batch)[0]), abs=1e-3)


@pytest.mark.parametrize("family", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"))
def test_patches_stand_where_a_changed_pixel_is_seen(family: str) -> None:
    """One patch of the image is repainted; the tower's input changes at that patch alone."""
    given = opened(family).given
    vlm, side = opened(family).vlm, 4 if family != "llava" else 6
    builder = opened(family).builder
    image = given.images(1, sizes=[(32, 40)] if family != "llava" else [(24, 24)])[0]
    name, (width, height) = "vision.blocks.0.hook_resid_pre", image.size
    batch = collate([builder.build(Example("a", (image,), QUESTIONS[0], "5"))])
    centres = patch_centres(vlm, batch).reshape(-1, 2)
    with torch.no_grad():
        before = vlm.run_with_cache(batch.inputs, name)[1][name].flatten(0, -2)
        for row, column in ((0, 0), (1, 3), (height // side - 1, 2), (2, width // side - 1)):
            painted = image.copy()
            painted.paste((0, 0, 0), (column * side, row * side, (column + 1) * side, (row + 1) * side))
            other = collate([builder.build(Example("b", (painted,), QUESTIONS[0], "5"))])
            after = vlm.run_with_cache(other.inputs, name)[1][name].flatten(0, -2)
            changed = (after - before).abs().amax(-1) > 1e-6
            box = region(
                vlm,
                row * side / height,
                column * side / width,
                (row + 1) * side / height,
                (column + 1) * side / width,
            )
            assert torch.equal(box(batch).flatten(), changed)
            (place,) = changed.nonzero()[:, 0].tolist()
            expected = [(row + 0.5) * side / height, (column + 0.5) * side / width]
            torch.testing.assert_close(centres[place].tolist(), expected)


def test_mistakes_are_one_error_each() -> None:
    given = opened("qwen2_5_vl")
    vlm, prompts = given.vlm, given.prompts
    wrong = [
        (lambda: Knockout("pictures", "question"), "no role 'pictures'"),
        (lambda: Knockout("image", "questoin"), "Did you mean 'question'"),
        (lambda: Knockout("image", "question", mass="half"), "no mass 'half'; choose renormalized or lost"),
        (lambda: Knockout("image", "question", tower="audio"), "no tower 'audio'"),
        (lambda: Knockout("image", "question", (3, 1)), "first <= last"),
        (lambda: Knockout("image", "question", heads=()), "cuts nothing"),
        (lambda: Knockout("image", 0, tower="vision"), "'image' is no place in an image"),
        (lambda: region(vlm, 0.5, 0.0, 0.2, 1.0), "top < bottom"),
    ]
    for make, why in wrong:
        with pytest.raises(FrankenlensError, match=why):
            make()
    bare = [p.truncated(p.n_prompt_tokens) for p in prompts]
    ask = [
        ([prompts[0], bare[1]], [Knockout("image", "reasoning")], r"row 1 \(e1\).*no tokens of reasoning"),
        (
            prompts,
            [Knockout("image", "question"), Knockout("image", "question", 1, heads=(4,))],
            "cut 1 .*no head 4",
        ),
        (prompts, [Knockout("image", "question", (1, 3))], "layers 0-2"),
        (prompts, [Knockout("answer", "image")], "row 0 .*no key before a query"),
        (prompts, [], "at least one cut"),
        ([], [Knockout("image", "question")], "at least one prompt"),
    ]
    for some, cuts, why in ask:
        with pytest.raises(FrankenlensError, match=why):
            knockout_effects(vlm, some, cuts, METRICS[0], progress=False)
    batch = collate(bare, "left")
    with pytest.raises(FrankenlensError, match=r"row 0 \(e0\).*no tokens of reasoning"):
        cut_logits(vlm, Knockout("image", "reasoning"), batch)
    with pytest.raises(FrankenlensError, match=r"row 0 \(e0\).*no tokens of answer"):
        greedy_knockout(vlm, batch, Knockout("answer", "question"), 2)

    def mine(some):
        return some.mask("question")

    with pytest.raises(FrankenlensError, match="mine cannot be asked"):
        greedy_knockout(vlm, batch, Knockout("image", mine), 2)
    with (
        pytest.raises(FrankenlensError, match="behind"),
        knocked_out(vlm, Knockout("image", "question"), batch),
    ):
        vlm(collate(prompts).inputs, use_cache=False)


def test_the_model_is_left_as_it_was() -> None:
    given = opened("qwen2_5_vl")
    model, batch = given.vlm.model, collate(given.prompts, "left")
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    before = run(given.vlm, batch.inputs)
    with pytest.raises(RuntimeError, match="broken"), knocked_out(given.vlm, CUTS["several"], batch):
        raise RuntimeError("broken")
    cut_logits(given.vlm, CUTS["lost"], batch)
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(run(given.vlm, batch.inputs), before)
