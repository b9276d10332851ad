"""Which of a ranking can be moved together: nothing twice, and as many others of a kind as are moved."""

import pytest

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.lockstep import independent, random_components


@pytest.fixture(scope="module")
def vlm():
    opened = HookedVLM.from_pretrained(embedded.path("in"), check=False)
    yield opened
    opened.close()


def test_what_is_part_of_another_or_one_of_its_kind_is_passed_over(vlm) -> None:
    ranked = ["blocks.3.attn", "blocks.3.attn.head.1", "projector", "blocks.5.mlp", "blocks.2.attn.head.0"]
    found = independent(vlm, ranked, 3)
    assert found.components == ("blocks.3.attn", "blocks.5.mlp", "blocks.2.attn.head.0")
    assert found.passed_over == (
        "blocks.3.attn.head.1, part of another",
        "projector, too few others of its kind for a control",
    )
    assert str(found).startswith("blocks.3.attn, blocks.5.mlp, blocks.2.attn.head.0 (passed over: blocks.3")
    assert random_components(vlm, found.components, 2)


def test_no_more_of_a_kind_than_there_are_others(vlm) -> None:
    mlps = [f"blocks.{layer}.mlp" for layer in range(vlm.n_layers)]
    found = independent(vlm, mlps, vlm.n_layers)
    assert found.components == tuple(mlps[: vlm.n_layers // 2])
    assert random_components(vlm, found.components, 1)
    assert independent(vlm, iter(mlps), 2).passed_over == ()
    assert str(independent(vlm, mlps, 1)) == "blocks.0.mlp"


def test_a_ranking_of_which_nothing_can_be_moved_is_refused(vlm) -> None:
    with pytest.raises(FrankenlensError, match="no component that can be moved"):
        independent(vlm, ["projector"], 1)
