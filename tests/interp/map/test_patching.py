"""Patching against plain PyTorch hooks, against what must come out exactly, and against plants of known place."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError, HookedVLM, graft, weight_slices
from interp.map.cells import KINDS, Donor, edits_of
from interp.map.component_map import DIRECTIONS, _map, patch
from interp.map.components import BEFORE_THE_DECODER, POINTS, cached_names, components
from interp.metrics import LogitDifference, SoftDifference
from interp.prompts import PromptBuilder, collate
from interp.prompts.pairing import PatchBatch, beside, partners
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.sweep.edits import Span
from interp.sweep.rerun import CleanRun
from tests.families import EACH_KIND, redraw, tiny

TRACE = "<think> red 3 , blue 2 </think> answer"
QUESTIONS = ("how many red", "how many blue", "what shape in row 2", "what color")


def _prompts(given, n: int, seed: int = 0, trace: str = TRACE):
    builder = PromptBuilder(given.processor, TraceFormat(answer=("answer", None)))
    images = given.images(n, sizes=[given.images(1)[0].size[::-1]], seed=seed)
    return [builder.build(Example(f"e{i}", (images[i],), QUESTIONS[i % 2], "5"), trace) for i in range(n)]


@pytest.fixture(params=EACH_KIND)
def duo(request: pytest.FixtureRequest):
    given = tiny(request.param)
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    inputs = given.inputs()
    return given, HookedVLM(given.model, inputs=inputs), HookedVLM(other, inputs=inputs)


def test_embed_attn_and_mlp_of_the_donor_make_its_residual_bit_for_bit(duo) -> None:
    given, recipient, donor = duo
    inputs = given.inputs(batch=2)

    def writes(name: str) -> bool:
        ends = ("attn_out", "mlp_out", "deepstack")
        return name == "hook_embed" or (not name.startswith("vision") and name.endswith(ends))

    residuals = [
        f"blocks.{i}.hook_resid_{place}" for i in range(donor.n_layers) for place in ("pre", "mid", "post")
    ]
    with torch.no_grad():
        output, cache = donor.run_with_cache(inputs)
        moved = [(name, lambda a, hook: cache[hook.name]) for name in recipient.names(writes)]
        with recipient.hooks(moved):
            _, got = recipient.run_with_cache(inputs, residuals)
        assert all(torch.equal(got[name], cache[name]) for name in residuals)
        tied = recipient.model.get_output_embeddings().weight is recipient.model.get_input_embeddings().weight
        for address in ("ln_final", "embed" if tied else "unembed"):
            graft(recipient.model, donor.model, weight_slices(recipient.model, recipient.anatomy, address))
        assert torch.equal(recipient.run_with_hooks(inputs, moved).logits, output.logits)


def test_rerun_is_a_full_forward_bit_for_bit(duo) -> None:
    given, vlm, _ = duo
    run = CleanRun(vlm, given.inputs(batch=2))
    with torch.no_grad():
        assert torch.equal(run.logits.tensor(), vlm.model(**given.inputs(batch=2)).logits)
    for layer in range(vlm.n_layers):
        hook = [(f"blocks.{layer}.hook_mlp_out", lambda a, hook: a * 0.5)]
        got = run.rerun(hook)
        with torch.no_grad():
            assert torch.equal(got.tensor(), vlm.run_with_hooks(given.inputs(batch=2), hook).logits)
        assert (got.tensor() - run.logits.tensor()).abs().max() > 1e-2

    # an edit in place must not reach the stored residual
    def erase(activation, hook):
        activation[:, 3] = 0

    run.rerun([("blocks.1.hook_resid_pre", erase)])
    assert run.rerun([]).equal(run.logits)


def test_a_component_from_the_same_model_changes_nothing_at_all(duo) -> None:
    given, vlm, _ = duo
    wanted = components(vlm, POINTS)
    prompts = _prompts(given, 2)
    batch = collate(prompts)
    ready = PatchBatch(batch, batch.mask("decision"), partners(prompts))
    run = CleanRun(vlm, batch.inputs)
    metric = LogitDifference(torch.tensor([1, 2]), torch.tensor([5, 6]))
    others = collate(beside(prompts, [0, 1], partners(prompts)))
    own = Donor(vlm, batch, cached_names(vlm, wanted), metric, others)
    for component in wanted:
        where = None if component.point in BEFORE_THE_DECODER else batch.mask("all")
        edits = [edit for kind in KINDS for edit in edits_of(own, own, component, where, ready, kind)]
        assert run.rerun([edit.hook() for edit in edits]).equal(run.logits), component


def test_head_result_patch_equals_plain_hooks(duo) -> None:
    """Head 1 of layer 1, the last two tokens, the donor's own W_O; by a plain hook on the output projection."""
    given, recipient, donor = duo
    prompts = _prompts(given, 1)
    batch = collate(prompts)
    inputs = batch.inputs
    block = recipient.anatomy.text.blocks[1]
    head = slice(block.d_head, 2 * block.d_head)
    outs = {name: vlm.model.get_submodule(block.out) for name, vlm in (("r", recipient), ("d", donor))}
    seen = {}

    def keep(module, args, output):
        seen["d"] = args[0][..., head] @ module.weight[:, head].T

    def swap(module, args, output):
        own = args[0][..., head] @ module.weight[:, head].T
        output = output.clone()
        output[:, -2:] += (seen["d"] - own)[:, -2:]
        return output

    with torch.no_grad():
        handle = outs["d"].register_forward_hook(keep)
        donor.model(**inputs)
        handle.remove()
        handle = outs["r"].register_forward_hook(swap)
        expected = recipient.model(**inputs).logits
        handle.remove()
        component = next(c for c in components(recipient, ["head"]) if (c.layer, c.head) == (1, 1))
        metric = LogitDifference(torch.tensor([1]), torch.tensor([5]))
        source, own = (Donor(vlm, batch, ["blocks.1.attn.hook_z"], metric) for vlm in (donor, recipient))
        where = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        where[:, -2:] = True
        ready = PatchBatch(batch, where, partners(prompts))
        (edit,) = edits_of(own, source, component, where, ready)
        got = CleanRun(recipient, inputs).rerun([edit.hook()]).tensor()
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (expected - recipient(inputs).logits).abs().max() >= 1e-3 * scale


