"""Ablations while generating, against an identity layer in a block's place, weights set to zero, and plain means."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.localization import Ablation, ablate, accuracy, layers_of
from interp.localization.ablation import _pools, ablation_hooks
from interp.localization.pools import GENERATED, Pool
from interp.pair.generation import greedy, greedy_batch
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.tasks import grade, sample
from interp.statistics import adjust, mcnemar
from tests.families import EACH_KIND, QWEN, tiny


class Identity(nn.Module):
    """A decoder block that does nothing."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


@pytest.fixture(params=EACH_KIND)
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
    ids, logits = _generated(vlm, batch, ablation_hooks(Ablation(f"blocks.{layer}"), batch))
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
        ids, logits = _generated(vlm, batch, ablation_hooks(ablation, batch))
        assert torch.equal(ids, expected.sequences), ablation.name
        allowed = 1e-5 * max(1.0, float(logits.abs().max()))
        assert (logits - torch.stack(expected.logits)).abs().max() <= allowed, ablation.name


def test_pool_means_are_plain_means_and_samples_come_from_the_kind_in_another_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = Pool()
    first, second = torch.randn(6, 2, 3), torch.randn(8, 2, 3) + 100
    keys = torch.rand(14, generator=generator, dtype=torch.float64)
    pool.add(0, first[:2], torch.zeros(2, dtype=torch.long), keys[:2])
    pool.add(0, first[2:], torch.ones(4, dtype=torch.long), keys[2:6])
    pool.add(GENERATED, second, torch.arange(8) % 2, keys[6:])
    kinds = torch.tensor([[0, GENERATED, -1], [GENERATED, 0, 0]])
    mean = pool.mean(kinds)
    torch.testing.assert_close(mean[0, 0], first.mean(0))
    torch.testing.assert_close(mean[1, 0], second.mean(0))
    assert not mean[0, 2].any()
    kinds, own = kinds.repeat(50, 1), torch.tensor([0, 1]).repeat(50)
    drawn = pool.sample(kinds, own, [torch.Generator().manual_seed(row) for row in range(100)])
    for kind, prompt, others in ((0, 0, first[2:]), (0, 1, first[:2]), (GENERATED, 0, second[1::2])):
        some = drawn[(kinds == kind) & (own == prompt)[:, None]]
        distance = (some[:, None] - others).abs().flatten(2).amax(-1).amin(1)
        assert distance.max() == 0
        assert len(some.flatten(1).unique(dim=0)) == len(others)
    with pytest.raises(FrankenlensError, match="kind question"):
        pool.mean(torch.tensor([[1]]))
    alone = Pool()
    alone.add(0, first, torch.zeros(6, dtype=torch.long), keys[:6])
    with pytest.raises(FrankenlensError, match="another prompt"):
        alone.sample(torch.tensor([[0]]), torch.tensor([0]), [generator])


@torch.no_grad()
def test_mean_and_resample_of_a_half_in_prefill_and_decode_against_plain_hooks(given) -> None:
    """Means of the attention's output per kind of token, from one clean forward per prompt without padding."""
    _, vlm, batch = given
    written = greedy_batch(vlm, batch, 5)
    traces = [prompt.with_tokens(ids) for prompt, ids in zip(batch.prompts, written, strict=True)]
    module, seen = vlm.model.get_submodule(vlm.anatomy.text.blocks[1].attention), []
    clean: dict[str, list[torch.Tensor]] = {}
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    for trace in traces:
        vlm.model(**trace.inputs, use_cache=False)
        for place, role in enumerate(trace.roles):
            kind = "generated" if place >= trace.n_prompt_tokens else role
            clean.setdefault(kind, []).append(seen[-1][0, place])
    wanted = [Ablation("blocks.1.attn", kind) for kind in ("mean", "resample")]
    pools = _pools(vlm, traces, wanted, 1, seed=0)
    for ablation in wanted:
        seen.clear()
        greedy_batch(vlm, batch, 4, ablation_hooks(ablation, batch, pools[ablation.hook], [0, 1]))
        prefill, *steps = seen
        assert len(steps) >= 1
        for row, prompt in enumerate(batch.prompts):
            shift = prefill.shape[1] - len(prompt)
            found = [(role, prefill[row, shift + place]) for place, role in enumerate(prompt.roles)]
            found += [("generated", step[row, 0]) for step in steps]
            for kind, value in found:
                expected = torch.stack(clean[kind])
                if ablation.kind == "mean":
                    expected = expected.mean(0, keepdim=True)
                assert (expected - value).abs().amax(-1).min() <= 1e-5 * max(1.0, float(value.abs().max()))
                assert (torch.stack(clean["image"]) - value).abs().amax(-1).min() > 1e-3 or kind == "image"
    handle.remove()


@torch.no_grad()
def test_what_is_resampled_depends_on_neither_the_batches_nor_the_order(given) -> None:
    _, vlm, batch = given
    written = greedy_batch(vlm, batch, 4)
    traces = [prompt.with_tokens(ids) for prompt, ids in zip(batch.prompts, written, strict=True)]
    ablation, seen = Ablation("blocks.1.attn", "resample"), []
    module = vlm.model.get_submodule(vlm.anatomy.text.blocks[1].attention)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    found = []
    for order, size in (([0, 1], 2), ([1, 0], 1)):
        pool = _pools(vlm, [traces[row] for row in order], [ablation], size, seed=0)[ablation.hook]
        numbers = {row: number for number, row in enumerate(order)}
        own = {}
        for row, prompt in enumerate(batch.prompts):
            alone = collate([prompt], "left")
            seen.clear()
            greedy_batch(vlm, alone, 3, ablation_hooks(ablation, alone, pool, [numbers[row]]))
            own[row] = torch.cat([each[0] for each in seen])
        found.append(own)
    handle.remove()
    for row in (0, 1):
        assert torch.allclose(found[0][row], found[1][row], atol=1e-5)
        assert len(found[0][row].unique(dim=0)) > 3


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
    ids = greedy_batch(vlm, batch, 16, ablation_hooks(wanted[0], batch))
    right = _graded(prompts, ids)
    np.testing.assert_array_equal(found["right"][0], right)
    tables = dict(iter(accuracy(found).groupby("function")))
    for name, rows in (("colour_at", slice(0, 20)), ("sum", slice(20, 40)), ("all", slice(None))):
        now, before = np.array(right, float)[rows], np.array(clean, float)[rows]
        first = tables[name].iloc[0]
        assert (first["accuracy"], first["whole"], first["n"]) == (now.mean(), before.mean(), len(now))
        assert first["p"] == mcnemar(now, before).p
        assert first["change"] == pytest.approx(now.mean() - before.mean())
        assert first["whole_low"] < first["whole"] < first["whole_high"] or first["whole"] in (0, 1)
    assert tables["all"].iloc[0]["change"] < -0.2
    single = pd.concat([tables["colour_at"], tables["sum"]])
    np.testing.assert_allclose(single["p_corrected"], adjust(single["p"].to_numpy()))
    np.testing.assert_allclose(tables["all"]["p_corrected"], adjust(tables["all"]["p"].to_numpy()))
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
