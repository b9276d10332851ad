"""What a block's parts do and which matrices are theirs: told from elsewhere, and held against plain hooks.

The roles expected here are those of transformers' source; which tokens a part moves is measured anew, and so is which
modules run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import Block, Writer
from hooks.points import writer_points
from hooks.weights import weight_slices
from tests.architectures import ARCHITECTURES, build

ROLES = {
    "blip": ("blocks.0", ["mixer", "rest"]),  # attention that calls no interface; norms in the stream
    "git": ("blocks.0", ["mixer", "rest"]),
    "blip-2": ("blocks.0", ["attn", "mlp"]),
    "zamba2": ("blocks.1", ["mixer"]),  # Mamba behind a whole transformer layer
    "florence2": ("blocks.0", ["attn", "rest"]),
    "vision-encoder-decoder": ("blocks.0", ["attn", "rest"]),
    "granite4_vision": ("tower_2.blocks.0", ["attn", "rest"]),
    "qianfan_ocr": ("vision.blocks.0", ["attn", "mlp"]),
    "evolla": ("blocks.1", ["attn", "mlp", "cross_attn", "mlp"]),  # an adapter that reads proteins
    "mllama": ("blocks.1", ["cross_attn", "mlp"]),
    "falcon_h1": ("blocks.0", ["mixer", "attn", "mlp"]),
}
DEFAULT = ("blip", "blip-2", "zamba2", "evolla", "mllama")


def some(names: Any) -> list[Any]:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


def block_of(vlm: HookedVLM, name: str) -> Block:
    tower, _, layer = name.rpartition("blocks.")
    return vlm.anatomy.towers[tower].blocks[int(layer)]


@pytest.mark.parametrize("name", some(ROLES))
def test_a_part_is_called_what_it_is(name: str) -> None:
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    place, roles = ROLES[name]
    assert [writer.role for writer in block_of(vlm, place).writers] == roles
    assert all(f"{place}.hook_{role}_out" in vlm.hook_points for role in roles)
    for part in {"attn", "cross_attn", "mixer", "mlp"} - set(roles):
        with pytest.raises(FrankenlensError, match=f"has no {part}"):
            weight_slices(given.model, vlm.anatomy, f"{place}.{part}")


@pytest.mark.parametrize("name", some(ARCHITECTURES))
@torch.no_grad()
def test_what_is_no_attention_and_no_mixer_keeps_tokens_apart(name: str) -> None:
    """The stream that a part reads gets another first token; of an MLP, no other row moves."""
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    for place in [f"blocks.{layer}" for layer in range(min(2, vlm.n_layers))]:
        block = block_of(vlm, place)
        for writer, point in zip(block.writers, writer_points(place, block), strict=True):
            source = _read_at(vlm, place, writer)
            if (
                point not in vlm.hook_points
                or source is None
                or writer.role in ("attn", "cross_attn", "rest")
            ):
                continue
            if writer.module != writer.body:  # a convolution may stand where others have a norm
                continue
            _, cache = vlm.run_with_cache(given.inputs, [point])
            with vlm.hooks([(source, _another_first)]):
                _, moved = vlm.run_with_cache(given.inputs, [point])
            old, new = cache[point][0], moved[point][0]
            change = (new - old).abs().reshape(len(old), -1).amax(-1) / old.abs().max()
            assert change[0] > 1e-2
            assert bool((change[1:] > 1e-6).any()) == (writer.role == "mixer")


def _another_first(stream: Tensor, hook: Any) -> Tensor:
    new = stream.clone()
    new[:, 0] = 1.5 * new[:, 0].roll(1, -1) + 1
    return new


def _read_at(vlm: HookedVLM, place: str, writer: Writer) -> str | None:
    if writer.state == 0:
        return f"{place}.hook_resid_pre"
    points = vlm.hook_points.values()
    return next(
        (p.name for p in points if p.module == writer.reader and p.place == "input" and p.inplace), None
    )


@pytest.mark.parametrize("name", some(ARCHITECTURES))
@torch.no_grad()
def test_every_matrix_that_is_used_belongs_to_one_part(name: str) -> None:
    given = build(name)
    model, ran = given.model, set()
    vlm = HookedVLM(model, inputs=given.inputs, check=False)

    def look(path: str) -> Any:
        return lambda *_: ran.add(path)

    handles = [module.register_forward_hook(look(path)) for path, module in model.named_modules()]
    model(**given.inputs)
    for handle in handles:
        handle.remove()
    for block in (block for tower in vlm.anatomy.towers.values() for block in tower.blocks if block.writers):
        parts = [path for writer in block.writers for path in _paths(writer)]
        for parameter, value in model.named_parameters():
            path = parameter.rpartition(".")[0]
            if not parameter.startswith(f"{block.path}.") or value.ndim < 2 or path not in ran:
                continue
            owners = [part for part in parts if path == part or path.startswith(f"{part}.")]
            assert len(owners) == 1, (parameter, owners)


def _paths(writer: Writer) -> list[str]:
    behind = [writer.module] if writer.module != writer.body and not writer.rest else []
    return [*(writer.parts or (writer.body,)), *behind]


@torch.no_grad()
def test_a_neuron_of_two_layers_side_by_side_has_a_row_and_a_column() -> None:
    """OPT's fc1 and fc2 are no children of an MLP: other numbers in the row of one neuron move that neuron alone."""
    given = build("blip-2")
    model = given.model
    vlm = HookedVLM(model, inputs=given.inputs)
    assert vlm.can("neurons")
    row, bias, column = weight_slices(model, vlm.anatomy, "blocks.0.mlp.neuron.3")
    layer = vlm.anatomy.text.blocks[0].path
    assert (row.parameter, bias.parameter) == (f"{layer}.fc1.weight", f"{layer}.fc1.bias")
    assert (column.parameter, column.dim, column.start) == (f"{layer}.fc2.weight", 1, 3)
    whole = {piece.parameter for piece in weight_slices(model, vlm.anatomy, "blocks.0.mlp")}
    assert whole == {f"{layer}.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}

    name = "blocks.0.mlp.hook_post"
    _, before = vlm.run_with_cache(given.inputs, [name])
    parameters = dict(model.named_parameters())
    row.of(parameters[row.parameter]).mul_(-1)
    bias.of(parameters[bias.parameter]).add_(10)
    _, after = vlm.run_with_cache(given.inputs, [name])
    moved = (after[name] - before[name]).abs().flatten(0, -2).amax(0)
    assert moved[3] > 1 and moved[torch.arange(len(moved)) != 3].max() == 0


class Shifted(nn.Module):
    """An MLP that hands each token a part of the one before it."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given + self.share * given.roll(1, 1))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_a_part_that_mixes_tokens_a_little_is_a_mixer(dtype: torch.dtype, share: float) -> None:
    """A little: what the numbers of this precision show."""
    given = build("llama", dtype=dtype)
    layer = given.model.model.layers[1]
    layer.mlp = Shifted(layer.mlp, share)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    roles = [[writer.role for writer in block.writers] for block in vlm.anatomy.text.blocks]
    assert roles[0] == ["attn", "mlp"] and roles[1] == ["attn", "mixer"]