def test_map_has_exact_controls_and_leaves_empty_roles_empty(duo) -> None:
    given, in_, rl = duo
    prompts = _prompts(given, 3)
    metric = LogitDifference(torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7]))
    roles = ["image", "answer", "decision", "all"]
    ds = _map(
        {"in": in_, "rl": rl}, {"in": prompts, "rl": prompts}, metric, DIRECTIONS, POINTS, roles, 3, False,
        n_random=2,
    )  # fmt: skip
    assert (ds.control_self == 0).all()
    assert ds.effect.sel(role="answer").isnull().all()
    early = ds.point.isin(["vision", "projector"])
    assert ds.effect.sel(component=early, role="decision").isnull().all()
    assert ds.effect.sel(component=~early, role=["image", "decision", "all"]).notnull().all()
    for name, vlm in (("donor", rl), ("recipient", in_)):
        with torch.no_grad():
            plain = [vlm.model(**collate([p]).inputs).logits[0, -1] for p in prompts]
        expected = torch.stack([row[a] - row[b] for row, a, b in zip(plain, metric.a, metric.b, strict=True)])
        scale = max(1.0, expected.abs().max().item())
        got = ds[name].sel(direction="rl_to_in").values
        np.testing.assert_allclose(got, expected.numpy(), atol=2e-5 * scale)
    whole = ds.sel(role="all", component=~early)
    for other in (whole.control_other, whole.control_random):
        assert other.notnull().any() and (abs(other - whole.effect) > 1e-4).any()
    assert whole.control_random.notnull().all() and (abs(whole.control_random.diff("draw")) > 1e-4).any()


