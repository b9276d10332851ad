"""Plants are what they say they are: which weights moved, by how much, and nothing else."""

import copy
import dataclasses
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import embedded
from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.comparison import by_address, compare
from interp.pair.pair import weights_sha256
from interp.planting import (
    DECODER,
    EVERYWHERE,
    Plant,
    candidates,
    draw,
    planted,
    planted_and_measured,
    relative_norm,
    truth,
)
from interp.planting.wired import wired_names
from interp.prompts import PromptBuilder
from interp.questions.tasks import sample
from tests.half_pairs import HALVES, half_pair, widened


@pytest.fixture(scope="module")
def models():
    opened = [HookedVLM.from_pretrained(embedded.path(name), check=False) for name in ("in", "rl")]
    yield opened
    for vlm in opened:
        vlm.close()


def _weights(vlm: HookedVLM) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in vlm.model.named_parameters()}


def _owned(vlm: HookedVLM, addresses) -> dict[str, torch.Tensor]:
    """Masks of the weights that addresses own."""
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in vlm.model.named_parameters()}
    for address in addresses:
        for piece in weight_slices(vlm.model, vlm.anatomy, address):
            piece.of(masks[piece.parameter]).fill_(True)
    return masks


COMPONENTS = ("blocks.2.attn.head.1", "blocks.5.mlp", "blocks.7.attn.head.3")


def test_the_donors_weights_stand_in_the_components_and_ins_everywhere_else(models) -> None:
    in_, rl = models
    before = [weights_sha256(vlm.model) for vlm in models]
    made = _weights(planted(in_, rl, Plant(COMPONENTS, noise="none")))
    own, theirs, masks = _weights(in_), _weights(rl), _owned(in_, COMPONENTS)
    for name, value in made.items():
        assert torch.equal(value[masks[name]], theirs[name][masks[name]])
        assert torch.equal(value[~masks[name]], own[name][~masks[name]])
    assert sum(int(mask.sum()) for mask in masks.values()) == 128 * 3 * 256 + 2 * (2 * 32 * 128 + 32)
    assert [weights_sha256(vlm.model) for vlm in models] == before


def test_noise_has_the_norm_of_rounding_and_is_drawn_by_seed(models) -> None:
    in_, rl = models
    own = _weights(in_)
    made = [_weights(planted(in_, rl, Plant(seed=seed))) for seed in (0, 0, 1)]
    for name, value in own.items():
        rounding = (value.bfloat16().float() - value).norm()
        assert float((made[0][name] - value).norm()) == pytest.approx(float(rounding), rel=1e-2)
        assert torch.equal(made[0][name], made[1][name])
        assert not torch.equal(made[0][name], made[2][name])
    rounded = _weights(planted(in_, rl, Plant(noise="bf16")))
    assert all(torch.equal(rounded[name], own[name].bfloat16().float()) for name in own)


@pytest.mark.parametrize("change", ["random", "rotated"])
def test_updates_match_a_norm_slice_by_slice(models, change) -> None:
    in_, rl = models
    plant = Plant(COMPONENTS, change, noise="none", seed=3)
    own, theirs, made = _weights(in_), _weights(rl), _weights(planted(in_, rl, plant))
    alone = _weights(planted(in_, rl, dataclasses.replace(plant, components=COMPONENTS[:1])))
    for address in COMPONENTS:
        for piece in weight_slices(in_.model, in_.anatomy, address):
            before, donor, after = (piece.of(some[piece.parameter]) for some in (own, theirs, made))
            moved = float((after - before).norm())
            if change == "random":
                assert moved == pytest.approx(float((donor - before).norm()), rel=1e-4)
            else:
                assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-4)
                assert moved > 0.3 * float(before.norm())
            if address == COMPONENTS[0]:  # a plant is the same whether it stands alone or not
                assert torch.equal(piece.of(alone[piece.parameter]), after)


