"""Grafts against the donor's own logits, closed forms in float64, and every bit put back."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooks import FrankenlensError, HookedVLM
from interp.pair.pair import weights_sha256
from interp.regions import Partition, of_sizes, parse_partition, thirds
from interp.transfer.grafts import Graft, everything, grafted, new_weights, save_grafted, slices_of
from tests.families import EACH_KIND, redraw, tiny


@pytest.fixture(params=EACH_KIND)
def duo(request: pytest.FixtureRequest):
    given = tiny(request.param)
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    inputs = given.inputs()
    return HookedVLM(given.model, given.processor, inputs=inputs), HookedVLM(other, inputs=inputs), inputs


@torch.no_grad()
def test_all_blocks_and_the_rest_are_the_donor_bit_for_bit(duo) -> None:
    recipient, donor, inputs = duo
    own, theirs = recipient(inputs).logits, donor(inputs).logits
    before = weights_sha256(recipient.model), weights_sha256(donor.model)
    blocks = f"blocks.0-{recipient.n_layers - 1}"
    rest = tuple(address for address in everything(recipient) if address != blocks)
    with grafted(recipient, donor, [Graft((blocks,)), Graft(rest)]):
        assert torch.equal(recipient(inputs).logits, theirs)
        assert weights_sha256(recipient.model) == before[1]
    assert torch.equal(recipient(inputs).logits, own)
    assert (weights_sha256(recipient.model), weights_sha256(donor.model)) == before
    with grafted(recipient, recipient, Graft(everything(recipient))):
        assert torch.equal(recipient(inputs).logits, own)
    assert (theirs - own).abs().max() > 1e-2 * own.abs().max()


@torch.no_grad()
def test_the_other_way_and_in_steps_it_is_bit_for_bit_too(duo) -> None:
    recipient, donor, inputs = duo
    own, theirs = recipient(inputs).logits, donor(inputs).logits
    everything_else = tuple(a for a in everything(donor) if not a.startswith("blocks"))
    with grafted(donor, recipient, [Graft(("blocks.0-2",)), Graft(everything_else)]):
        assert torch.equal(donor(inputs).logits, own)
    with grafted(recipient, donor, Graft(("blocks.0",))):
        first = recipient(inputs).logits
        with grafted(recipient, donor, Graft(("blocks.1-2.attn", "blocks.1-2.mlp"))):
            assert not torch.equal(recipient(inputs).logits, first)
        assert torch.equal(recipient(inputs).logits, first)
    assert torch.equal(recipient(inputs).logits, own)
    assert torch.equal(donor(inputs).logits, theirs)
    assert recipient.n_layers == 3


@torch.no_grad()
def test_random_updates_of_heads_that_share_a_tensor_differ(duo) -> None:
    recipient, donor, _ = duo
    both = "blocks.1.attn.head.0-1"
    pieces = slices_of(recipient, [Graft((both,))])[0][1]
    weights = dict(recipient.model.named_parameters())
    before = [piece.of(weights[piece.parameter]).clone() for piece in pieces]
    with grafted(recipient, donor, Graft((both,), form="random")):
        after = [piece.of(weights[piece.parameter]).clone() for piece in pieces]
    updates: dict[str, list[torch.Tensor]] = {}
    for piece, old, new in zip(pieces, before, after, strict=True):
        updates.setdefault(piece.parameter, []).append((new - old).flatten())
    for name, (first, second) in updates.items():
        if len(first) > 50:
            assert abs(float(torch.cosine_similarity(first, second, dim=0))) < 0.5, name


def test_everything_is_every_weight_once(duo) -> None:
    recipient = duo[0]
    ((_, pieces),) = slices_of(recipient, [Graft(everything(recipient))])
    named = [recipient.model.get_parameter(piece.parameter) for piece in pieces]
    assert {id(p) for p in named} == {id(p) for p in recipient.model.parameters()}
    assert len(named) == len({id(p) for p in named})


@torch.no_grad()
def test_a_head_takes_its_rows_and_columns_and_nothing_else(duo) -> None:
    recipient, donor, _ = duo
    block = recipient.anatomy.text.blocks[1]
    d = block.d_head
    theirs = donor.model.state_dict()
    expected = {name: weight.clone() for name, weight in recipient.model.state_dict().items()}
    query, out = f"{block.qkv[0]}.weight", f"{block.out}.weight"
    expected[query][d : 2 * d] = theirs[query][d : 2 * d]
    if f"{block.qkv[0]}.bias" in expected:
        bias = f"{block.qkv[0]}.bias"
        expected[bias][d : 2 * d] = theirs[bias][d : 2 * d]
    expected[out][:, d : 2 * d] = theirs[out][:, d : 2 * d]
    with grafted(recipient, donor, Graft(("blocks.1.attn.head.1",))):
        for name, weight in recipient.model.state_dict().items():
            assert torch.equal(weight, expected[name]), name


@torch.no_grad()
def test_forms_are_their_closed_forms() -> None:
    rng = np.random.default_rng(0)
    w, d = rng.normal(size=(12, 9)), rng.normal(size=(12, 9))
    own, theirs = torch.tensor(w, dtype=torch.float32), torch.tensor(w + d, dtype=torch.float32)
    got = new_weights(own, theirs, Graft(("blocks.0",), 0.3))[0]
    np.testing.assert_allclose(got, w + 0.3 * d, atol=1e-5)
    u, s, v = np.linalg.svd(d, full_matrices=False)
    got = new_weights(own, theirs, Graft(("blocks.0",), form="low_rank", rank=2))[0]
    np.testing.assert_allclose(got, w + (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    update = new_weights(own, theirs, Graft(("blocks.0",), 2.0, "random", seed=1), "a")[0] - own
    assert float(update.norm()) == pytest.approx(2 * np.linalg.norm(d), rel=1e-5)
    cosine = float((update * torch.tensor(d)).sum()) / float(update.norm()) / np.linalg.norm(d)
    assert abs(cosine) < 0.35
    again = new_weights(own, theirs, Graft(("blocks.0",), 2.0, "random", seed=1), "b")[0] - own
    assert not torch.allclose(update, again)
    half = new_weights(own.bfloat16(), theirs.bfloat16(), Graft(("blocks.0",), form="random"), "a")[0]
    moved = (half.float() - own.bfloat16().float()).norm()
    expected = (theirs.bfloat16().float() - own.bfloat16().float()).norm()
    assert float(moved) == pytest.approx(float(expected), rel=0.02)
    assert torch.equal(
        new_weights(own, own, Graft(("blocks.0",), form="random"), "a")[0], own
    )  # no update: none


def test_large_low_rank_finds_a_planted_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2100, 3, generator=generator) for _ in range(2))
    planted = left @ right.T
    own = torch.zeros(2100, 2100)
    got, _ = new_weights(own, planted, Graft(("blocks.0",), form="low_rank", rank=3))
    assert (got - planted).norm() < 1e-4 * planted.norm()


def test_an_error_inside_leaves_the_model_as_it_was(duo) -> None:
    recipient, donor, _ = duo
    before = weights_sha256(recipient.model)
    grafts = [
        Graft(("blocks.0", "projector")),
        Graft(("blocks.1.mlp",), 0.5),
        Graft(("vision",), form="random"),
    ]

    def fails() -> None:
        with grafted(recipient, donor, grafts):
            assert weights_sha256(recipient.model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert weights_sha256(recipient.model) == before


@torch.no_grad()
def test_a_graft_has_the_donors_memory_until_somebody_writes(duo) -> None:
    recipient, donor, inputs = duo
    address = torch._C._data_address  # type: ignore[attr-defined]  # data_ptr() would end the sharing
    before = [weights_sha256(one.model) for one in (recipient, donor)]
    pieces = slices_of(recipient, [Graft(("blocks.0",))])[0][1]
    name = next(p.parameter for p in pieces if recipient.model.get_parameter(p.parameter).ndim == 2)
    own, theirs = (one.model.get_parameter(name) for one in (recipient, donor))
    mine, original = own.data_ptr(), theirs.detach().clone()
    with grafted(recipient, donor, Graft(("blocks.0",))):
        expected = recipient(inputs).logits
        assert address(own) == address(theirs) != mine
        assert weights_sha256(recipient.model) != before[0]
        assert address(own) == address(theirs)  # neither a forward pass nor the hash is a copy
        with grafted(recipient, donor, Graft(("blocks.0",))):
            assert torch.equal(recipient(inputs).logits, expected)
            own.mul_(2)
            assert not torch.equal(recipient(inputs).logits, expected) and torch.equal(theirs, original)
        assert torch.equal(recipient(inputs).logits, expected) and torch.equal(own, theirs)
        own.add_(1)
        assert torch.equal(theirs, original) and torch.equal(own, original + 1)
        theirs_again = theirs.detach().clone()
        with grafted(donor, recipient, Graft(("blocks.0",))):
            assert torch.equal(theirs, own)
        assert torch.equal(theirs, theirs_again)
    assert own.data_ptr() == mine
    assert [weights_sha256(one.model) for one in (recipient, donor)] == before


@torch.no_grad()
def test_a_saved_graft_loads_in_transformers_with_the_same_logits(duo, tmp_path) -> None:
    recipient, donor, inputs = duo
    wanted = [Graft(("blocks.1-2",)), Graft(("projector",), 0.5)]
    with grafted(recipient, donor, wanted):
        expected = recipient(inputs).logits
    save_grafted(recipient, donor, wanted, tmp_path / "merged")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    with pytest.raises(FrankenlensError, match="not empty"):
        save_grafted(recipient, donor, wanted, tmp_path / "merged")


def test_refusals(duo) -> None:
    recipient, donor, _ = duo
    with (
        pytest.raises(FrankenlensError, match="both name weights"),
        grafted(recipient, donor, [Graft(("blocks.0",)), Graft(("blocks.0.attn.head.1",))]),
    ):
        pass
    with pytest.raises(FrankenlensError, match="0-"), grafted(recipient, donor, Graft(("blocks.99",))):
        pass
    for form, rank in (("magic", None), ("low_rank", None), ("delta", 2), ("low_rank", 0)):
        with pytest.raises(FrankenlensError, match="form"):
            Graft(("blocks.0",), form=form, rank=rank)
    with pytest.raises(FrankenlensError, match="tuple"):
        Graft(())


def test_partitions() -> None:
    assert dict(thirds(28).regions) == {"Early": (0, 9), "Mid": (10, 18), "Late": (19, 27)}
    assert dict(thirds(28, "code").regions) == {"Early": (0, 8), "Mid": (9, 17), "Late": (18, 27)}
    assert dict(parse_partition("8/12/8", 28).regions) == {"Early": (0, 7), "Mid": (8, 19), "Late": (20, 27)}
    assert parse_partition("2/2/2/2", 8).address("region 3") == "blocks.6-7"
    assert str(of_sizes([1, 2, 3])) == "1/2/3: Early 0-0, Mid 1-2, Late 3-5"
    for text, n in (("8/12/7", 28), ("a/b", 28), ("0/2/2", 4)):
        with pytest.raises(FrankenlensError):
            parse_partition(text, n)
    with pytest.raises(FrankenlensError, match="next layer to cover is 3"):
        Partition("holes", {"a": (0, 2), "b": (4, 5)})
    with pytest.raises(FrankenlensError, match="the model has 6"):
        thirds(9).require(6)