def test_controls_are_those_of_plain_hooks(duo) -> None:
    """Every prompt alone, whole tensors: the recipient's MLP plus the partner's difference, plus a random one as large.

    The random direction is read back off the sweep's own edit, and its norm and direction are what is checked."""
    given, in_, rl = duo
    prompts = _prompts(given, 2)
    assert prompts[0].roles == prompts[1].roles
    batch = collate(prompts)
    metric = LogitDifference(torch.tensor([1, 2]), torch.tensor([5, 6]))
    hook, layer = "blocks.1.hook_mlp_out", "blocks.1.mlp"
    with torch.no_grad():
        own, theirs = (vlm.run_with_cache(batch.inputs, [hook])[1][hook] for vlm in (in_, rl))
        plain = metric(in_(batch.inputs).logits, batch)
        changed = own + (theirs - own)[[1, 0]]
        expected = (
            metric(in_.run_with_hooks(batch.inputs, [(hook, lambda a, hook: changed)]).logits, batch) - plain
        )
        ready = PatchBatch(batch, batch.mask("decision"), partners(prompts))
        start, end = (Donor(vlm, batch, [hook], metric) for vlm in (in_, rl))
        (component,) = [one for one in components(in_, ["mlp_out"]) if one.name == layer]
        (edit,) = edits_of(start, end, component, batch.mask("all"), ready, "random", seed=3)
        drawn = edit.new(own, Span(0, own.shape[1])) - own
        as_large = own + drawn
        random = (
            metric(in_.run_with_hooks(batch.inputs, [(hook, lambda a, hook: as_large)]).logits, batch) - plain
        )
    real, size = batch.mask("all"), (theirs - own).norm(dim=-1)
    np.testing.assert_allclose(drawn.norm(dim=-1)[real], size[real], rtol=1e-4)
    unit = (drawn / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-9))[real]
    apart = unit @ unit.T - torch.eye(len(unit))
    assert abs(float(apart.mean())) < 0.05 and float(apart.abs().max()) < 0.99  # no token's draw is another's
    both = {"in": in_, "rl": rl}, {"in": prompts, "rl": prompts}
    one = {"rl_to_in": ("rl", "in")}
    found = _map(*both, metric, one, ["mlp_out"], ["all", "decision"], 2, False, seed=3).sel(component=layer)
    tolerance = 1e-5 * max(1.0, float(plain.abs().max()))
    other = found.control_other.sel(role="all").values[0] - expected.numpy()
    first = found.control_random.sel(role="all", draw=0).values[0] - random.numpy()
    assert max(abs(other).max(), abs(first).max()) < 2 * tolerance
    assert min(expected.abs().max(), random.abs().max()) > 200 * tolerance
    alone = []
    for i, prompt in enumerate(prompts):
        mine = {"in": [prompt], "rl": [prompt]}
        got = _map(both[0], mine, metric.select([i]), one, ["mlp_out"], ["all", "decision"], 1, False, seed=3)
        alone.append(got.sel(component=layer).control_random.values[..., 0])
    np.testing.assert_allclose(np.stack(alone, -1), found.control_random.values, atol=2 * tolerance)