def test_half_precision_has_noise_of_its_own_rounding_and_updates_that_stay(models) -> None:
    """Weights that are bfloat16 numbers already, as most checkpoints' are."""
    halves = [copy.deepcopy(vlm.model).bfloat16() for vlm in models]
    in_, rl = (HookedVLM(model, models[0].processor, check=False) for model in halves)
    own = _weights(in_)
    noisy = _weights(planted(in_, rl, Plant()))
    matrices = [name for name, p in own.items() if p.ndim == 2]
    for name in matrices:
        value = own[name].float()
        gaps = torch.where(value == 0, 0.0, torch.exp2(value.abs().log2().floor() - 7))
        expected = float((gaps.square().sum() / 12).sqrt())
        assert float((noisy[name].float() - value).norm()) == pytest.approx(expected, rel=0.15), name
    random = _weights(planted(in_, rl, Plant(COMPONENTS, "random", noise="none")))
    for address in COMPONENTS:
        for piece in weight_slices(in_.model, in_.anatomy, address):
            before, donor, after = (piece.of(w[piece.parameter]).float() for w in (own, _weights(rl), random))
            assert float((after - before).norm()) == pytest.approx(float((donor - before).norm()), rel=0.2)
    with pytest.raises(FrankenlensError, match="rounding changes nothing"):
        planted(in_, rl, Plant(noise="bf16"))


def test_biases_of_zero_stay_zero_and_nothing_overflows(models) -> None:
    in_ = HookedVLM(copy.deepcopy(models[0].model), models[0].processor, check=False)
    layer = in_.model.get_submodule(in_.anatomy.text.blocks[2].qkv[0])
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr]
    made = _weights(planted(in_, models[1], Plant(COMPONENTS, "rotated", noise="none")))
    assert all(torch.isfinite(p).all() for p in made.values())


def test_a_donor_that_does_not_differ_and_weights_that_are_elsewhere_are_refused(models) -> None:
    in_, rl = models
    with pytest.raises(FrankenlensError, match="IN's own weights in blocks.5.mlp"):
        planted(in_, in_, Plant(("blocks.5.mlp",)))
    with pytest.raises(FrankenlensError, match="both name weights"):
        planted(in_, rl, Plant(("blocks.5", "blocks.5.mlp")))
    elsewhere = HookedVLM(copy.deepcopy(in_.model), in_.processor, check=False)
    elsewhere.model.to(device="meta")  # type: ignore[call-arg]
    with pytest.raises(FrankenlensError, match="is offloaded"):
        planted(elsewhere, rl, Plant(COMPONENTS))


@torch.no_grad()
def test_decoys_move_weights_and_nothing_else(models) -> None:
    in_, rl = models
    prompt = PromptBuilder(in_.processor).build(sample("sum", 1, seed=0, split="map")[0])
    clean = in_.model(**prompt.inputs).logits
    decoys = ("blocks.1.mlp", "blocks.6.mlp")
    made = planted(in_, rl, Plant(noise="none", decoys=decoys))
    tolerance = 1e-5 * max(1.0, float(clean.abs().max()))
    assert float((made.model(**prompt.inputs).logits - clean).abs().max()) < tolerance
    assert all(relative_norm(in_, made, decoy) > 1 for decoy in decoys)
    # what is guarded: the same weights with the neurons of one matrix alone permuted
    path = f"{in_.anatomy.text.blocks[1].mlp_out}.weight"
    made.model.get_parameter(path).copy_(in_.model.get_parameter(path))
    assert float((made.model(**prompt.inputs).logits - clean).abs().max()) > 100 * tolerance


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [
            "blocks.2",
            "blocks.0-3",
            "blocks.1-2.attn",
            "blocks.4.mlp",
            "blocks.3.attn.head.0-2",
            "projector",
            "vision",
            "vision.blocks.1",
            "blocks.8.attn.head.3",
            "embed",
            "blocks.2.attn.kv_head.0",
            "blocks.4.mlp.neuron.7",
        ]
    )
)
def test_a_candidate_is_changed_where_all_its_weights_are(models, address) -> None:
    in_ = models[0]
    among = candidates(in_, EVERYWHERE)
    masks = _owned(in_, [address])
    expected = [
        all(
            bool(piece.of(masks[piece.parameter]).all())
            for piece in weight_slices(in_.model, in_.anatomy, component.name)
        )
        for component in among
    ]
    assert truth(among, Plant((address,))).tolist() == expected


