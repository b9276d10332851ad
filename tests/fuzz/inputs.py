"""What somebody may type or put in a file, and the bar that every answer to it is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from hooks.errors import FrankenlensError

N = int(os.environ.get("FUZZ", "40"))
"""Inputs of a kind; `make fuzz` gives 2,000."""
SECONDS = 1.0
LONGEST_MESSAGE = 3000
fuzzed = settings(
    max_examples=N,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much),
    phases=(
        Phase.explicit,
        Phase.generate,
    ),  # an input that takes a second is not tried a thousand times more
)

large = st.sampled_from([20, 310, 4998, 4999]).map(lambda digits: 10**digits)
"""Whole numbers that no float holds, or that Python does not write out; made late, since strategies are written out."""

numbers = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    large,
    large.map(lambda number: -number),
    st.sampled_from([1e308, 2**63, True, False]),
)
_PLAIN = "blocks. attn mlp head kv_head neuron expert vision hook_resid_pre hook_z unembed 0 3 -1 0-2 9999999999 . - _"
_SIGNS = "9^ ^{ } \\boxed{ \\frac{ answer: is not A B 1,000 1:2 ! <think> </think> <answer> | = + @ ' \" \\ / .. é 一 ½"
words = st.sampled_from([*_PLAIN.split(), *_SIGNS.split(), "\0", "\n", "\t", " "])
texts = st.one_of(
    st.text(max_size=40),
    st.lists(words, max_size=12).map("".join),
    st.tuples(words, st.integers(1, 3000)).map(lambda one: (one[0] * one[1])[:8000]),
)
anything: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), numbers, texts, st.binary(max_size=20), st.just(object), st.builds(object)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
)


def answered(ask: Callable[[], Any]) -> Any:
    """What is answered, or None where it is refused; in time, and in a message of readable length either way."""
    before = time.process_time()
    message = ""
    try:
        return ask()
    except FrankenlensError as error:
        message = str(error)
    finally:
        assert time.process_time() - before < SECONDS
    assert 0 < len(message) < LONGEST_MESSAGE
    return None
