"""Ablations while generating, against an identity layer in a block's place, weights set to zero, and plain means."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.examples import Example
from interp.generation import greedy, greedy_batch
from interp.localization import Ablation, ablate, accuracy, layers_of
from interp.localization.ablation import ablation_hooks
from interp.localization.pools import GENERATED, Pool
from interp.prompts import PromptBuilder, collate
from interp.roles import TraceFormat
from interp.statistics import mcnemar
from interp.tasks import grade, sample
from tests.families import FAMILIES, QWEN, tiny


class Identity(nn.Module):
    """A decoder block that does nothing."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


@pytest.fixture(params=FAMILIES)
def given(request: pytest.FixtureRequest):
    family = tiny(request.param)
    vlm = HookedVLM(family.model, family.processor, inputs=family.inputs())
    builder = PromptBuilder(family.processor, TraceFormat(reasoning=None, answer=None))
    images = family.images(2, sizes=[(32, 40)] if family.family in QWEN else [(16, 32)], seed=3)
    questions = ("how many red", "what shape in row 2")
    prompts = [builder.build(Example(f"e{i}", (images[i],), questions[i], "5")) for i in range(2)]
    return family, vlm, collate(prompts, "left")


def _images(batch) -> list[int]:
    return [batch.prompts[0].builder.image_token_id]


def _generated(vlm, batch, hooks=()) -> tuple[Any, Any]:
    output = vlm.generate(
        batch.inputs, hooks, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, suppress_tokens=_images(batch),
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_a_skipped_block_is_an_identity_layer_in_prefill_and_decode(given, layer) -> None:
    family, vlm, batch = given
    ids, logits = _generated(vlm, batch, ablation_hooks(Ablation(f"blocks.{layer}"), batch, None))
    path = vlm.anatomy.text.blocks[layer].path
    parent, name = path.rsplit(".", 1)
    other = copy.deepcopy(family.model)
    setattr(other.get_submodule(parent), name, Identity(other.get_submodule(path)))
    expected = other.generate(
        **batch.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, suppress_tokens=_images(batch), use_cache=layer != 0,
    )  # fmt: skip
    assert torch.equal(ids, expected.sequences)
    scale = max(1.0, float(logits.abs().max()))
    assert (logits - torch.stack(expected.logits)).abs().max() <= 1e-5 * scale
    assert (logits - _generated(vlm, batch)[1])[0].abs().max() > 1e-3 * scale


@torch.no_grad()
def test_skipped_halves_and_zeroed_heads_are_zeroed_weights(given) -> None:
    family, vlm, batch = given
    block = vlm.anatomy.text.blocks[1]
    for ablation, path, columns in (
        (Ablation("blocks.1.attn"), block.out, slice(None)),
        (Ablation("blocks.1.attn", "zero"), block.out, slice(None)),
        (Ablation("blocks.1.mlp"), block.mlp_out, slice(None)),
        (Ablation("blocks.1.attn.head.1", "zero"), block.out, slice(block.d_head, 2 * block.d_head)),
    ):
        other = copy.deepcopy(family.model)
        module = other.get_submodule(path)
        module.weight[:, columns] = 0
        if columns == slice(None) and module.bias is not None:
            module.bias.zero_()
        expected = other.generate(
            **batch.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0, suppress_tokens=_images(batch),
        )  # fmt: skip
        ids, logits = _generated(vlm, batch, ablation_hooks(ablation, batch, None))
        assert torch.equal(ids, expected.sequences), ablation.name
        allowed = 1e-5 * max(1.0, float(logits.abs().max()))
        assert (logits - torch.stack(expected.logits)).abs().max() <= allowed, ablation.name


def test_pool_means_are_plain_means_and_samples_come_from_the_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = Pool()
    first, second = torch.randn(5, 2, 3), torch.randn(7, 2, 3) + 100
    pool.add(0, first[:2], generator)
    pool.add(0, first[2:], generator)
    pool.add(GENERATED, second, generator)
    kinds = torch.tensor([[0, GENERATED], [GENERATED, 0]])
    mean = pool.mean(kinds)
    torch.testing.assert_close(mean[0, 0], first.mean(0))
    torch.testing.assert_close(mean[1, 0], second.mean(0))
    drawn = pool.sample(kinds.repeat(50, 1), generator)
    for kind, activations in ((0, first), (GENERATED, second)):
        some = drawn[kinds.repeat(50, 1) == kind]
        distance = (some[:, None] - activations).abs().flatten(2).amax(-1).amin(1)
        assert distance.max() == 0
        assert len(some.flatten(1).unique(dim=0)) > 1


def _graded(prompts: list[Any], written: list[list[int]]) -> list[bool]:
    traces = [p.builder.read_trace(p.with_tokens(ids)) for p, ids in zip(prompts, written, strict=True)]
    return [grade(trace.answer, p.example) for trace, p in zip(traces, prompts, strict=True)]


def test_accuracy_of_the_embedded_model() -> None:
    vlm = HookedVLM.from_pretrained(embedded.path("rl"))
    builder = PromptBuilder(vlm.processor)
    examples = [example for task in ("colour_at", "sum") for example in sample(task, 20, 3, "test")]
    prompts = [builder.build(example) for example in examples]
    wanted = [
        *layers_of(vlm, ("block",))[:2], Ablation("blocks.3.attn", "mean"), Ablation("blocks.3.attn", "resample"),
        Ablation("blocks.3.attn.head.0", "mean"),
    ]  # fmt: skip
    found = ablate(vlm, prompts, wanted, max_new_tokens=16, batch_size=7, progress=False)
    written = greedy(vlm, prompts, 16)
    clean = [
        grade(p.builder.read_trace(p.with_tokens(ids)).answer, p.example)
        for p, ids in zip(prompts, written, strict=True)
    ]
    np.testing.assert_array_equal(found["clean"], clean)
    batch = collate(prompts, "left")
    ids = greedy_batch(vlm, batch, 16, ablation_hooks(wanted[0], batch, None))
    right = _graded(prompts, ids)
    np.testing.assert_array_equal(found["right"][0], right)
    table = accuracy(found, resamples=200)
    assert table.loc[0, "accuracy"] == np.mean(right)
    assert table.loc[0, "p"] == mcnemar(np.array(right, float), np.array(clean, float)).p
    assert table.loc[0, "change"] == pytest.approx(np.mean(right) - np.mean(clean))
    assert table.loc[0, "change"] < -0.2
    again = ablate(vlm, prompts, wanted[3:4], max_new_tokens=16, batch_size=7, progress=False)
    np.testing.assert_array_equal(again["right"][0], found["right"][3])


def test_refusals(given) -> None:
    _, vlm, batch = given
    for address, kind, why in (
        ("blocks.1", "mean", "only be skipped"), ("projector", "skip", "cannot be ablated"),
        ("blocks.1.mlp", "scale", "no ablation"), ("vision.blocks.0", "skip", "cannot be ablated"),
    ):  # fmt: skip
        with pytest.raises(FrankenlensError, match=why):
            Ablation(address, kind)
    for address in ("blocks.99", "blocks.1.attn.head.99"):
        with pytest.raises(FrankenlensError, match="0-"):
            ablate(vlm, batch.prompts, [Ablation(address)])
    with pytest.raises(FrankenlensError, match="at least one prompt"):
        ablate(vlm, [], [Ablation("blocks.0")])
    with pytest.raises(FrankenlensError, match="no part"):
        layers_of(vlm, ("norm",))