def test_candidates_are_every_head_and_mlp_and_the_vision_side_where_asked(models) -> None:
    names = [component.name for component in candidates(models[0], DECODER)]
    assert len(names) == len(set(names)) == 9 * (4 + 1)
    more = {component.name for component in candidates(models[0], EVERYWHERE)} - set(names)
    assert more == {"vision.blocks.0", "vision.blocks.1", "vision.blocks.2", "projector"}
    assert len(set(draw(candidates(models[0]), 5, 1))) == 5


def test_relative_norms_are_those_of_the_comparison_of_checkpoints(models) -> None:
    in_, rl = models
    folders = [embedded.path(name) for name in ("in", "rl")]
    addresses = [component.name for component in candidates(in_, EVERYWHERE)]
    table = compare(*folders, spectra=False, progress=False)
    expected = by_address(table, *folders, addresses=addresses, progress=False).set_index("address")
    for address in addresses:
        assert relative_norm(in_, rl, address) == pytest.approx(
            float(expected.loc[address, "relative_norm"]), 1e-6
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"change": "doner"}, "choose of donor, random, rotated"),
        ({"noise": "loud"}, "choose of none, gaussian, bf16"),
        ({"decoys": ("blocks.3.attn",)}, "a decoy is the MLP of a layer"),
    ],
)
def test_a_plant_that_cannot_be_is_refused(settings, words) -> None:
    with pytest.raises(FrankenlensError, match=words):
        Plant(**settings)


@pytest.mark.parametrize("kind", ["joint", "backup"])
def test_two_mlps_take_two_layers(kind) -> None:
    with pytest.raises(FrankenlensError, match=f"leave {kind} out"):
        wired_names(Mock(spec=HookedVLM, n_layers=1), kind, seed=0)


def test_an_address_that_names_nothing_is_refused(models) -> None:
    in_, rl = models
    with pytest.raises(FrankenlensError, match=r"blocks 0-8"):
        planted(in_, rl, Plant(("blocks.40.mlp",)))


def _norm(changes) -> float:
    return sum(float(one.double().square().sum()) for one in changes) ** 0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_plants_in_half_precision_are_as_large_as_they_say(dtype) -> None:
    """RL changed one entry in eight by a unit in the last place; a random update of it has its norm, and is told so."""
    in_, rl = half_pair(dtype)
    components = ("blocks.1.mlp", "blocks.0.attn.head.1")
    own, theirs = _weights(in_), _weights(rl)
    for change in ("donor", "random", "rotated"):
        made = planted_and_measured(in_, rl, Plant(components, change, noise="none", seed=2))
        new, moved, asked, product = _weights(made.vlm), [], [], 0.0
        for address in components:
            for piece in weight_slices(in_.model, in_.anatomy, address):
                before, after, donor = (
                    piece.of(some[piece.parameter]).float() for some in (own, new, theirs)
                )
                moved.append(after - before)
                asked.append(donor - before)
                product += float((moved[-1].double() * asked[-1].double()).sum())
        if change == "donor":
            assert made.held.stored == pytest.approx(_norm(asked) ** 2, rel=1e-6)
            assert (made.held.norm_ratio, made.held.cosine) == pytest.approx((1, 1))
            assert product == pytest.approx(_norm(asked) ** 2)
        else:
            assert made.held.stored == pytest.approx(_norm(moved) ** 2, rel=1e-6)
            assert made.held.norm_ratio == pytest.approx(1, abs=0.02)
        if change == "random":
            assert _norm(moved) == pytest.approx(_norm(asked), rel=0.02)
    noisy = planted_and_measured(in_, rl, Plant(seed=1))
    changes = [value.float() - own[name].float() for name, value in _weights(noisy.vlm).items()]
    assert noisy.noise.norm_ratio == pytest.approx(1, abs=0.02)
    assert noisy.noise.stored == pytest.approx(_norm(changes) ** 2, rel=1e-6)


@torch.no_grad()
def test_a_plant_that_ins_type_does_not_hold_is_refused() -> None:
    pair = half_pair(torch.bfloat16)
    donor = widened(pair)[1]
    for own, parameter in zip(pair[0].model.parameters(), donor.model.parameters(), strict=True):
        parameter.copy_(own + (parameter - own) / 4)
    with pytest.raises(
        FrankenlensError, match=r"the plant in blocks.1.mlp: weights in bfloat16 hold 0\.\d\d of its norm"
    ):
        planted(pair[0], donor, Plant(("blocks.1.mlp",), noise="none"))
