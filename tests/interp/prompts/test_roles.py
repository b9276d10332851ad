r"""Roles and traces: known by construction from a grammar, causal, and the same for any way of cutting a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.errors import FrankenlensError
from interp.prompts.roles import TraceFormat, count_faults
from interp.prompts.scanner import RoleScanner

settings.register_profile("brief", max_examples=60, deadline=None)
settings.load_profile("brief")

WORDS = TraceFormat()
BOXED = TraceFormat(answer=(r"\boxed{", "}"))
TAGS = TraceFormat(("<think>", "</think>"), ("<answer>", "</answer>"))
NO_REASONING = TraceFormat(reasoning=None, answer=(r"\boxed{", "}"))
NO_ANSWER = TraceFormat(answer=None)
FORMATS = {"words": WORDS, "boxed": BOXED, "tags": TAGS, "no reasoning": NO_REASONING, "no answer": NO_ANSWER}

plain = st.lists(
    st.sampled_from([" red", " 3", " <", " answers", " }", "\n", " think", " é", ""]), max_size=6
)
noise = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            " answer",
            r" \boxed{",
            "}",
            "{",
            "\\",
            "<",
            "/",
            "think",
            ">",
            " x",
            "<|im_end|>",
            "",
        ]
    ),
    max_size=14,
)


def roles_of(trace_format: TraceFormat, pieces: list[str]) -> list[str]:
    scanner = RoleScanner(trace_format)
    return [scanner.feed(piece) for piece in pieces]


@given(
    plain,
    plain,
    st.lists(st.sampled_from([" 3", " red", " {", " }"]), max_size=5),
    st.sampled_from([WORDS, BOXED, TAGS]),
)
def test_roles_of_a_trace_are_those_it_was_made_from(thought, between, answer, trace_format):
    between = [piece for piece in between if piece != " }"]
    opening, closing = trace_format.answer
    depth = 0
    for piece in answer if trace_format is BOXED else []:
        depth += {" {": 1, " }": -1}.get(piece, 0)
        if depth < 0:
            return  # the brace would close the answer: another trace than the one meant
    if trace_format is BOXED and depth:
        answer = [*answer, *["}"] * depth]
    made = [("<think>", "template"), *((p, "reasoning") for p in thought), ("</think>", "template")]
    made += [(p, "template") for p in between] + [
        (f" {opening}", "template"),
        *((p, "answer") for p in answer),
    ]
    made += [(closing, "template")] if closing else []
    made += [("<|im_end|>", "template"), (" more", "template")]
    pieces, roles = [p for p, _ in made], [r for _, r in made]
    assert roles_of(trace_format, pieces) == roles

    trace = trace_format.parse("".join(pieces))
    assert trace.reasoning == "".join(thought).strip()
    assert trace.answer == ("".join(answer).strip() or None)
    assert trace.ok == bool(trace.answer)


@given(noise, st.sampled_from(list(FORMATS.values())), st.booleans())
def test_later_text_never_changes_an_earlier_role(pieces, trace_format, reasoning_open):
    def roles(some):
        scanner = RoleScanner(trace_format, reasoning_open)
        return [scanner.feed(piece) for piece in some]

    whole = roles(pieces)
    for n in range(len(pieces)):
        assert roles(pieces[:n]) == whole[:n]
        assert roles([*pieces[:n], " </think> answer }"])[:n] == whole[:n]


@given(noise, st.sampled_from([BOXED, TAGS, NO_REASONING, NO_ANSWER]), st.data())
def test_a_text_reads_the_same_however_it_is_cut(pieces, trace_format, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    scanner = RoleScanner(trace_format)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        scanner.feed(text[start:end])
    assert scanner.trace() == trace_format.parse(text)


@given(
    st.sampled_from(list(FORMATS.values())),
    st.sampled_from(["3", "x + y"]),
    st.sampled_from(["7", r"\frac{1}{2}", r"\}"]),
)
def test_what_a_format_renders_it_reads(trace_format, reasoning, answer):
    trace = trace_format.parse(trace_format.render(reasoning, answer) + "<|im_end|>")
    assert (trace.reasoning, trace.answer, trace.ok, trace.why) == (reasoning, answer, True, "")


@pytest.mark.parametrize(
    ("trace_format", "text", "answer", "why"),
    [
        (WORDS, "answer red", "red", "no '<think>'"),
        (WORDS, "<think> a answer red", None, "'<think>' is not closed by '</think>'"),
        (WORDS, "<think> a <|im_end|>", None, "'<think>' is not closed by '</think>'"),
        (WORDS, "<think> a </think> red", None, "no 'answer'"),
        (WORDS, "<think> a </think> answers red", None, "no 'answer'"),
        (WORDS, "<think> a </think> answer <|im_end|> red", None, "the answer is empty"),
        (WORDS, "<think> a </think> <think> b </think> answer 1", "1", "'<think>' is opened 2 times"),
        (WORDS, "<think> a </think> answer 1 answer 2", "1 answer 2", ""),
        (BOXED, r"<think> \boxed{1} </think> \boxed{2", None, r"'\\boxed{' is not closed by '}'"),
        (BOXED, r"<think> a </think> \boxed{2<|im_end|>}", None, r"'\\boxed{' is not closed by '}'"),
        (BOXED, r"<think> \boxed{1} </think> \boxed{2} or \boxed{\frac{3}{4}}", r"\frac{3}{4}", ""),
        (BOXED, r"<think> a </think> \boxed{\{1, 2\}}", r"\{1, 2\}", ""),
        (NO_REASONING, r"so \boxed{5}.", "5", ""),
        (NO_ANSWER, "<think> a </think> red", "red", ""),
        (NO_ANSWER, "<think> a", None, "'<think>' is not closed by '</think>'"),
        (WORDS, "", None, "no '<think>'"),
    ],
)
def test_a_trace_that_does_not_parse_says_why(trace_format, text, answer, why):
    trace = trace_format.parse(text)
    assert (trace.answer, trace.ok, trace.why) == (answer, not why, why)


def test_faults_are_counted_by_reason():
    traces = [
        WORDS.parse(text) for text in ("answer 1", "<think> a", "answer 2", "<think> a </think> answer 1")
    ]
    assert count_faults(traces) == {"no '<think>'": 2, "'<think>' is not closed by '</think>'": 1}


def test_reasoning_that_the_prompt_opened():
    trace = WORDS.parse("3 + 4 </think> answer 7", reasoning_open=True)
    assert (trace.reasoning, trace.answer, trace.ok) == ("3 + 4", "7", True)


def test_a_delimiter_in_several_tokens_is_template_once_it_is_complete():
    pieces = ["<think>", "a", "</", "think", ">", " \\", "boxed", "{", "5", "}"]
    expected = [
        "template",
        "reasoning",
        "reasoning",
        "reasoning",
        "template",
        "template",
        "template",
        "template",
    ]
    assert roles_of(BOXED, pieces) == [*expected, "answer", "template"]


def test_an_empty_delimiter_is_refused():
    with pytest.raises(FrankenlensError, match="delimiter of the trace format is empty"):
        TraceFormat(reasoning=("<think>", ""))


AFTER = TraceFormat(None, ("<answer>", "</answer>"))


@given(noise, st.sampled_from(list(FORMATS.values())), st.booleans())
def test_roles_and_what_a_trace_says_are_one_reading(pieces, trace_format, reasoning_open):
    """Cut into single characters, the text of a role is what the trace says, for any text."""
    text = "".join(pieces)
    trace, roles = trace_format.parse(text, reasoning_open), trace_format.roles(list(text), reasoning_open)
    said = {
        role: "".join(c for c, own in zip(text, roles, strict=True) if own == role) for role in set(roles)
    }
    if trace.answer is not None:
        assert said["answer"].strip() == trace.answer
    if trace_format.reasoning is not None and trace.reasoning is not None:
        assert "".join(said.get("reasoning", "").split()) == "".join(trace.reasoning.split())


@given(noise, st.sampled_from(list(FORMATS.values())))
def test_a_piece_of_text_alone_has_its_role_at_once_unless_a_delimiter_or_an_answer_comes_of_it(pieces, form):
    scanner = RoleScanner(form)
    known, written = form.roles(pieces), [scanner.feed(piece) for piece in pieces]
    for own, then in zip(known, written, strict=True):
        assert own == then or own == "template" or {own, then} <= {"reasoning", "answer", "template"}
    once = [p for p in pieces if p in (" x", "{", "\\", "")]  # no delimiter among them, whole or in part
    assert list(form.roles(once)) == roles_of(form, once)


@pytest.mark.parametrize(
    ("form", "pieces", "roles"),
    [
        (AFTER, ["so", "<answer>", "3", "</answer>", " because"], "rtatt"),
        (AFTER, ["so", "<answer>", "3", "</answer>", " no", "<answer>", "4", "</answer>", "."], "rtrtrtatt"),
        (
            TAGS,
            ["<think>", "a", "</think>", "<answer>", "3", "</answer>", "<answer>", "4", "</answer>"],
            "trtttttat",
        ),
        (TAGS, ["<think>", "</", "think", ">", "<", "answer", ">", "3", "</", "answer>"], "tttttttatt"),
        (WORDS, ["<think>", "a", "</think>", " answer", "s", " none"], "trtttt"),
        (WORDS, ["<think>", "a", "</think>", " answer", " s", "", "é"], "trttaaa"),
        (TAGS, ["<think>", "a", "</think>", "<answer>", "3", "</answer>", "<answer>", "4"], "trttattt"),
        (TAGS, ["<think>", "a", "</think>", "<answer>", "3"], "trtta"),
        (BOXED, ["<think>", "a.</", "think>", " \\boxed{", "5}", "."], "tttttt"),
    ],
)
def test_roles_of_a_known_trace(form, pieces, roles):
    names = {"t": "template", "r": "reasoning", "a": "answer"}
    assert list(form.roles(pieces)) == [names[letter] for letter in roles]


def test_text_behind_an_answer_is_template_while_it_is_written_too():
    assert roles_of(AFTER, ["so", "<answer>", "3", "</answer>", " because"])[-1] == "template"


def test_reasoning_without_delimiters_is_all_text_before_the_answer():
    trace = AFTER.parse("so <answer>3</answer> no, <answer>4</answer> done")
    assert (trace.reasoning, trace.answer, trace.ok) == ("so <answer>3</answer> no,", "4", True)
    assert AFTER.parse("so on").reasoning == "so on"
