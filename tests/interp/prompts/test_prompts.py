"""Prompts against Hugging Face itself: its own padded batches, its logits on unpadded prompts, its decoding."""

from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hooks.errors import FrankenlensError
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import ROLE_CODES, TraceFormat
from interp.questions.examples import Example
from tests.families import FAMILIES, QWEN, TinyVLM, tiny

QUESTIONS = (
    "what color is the star ?",
    "how many red in row 3 and how many blue",
    "user",
    "is there a circle ?",
)
N_IMAGES = (1, 2, 0, 1)
TRACES = ("<think> red 3 </think> answer 5 <|im_end|>", None, "<think> 2", "1 2 3")


@cache
def vlm(family: str) -> TinyVLM:
    made = tiny(family, 1)
    made.model.requires_grad_(False)
    return made


def examples(family: str) -> list[Example]:
    return [
        Example(str(i), tuple(vlm(family).images(n, seed=i)), question, "5")
        for i, (n, question) in enumerate(zip(N_IMAGES, QUESTIONS, strict=True))
    ]


def prompts(family: str):
    builder = PromptBuilder(vlm(family).processor)
    return [builder.build(e, trace) for e, trace in zip(examples(family), TRACES, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_the_role_of_what_it_stands_for(family):
    tokenizer = vlm(family).processor.tokenizer
    for prompt, question, n_images in zip(prompts(family), QUESTIONS, N_IMAGES, strict=True):
        ids = prompt.inputs["input_ids"][0]
        assert tokenizer.decode(ids[prompt.positions("question")]).split() == question.split()
        placeholder = tokenizer.convert_tokens_to_ids("<|image_pad|>" if family in QWEN else "<image>")
        assert prompt.positions("image").tolist() == torch.nonzero(ids == placeholder).flatten().tolist()
        assert bool(len(prompt.positions("image"))) == bool(n_images)
        rest = tokenizer.decode(
            ids[: prompt.n_prompt_tokens][[r == "template" for r in prompt.roles[: prompt.n_prompt_tokens]]]
        )
        assert rest.split()[:2] == ["<|im_start|>", "user"]
        assert rest.split()[-3:] == ["<|im_end|>", "<|im_start|>", "assistant"]
    traced = prompts(family)[0]
    said = list(
        zip(
            tokenizer.convert_ids_to_tokens(traced.trace_ids),
            traced.roles[traced.n_prompt_tokens :],
            strict=True,
        )
    )
    assert said == [
        ("<think>", "template"),
        ("red", "reasoning"),
        ("3", "reasoning"),
        ("</think>", "template"),
        ("answer", "template"),
        ("5", "answer"),
        ("<|im_end|>", "template"),
    ]
    assert (traced.trace.reasoning, traced.trace.answer, traced.trace.ok) == ("red 3", "5", True)
    assert traced.text.startswith(vlm(family).prompt(QUESTIONS[0]).rstrip()) and "answer 5" in traced.text


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_those_of_the_processor(family):
    made = vlm(family)
    texts = ["what color", "how many red circle are there in row 2"]
    images = made.images(4, seed=3)
    builder = PromptBuilder(made.processor)
    rows = [Example(str(i), tuple(images[2 * i : 2 * i + 2]), t, "5") for i, t in enumerate(texts)]
    for side in ("left", "right"):
        batch = collate([builder.build(row) for row in rows], side)
        expected = made.inputs(n_images=2, batch=2, text=texts, padding_side=side, seed=3)
        assert set(batch.inputs) - {"position_ids"} == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(batch.inputs[name], tensor), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_the_logits_of_real_tokens(family, side):
    made, rows = vlm(family), prompts(family)
    batch = collate(rows, side)
    padded = made.model(**batch.inputs).logits
    last = padded[torch.arange(len(rows)), batch.last]
    for i, row in enumerate(rows):
        alone = made.model(**row.inputs).logits[0]
        within = 1e-5 * max(1.0, float(alone.abs().max()))
        assert float((padded[i, batch.mask("all")[i]] - alone).abs().max()) <= within
        assert float((last[i] - alone[-1]).abs().max()) <= within
        # the tolerance would see the loss of the image, and of the multimodal positions
        if not N_IMAGES[i]:
            continue
        broken = [{**row.inputs, "pixel_values": row.inputs["pixel_values"].flip(-1)}]
        if family in QWEN:
            # what a model without mm_token_type_ids would count; Qwen2.5-VL does so without a word
            broken.append({**row.inputs, "position_ids": torch.arange(len(row))[None]})
        for inputs in broken:
            moved = (made.model(**inputs).logits[0] - alone).abs().max()
            assert float(moved) >= 100 * within


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_batch_are_those_of_its_prompts(family):
    rows = prompts(family)
    for side in ("left", "right"):
        batch = collate(rows, side)
        for i, row in enumerate(rows):
            assert batch.roles[i][batch.mask("all")[i]].tolist() == [ROLE_CODES[role] for role in row.roles]
            assert batch.inputs["input_ids"][i, batch.last[i]] == row.ids[-1]
            assert batch.mask("decision")[i].nonzero().flatten().tolist() == [int(batch.last[i])]
            assert int(batch.mask("answer")[i].sum()) == row.roles.count("answer")
        some = batch.select([3, 0])
        assert [p.example.id for p in some.prompts] == ["3", "0"]
        assert torch.equal(some.lengths, batch.lengths[[3, 0]])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_extending_and_truncating_are_inverse(family):
    whole = prompts(family)[0]
    for n in range(whole.n_prompt_tokens, len(whole) + 1):
        cut = whole.truncated(n)
        assert cut.roles == whole.roles[:n]
        assert all(
            torch.equal(cut.inputs[k][:, :n], whole.inputs[k][:, :n]) for k in ("input_ids", "attention_mask")
        )
        again = cut.with_tokens(whole.ids[n:])
        assert again.roles == whole.roles
        assert again.text == whole.text
        assert all(torch.equal(again.inputs[name], tensor) for name, tensor in whole.inputs.items())


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_generation_from_a_left_padded_batch_is_that_of_each_prompt(family):
    made, rows = vlm(family), prompts(family)
    settings = dict(max_new_tokens=4, do_sample=False, suppress_tokens=list(rows[0].builder.suppressed_ids))
    batch = collate(rows, "left")
    together = made.model.generate(**batch.inputs, **settings)[:, batch.roles.shape[1] :]
    for i, row in enumerate(rows):
        alone = made.model.generate(**row.inputs, **settings)[0, len(row) :]
        assert together[i, : len(alone)].tolist() == alone.tolist()


def byte_level_processor(family: str = "llava"):
    """The family's processor with a byte-level BPE tokenizer, in which words and characters fall apart."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what colour is the star", "how many are there", "user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    processor = vlm(family).processor
    return type(processor)(
        processor.image_processor,
        tokenizer,
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


@pytest.mark.parametrize(
    "question", ["Wie groß ist 漢?", "user", " what \n is it? ", "assistant", "{{ x }}", "é"]
)
@pytest.mark.parametrize("fast", [True, False])
def test_the_question_is_found_among_pieces_of_words_and_characters(question, fast, monkeypatch):
    processor = byte_level_processor()
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: fast))  # without offsets
    prompt = PromptBuilder(processor).build(Example("0", tuple(vlm("llava").images(1)), question, "5"))
    places = prompt.positions("question").tolist()
    assert places == list(range(places[0], places[-1] + 1))
    assert question.strip() in processor.tokenizer.decode(prompt.inputs["input_ids"][0][places])
    assert question.strip() not in processor.tokenizer.decode(prompt.inputs["input_ids"][0][places[1:]])
    assert question.strip() not in processor.tokenizer.decode(prompt.inputs["input_ids"][0][places[:-1]])


def test_roles_of_pieces_of_words_and_characters():
    processor = byte_level_processor()
    builder = PromptBuilder(processor, TraceFormat(answer=(r"\boxed{", "}")))
    example = Example("0", tuple(vlm("llava").images(1)), "what", "5")
    prompt = builder.build(example, r"<think>漢 is</think> so \boxed{é}<|im_end|>")
    said = {
        role: processor.tokenizer.decode(prompt.inputs["input_ids"][0][prompt.positions(role)])
        for role in ("reasoning", "answer")
    }
    assert said["answer"] == "é"
    assert said["reasoning"].startswith("漢 is")
    assert prompt.trace.answer == "é" and prompt.trace.reasoning == "漢 is"
    for n in range(prompt.n_prompt_tokens, len(prompt)):
        assert prompt.truncated(n).roles == prompt.roles[:n]


def test_a_template_that_opens_the_reasoning():
    made = vlm("qwen2_5_vl")
    template = made.processor.chat_template.replace("assistant\n", "assistant\n<think>\n")
    builder = PromptBuilder(made.processor, template=template)
    prompt = builder.build(examples("qwen2_5_vl")[0], "red 3 </think> answer 5")
    assert prompt.roles[prompt.n_prompt_tokens :] == (
        "reasoning",
        "reasoning",
        "template",
        "template",
        "answer",
    )
    assert prompt.trace.ok


def test_a_system_message_is_template():
    made = vlm("llava")
    prompt = PromptBuilder(made.processor, system="count the star").build(examples("llava")[0])
    assert "count" in prompt.text.split("user")[0]
    tokenizer = made.processor.tokenizer
    assert (
        tokenizer.decode(prompt.inputs["input_ids"][0][prompt.positions("question")]).split()
        == QUESTIONS[0].split()
    )


def test_what_cannot_be_built_says_why():
    made = vlm("llava")
    builder, (example, *_) = PromptBuilder(made.processor), examples("llava")
    prompt = builder.build(example, "<think>")
    image = builder.image_token_id
    failures = {
        "holds the image placeholder '<image>'": lambda: builder.build(
            Example("0", example.images, "<image> what", "5")
        ),
        "empty question": lambda: builder.build(Example("0", example.images, " ", "5")),
        "the trace holds the image placeholder": lambda: prompt.with_tokens([image]),
        "cannot truncate prompt '0' to 2 tokens": lambda: prompt.truncated(2),
        "no role 'picture'; choose one of image, question": lambda: prompt.positions("picture"),
        "no role 'images'": lambda: collate([prompt]).mask("images"),
        "at least one prompt": lambda: collate([]),
        "has no tokenizer": lambda: PromptBuilder(made.processor.image_processor),
        "must hold it once": lambda: PromptBuilder(made.processor, template="{{ 'hello' }}").build(example),
        "refuses its 1 images": lambda: PromptBuilder(
            made.processor, template="<image><image>{{ messages[0]['content'][1]['text'] }}"
        ).build(example),
    }
    for message, action in failures.items():
        with pytest.raises(FrankenlensError, match=message.replace("(", r"\(")):
            action()


def test_an_empty_chain_is_empty_where_its_delimiters_fall_into_pieces():
    builder = PromptBuilder(byte_level_processor(), TraceFormat(answer=(r"\boxed{", "}")))
    example = Example("0", tuple(vlm("llava").images(1)), "what", "5")
    prompt = builder.build(example, r"<think></think> so \boxed{5}.<|im_end|>")
    assert len(prompt.trace_ids) > 20 and prompt.trace.reasoning == ""
    assert "reasoning" not in prompt.roles and prompt.roles.count("answer") == 1
    assert builder.decode([prompt.ids[int(prompt.positions("answer")[0])]]) == "5"
