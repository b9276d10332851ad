"""A small model, opened, for the tests of a file that say nothing of architectures."""

import pytest

from hooks import HookedVLM
from tests.families import TinyVLM, tiny


@pytest.fixture(scope="module")
def given() -> TinyVLM:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="module")
def vlm(given: TinyVLM) -> HookedVLM:
    return HookedVLM(given.model, given.processor)
