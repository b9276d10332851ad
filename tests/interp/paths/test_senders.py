"""The strongest senders of a map with known effects."""

import pytest

from hooks.errors import FrankenlensError
from interp.paths import strongest_senders
from tests.interp.map.synthetic import synthetic_map


def test_the_strongest_heads_and_mlps_in_the_order_of_the_layers() -> None:
    effects = synthetic_map()
    assert strongest_senders(effects, 2, "decision") == ["blocks.6.mlp", "blocks.6.attn.head.1"]
    assert strongest_senders(effects, 1) == ["blocks.6.mlp"]
    size = abs(effects["effect"].sel(role="decision").mean("example")).max("direction")
    best = size.sel(
        component=[name for name in effects["component"].to_numpy() if ".mlp" in name or "head" in name]
    )
    expected = set(best.sortby(best)["component"].to_numpy()[-5:])
    assert set(strongest_senders(effects, 5, "decision")) == expected


def test_a_map_without_the_role_or_without_heads_and_mlps_is_refused() -> None:
    effects = synthetic_map(layers=2)
    with pytest.raises(FrankenlensError, match="no role 'answer', only image, question"):
        strongest_senders(effects, 1, "answer")
    with pytest.raises(FrankenlensError, match="neither heads nor MLPs"):
        strongest_senders(effects.isel(component=effects["point"] == "vision"), 1)
