import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks import Address, FrankenlensError

pairs = st.tuples(st.integers(0, 99), st.integers(0, 5)).map(lambda p: (p[0], p[0] + p[1]))


@st.composite
def addresses(draw: st.DrawFn) -> Address:
    kind = draw(st.sampled_from(["embed", "projector", "ln_final", "unembed", "vision", "blocks"]))
    if kind != "blocks":
        return Address(kind, "vision" if kind == "vision" else "text")
    sub, unit = draw(
        st.sampled_from(
            [
                (None, None),
                ("attn", None),
                ("attn", "head"),
                ("attn", "kv_head"),
                ("mlp", None),
                ("mlp", "neuron"),
            ]
        )
    )
    tower = draw(st.sampled_from(["text", "vision"]))
    return Address("blocks", tower, draw(pairs), sub, unit, draw(pairs) if unit else None)


@given(addresses())
def test_text_and_address_are_one_thing(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(addresses())
def test_expand_covers_the_ranges_exactly_once(address: Address) -> None:
    singles = list(address.expand())
    sizes = [pair[1] - pair[0] + 1 for pair in (address.layers, address.units) if pair is not None]
    expected = 1
    for size in sizes:
        expected *= size
    assert len(set(singles)) == len(singles) == expected
    assert all(list(single.expand()) == [single] for single in singles)


@pytest.mark.parametrize(
    ("text", "hook"),
    [
        ("embed", "hook_embed"),
        ("blocks.17", "blocks.17.hook_resid_post"),
        ("blocks.17.attn", "blocks.17.hook_attn_out"),
        ("blocks.17.attn.head.3", "blocks.17.attn.hook_result"),
        ("vision.blocks.5.mlp", "vision.blocks.5.hook_mlp_out"),
        ("blocks.2.mlp.neuron.7", "blocks.2.mlp.hook_post"),
        ("projector", "projector.hook_out"),
        ("ln_final", "ln_final.hook_normalized"),
    ],
)
def test_activation_body(text: str, hook: str) -> None:
    assert Address.parse(text).hook_name == hook


@pytest.mark.parametrize("text", ["unembed", "blocks.1.attn.kv_head.0", "blocks.1-2.mlp"])
def test_no_single_activation_is_said(text: str) -> None:
    with pytest.raises(FrankenlensError, match=text.split(".")[0]):
        _ = Address.parse(text).hook_name


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("block.3", "blocks"),
        ("blocks.3.atn", r"blocks\.17\.attn"),
        ("blocks.5-2", "write 2-5"),
        ("blocks.3.mlp.head.1", "neuron"),
        ("blocks.3.attn.neuron.1", "head / kv_head"),
        ("", "Valid forms|Did you mean|Nearest"),
        ("blocks.x", "not an address"),
    ],
)
def test_a_wrong_address_names_a_valid_one(text: str, match: str) -> None:
    with pytest.raises(FrankenlensError, match=match):
        Address.parse(text)
