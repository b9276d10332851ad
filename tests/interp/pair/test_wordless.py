"""A model often has logits for more ids than its tokenizer has words: they are never written, and named where shown."""

import pytest
import torch

from hooks import HookedVLM
from interp.lens.tokens import words
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.examples import Example
from tests.families import tiny


@pytest.fixture(scope="module")
def pair() -> Pair:
    given = tiny("qwen2_5_vl")
    given.model.resize_token_embeddings(len(given.processor.tokenizer) + 5, mean_resizing=False)
    with torch.no_grad():
        given.model.lm_head.weight[-5:].normal_(
            0, 2, generator=torch.Generator().manual_seed(0)
        )  # they win at every step, some of them
    vlm = HookedVLM(given.model, given.processor)
    return Pair(vlm, vlm)


def test_ids_without_a_word_are_never_written(pair) -> None:
    prompt = pair.builder.build(Example("0", (), "what color is the star ?", "5"))
    n = len(pair.builder.tokenizer)
    model, wordless = pair.in_.model, [*range(n, n + 5)]
    free = model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    assert set(free) & set(wordless)
    suppressed = [*pair.builder.suppressed_ids]
    assert suppressed[-5:] == wordless
    (ids,) = greedy(pair.in_, [prompt], max_new_tokens=6)
    theirs = model.generate(
        **prompt.inputs,
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=suppressed,
        eos_token_id=pair.builder.end_ids[0],
    )
    assert ids == theirs[0, len(prompt) : len(prompt) + len(ids)].tolist() and not set(ids) & set(wordless)
    assert words(prompt, free).tolist() == [
        f"<id {index}>" if index >= n else pair.builder.tokenizer.decode([index]) for index in free
    ]