def test_patch_between_two_images_of_one_model() -> None:
    given = tiny("qwen2_5_vl")
    vlm = HookedVLM(given.model, given.processor)
    clean, corrupt = _prompts(given, 3, seed=0), _prompts(given, 3, seed=5)
    metric = LogitDifference(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    ds = patch(vlm, clean, corrupt, metric, progress=False)
    gap = (ds.donor - ds.recipient).sel(direction="clean_to_corrupt")
    assert (abs(gap) > 1e-3).all()
    # all that differs enters through the projector: moving it moves everything
    whole = ds.effect.sel(direction="clean_to_corrupt", component="projector", role="image")
    np.testing.assert_allclose(whole, gap, atol=1e-4)
    np.testing.assert_allclose(
        ds.effect.sel(direction="clean_to_corrupt", component="blocks.0.hook_resid_pre", role="image"),
        gap,
        atol=1e-4,
    )


def test_patch_refuses_prompts_that_do_not_line_up() -> None:
    given = tiny("qwen2_5_vl")
    vlm = HookedVLM(given.model, given.processor)
    builder = PromptBuilder(given.processor)
    one, two = (builder.build(Example(q, (given.images(1)[0],), q, "")) for q in ("how many", "how many red"))
    metric = LogitDifference(torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(FrankenlensError, match=r"row 0.*line up"):
        patch(vlm, [one], [two], metric)
    with pytest.raises(FrankenlensError, match="no patching point"):
        patch(vlm, [one], [one], metric, points=["hed"])
    with pytest.raises(FrankenlensError, match="no role"):
        patch(vlm, [one], [one], metric, roles=["images"])


def test_planted_head_is_found_on_a_random_model() -> None:
    """The soft metric finds one head whose W_Q and W_O were perturbed at equal norm; the plant is the whole change."""
    given = tiny("qwen2_5_vl")
    in_ = HookedVLM(given.model, given.processor)
    layer, head = 1, random.Random(0).randrange(4)
    rl_model = copy.deepcopy(given.model)
    parameters = dict(rl_model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for piece in weight_slices(rl_model, in_.anatomy, f"blocks.{layer}.attn.head.{head}"):
            view = piece.of(parameters[piece.parameter])
            new = view + 0.3 * view.std(correction=0) * torch.randn(view.shape, generator=generator)
            view.copy_(new * view.norm() / new.norm())
    rl = HookedVLM(rl_model, check=False)
    prompts = _prompts(given, 4)
    batch = collate(prompts)
    with torch.no_grad():
        p_in, p_rl = (vlm(batch.inputs).logits.softmax(-1) for vlm in (in_, rl))
    starts = torch.tensor([p.n_prompt_tokens for p in prompts])
    weights = tuple(
        (p_rl - p_in)[i, s - 1 : int(n)] for i, (s, n) in enumerate(zip(starts, batch.lengths, strict=True))
    )
    metric = SoftDifference(weights, starts - 1)
    ds = _map(
        {"in": in_, "rl": rl},
        {"in": prompts, "rl": prompts},
        metric,
        {"rl_to_in": ("rl", "in")},
        ("head", "z", "mlp_out"),
        ["all"],
        4,
        False,
    )
    gap = float((ds.donor - ds.recipient).sum())
    effect = ds.effect.sel(direction="rl_to_in", role="all").sum("example")
    planted = effect.sel(component=f"blocks.{layer}.attn.head.{head}")
    assert gap > 0
    np.testing.assert_allclose(planted / gap, 1.0, atol=1e-3)
    # through the recipient's own W_O half of the plant is missing
    z = float(effect.sel(component=f"blocks.{layer}.attn.hook_z.{head}")) / gap
    assert z < 0.95
    heads = effect.sel(component=ds.point == "head")
    assert heads.argmax("component") == list(heads.component.values).index(f"blocks.{layer}.attn.head.{head}")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_vision_controls_with_other_numbers_of_images_and_with_none(family: str) -> None:
    """Rows with 0, 0, 1, 1 images: the first two have no vision side; the others borrow each other's images."""
    given = tiny(family)
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    in_, rl = HookedVLM(given.model, given.processor), HookedVLM(other, inputs=given.inputs())
    builder = PromptBuilder(given.processor, TraceFormat())
    size: Any = [given.images(1)[0].size[::-1]]
    images = [(), (), *((image,) for image in given.images(2, sizes=size))]
    prompts = [
        builder.build(Example(f"e{i}", rows, "how many red", "5"), TRACE) for i, rows in enumerate(images)
    ]
    metric = LogitDifference(torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8]))
    both = {"in": prompts, "rl": prompts}
    direction = {"rl_to_in": ("rl", "in")}
    ds = _map({"in": in_, "rl": rl}, both, metric, direction, ("projector",), ["image"], 4, False)
    effect, control = (ds[name].values.squeeze() for name in ("effect", "control_other"))
    assert np.isnan(effect[:2]).all() and np.isnan(control[:2]).all()
    # by hand: what the donor does otherwise on the two prompts with their images exchanged, added
    swapped = [builder.build(Example("x", images[5 - i], "how many red", "5"), TRACE) for i in (2, 3)]
    with_image = prompts[2:]
    names = [name for name in in_.hook_points if name == "projector.hook_out" or name.endswith("deepstack")]
    with torch.no_grad():
        batch = collate(with_image)
        _, mine = in_.run_with_cache(batch.inputs, names)
        others = [vlm.run_with_cache(collate(swapped).inputs, names)[1] for vlm in (rl, in_)]
        cache = {name: mine[name] + others[0][name] - others[1][name] for name in names}
        moved = in_.run_with_hooks(
            batch.inputs, [(name, lambda a, hook: cache[hook.name]) for name in names]
        ).logits
        expected = metric.select([2, 3])(moved, batch) - metric.select([2, 3])(
            in_(batch.inputs).logits, batch
        )
    np.testing.assert_allclose(control[2:], expected.numpy(), atol=1e-4)
    assert np.abs(control[2:] - effect[2:]).max() > 1e-3


def test_patch_refuses_equal_token_counts_of_other_grids() -> None:
    given = tiny("qwen2_5_vl")
    vlm = HookedVLM(given.model, given.processor)
    builder = PromptBuilder(given.processor)
    wide, high = (
        builder.build(Example("e", tuple(given.images(1, sizes=[size])), "how many", ""))
        for size in ((16, 32), (32, 16))
    )
    assert wide.roles == high.roles
    with pytest.raises(FrankenlensError, match="images of other sizes"):
        patch(vlm, [wide], [high], LogitDifference(torch.tensor([1]), torch.tensor([2])))
