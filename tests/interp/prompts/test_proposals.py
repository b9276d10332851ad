"""Delimiters that traces show are found, whoever's they are; what is proposed reads the traces."""

from __future__ import annotations

import pytest

from interp.prompts.proposals import proposed
from interp.prompts.roles import TraceFormat

SHOWN = {  # how a trace is written, and what delimits it
    "<think>{r}</think> answer {a}": (("<think>", "</think>"), ("answer", None)),
    "<think>{r}</think>\n<answer>{a}</answer>": (("<think>", "</think>"), ("<answer>", "</answer>")),
    "<reasoning>\n{r}\n</reasoning>\n\n\\boxed{{{a}}}": (("<reasoning>", "</reasoning>"), ("\\boxed{", "}")),
    "[THINK]{r}[/THINK]**Final Answer:** {a}": (("[THINK]", "[/THINK]"), ("Final Answer:", None)),
    "◁think▷{r}◁/think▷The answer is {a}.": (("◁think▷", "◁/think▷"), ("The answer is", None)),
    "<think>{r}</think><|begin_of_box|>{a}<|end_of_box|>": (
        ("<think>", "</think>"),
        ("<|begin_of_box|>", "<|end_of_box|>"),
    ),
    "<think>{r}</think> {a}": (("<think>", "</think>"), None),
    "{r}\nAnswer: {a}": (None, ("Answer:", None)),
    "{r} So \\boxed{{{a}}}.": (None, ("\\boxed{", "}")),
}
CHAINS = ["two reds and one blue", "Let me count: 3 of them", "the star is left of it", "6 * 7 = 42, so"]
ANSWERS = ["5", "red", "\\frac{1}{2}", "no"]


@pytest.mark.parametrize("written", SHOWN)
def test_the_delimiters_are_found(written):
    traces = [("", written.format(r=r, a=a) + "<|im_end|>") for r, a in zip(CHAINS, ANSWERS, strict=True)]
    found = proposed(TraceFormat(("<a>", "</a>"), ("no such", None)), traces)
    assert found is not None and found.n == 4
    assert (found.trace_format.reasoning, found.trace_format.answer) == SHOWN[written]
    read = [found.trace_format.parse(text) for _, text in traces]
    assert [trace.answer.strip(" *.") for trace in read if trace.answer] == ANSWERS


def test_a_template_that_opens_the_reasoning_is_seen():
    traces = [
        ("assistant\n<think>\n", f"{r}</think> answer {a}") for r, a in zip(CHAINS, ANSWERS, strict=True)
    ]
    found = proposed(TraceFormat(None, ("no such", None)), traces)
    assert found is not None and found.n == 4
    assert (found.trace_format.reasoning, found.trace_format.answer) == (
        ("<think>", "</think>"),
        ("answer", None),
    )


def test_nothing_is_proposed_where_nothing_is_shown():
    assert proposed(TraceFormat(), [("", chain) for chain in CHAINS]) is None
    mixed = ["<a>1</a> 2", "[b]1[/b] 2", "\\boxed{2}", "Answer: 2", "2"]
    assert proposed(TraceFormat(), [("", text) for text in mixed]) is None
    assert proposed(TraceFormat(), []) is None
