"""What a model is taken for without being watched: the same as what watching it says, or it is watched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy import find_anatomy
from hooks.anatomy.by_names import declared_anatomy
from hooks.anatomy.structure import structure_of
from hooks.opening import STRUCTURES, structure_key
from hooks.processors import image_token_of
from tests.architectures import build
from tests.families import EACH_KIND, TinyVLM, redraw, tiny


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    STRUCTURES.forget()
    yield
    STRUCTURES.forget()


@pytest.fixture
def watchings(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Which models were watched."""
    seen: list[nn.Module] = []

    def counted(model: nn.Module, *rest: object) -> object:
        seen.append(model)
        return find_anatomy(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("hooks.opening.find_anatomy", counted)
    return seen


def said_of(vlm: HookedVLM) -> tuple:
    return vlm.anatomy, vlm.hook_points, list(vlm.hook_points), vlm.absent


def opened(given: TinyVLM) -> HookedVLM:
    return HookedVLM(given.model, given.processor)


@pytest.mark.parametrize("family", EACH_KIND)
def test_a_type_at_its_word_is_what_watching_it_says(
    family: str, watchings: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tiny(family)
    at_its_word = opened(given)
    assert not watchings
    again = opened(given)  # of a structure that is known by now
    STRUCTURES.forget()
    monkeypatch.setattr("hooks.opening.is_read_off", lambda config: False)
    seen = opened(given)
    assert len(watchings) == 1
    assert declared_anatomy(given.model) == seen.anatomy
    assert said_of(at_its_word) == said_of(seen) == said_of(again)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "internvl",  # transformers leaves marks on it
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("mllama", marks=pytest.mark.slow),
    ],
)
def test_a_structure_that_was_proved_is_watched_once(name: str, watchings: list[nn.Module]) -> None:
    given = build(name)
    first = HookedVLM(given.model, inputs=given.inputs)
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    second = HookedVLM(other, inputs=given.inputs)
    assert watchings == [given.model]
    STRUCTURES.forget()
    assert said_of(second) == said_of(HookedVLM(other, inputs=given.inputs))
    assert first.anatomy == second.anatomy
    assert len(watchings) == 2


def test_what_nothing_depends_on_is_found_on_each_model(watchings: list[nn.Module]) -> None:
    given = build("qwen3_moe")
    assert not HookedVLM(given.model, inputs=given.inputs).absent
    other = copy.deepcopy(given.model)
    nn.init.zeros_(other.model.layers[1].self_attn.o_proj.weight)
    second = HookedVLM(other, inputs=given.inputs)
    assert watchings == [given.model]
    assert "blocks.1.attn.hook_z" in second.absent and "no gradient" in second.absent["blocks.1.attn.hook_z"]
    assert "blocks.1.attn.hook_z" in HookedVLM(given.model, inputs=given.inputs).hook_points


@pytest.mark.parametrize("broken", ["k is nothing", "v is k"])
def test_what_hides_in_one_model_is_seen_in_the_next(broken: str, watchings: list[nn.Module]) -> None:
    given = build("mistral")
    poor = copy.deepcopy(given.model)
    attention = poor.model.layers[1].self_attn
    if broken == "k is nothing":
        nn.init.zeros_(attention.k_proj.weight)
    else:
        attention.v_proj.weight = nn.Parameter(attention.k_proj.weight.detach().clone())
    HookedVLM(poor, inputs=given.inputs)
    second = HookedVLM(given.model, inputs=given.inputs)
    assert watchings == [poor, given.model]
    STRUCTURES.forget()
    assert said_of(second) == said_of(HookedVLM(given.model, inputs=given.inputs))


@pytest.mark.parametrize("field", ["final_norm", "embed_entry", "projector", "mlp", "deepstack"])
def test_a_word_that_does_not_hold_is_not_taken(
    field: str, watchings: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tiny("qwen3_vl")
    right = declared_anatomy(given.model)
    first, *others = right.text.blocks
    wrong = {
        "final_norm": replace(right, final_norm=right.text.blocks[0].mid_norm),
        "embed_entry": replace(right, entry=right.vision.blocks[0].path, entry_key=None),
        "projector": replace(right, projector=right.vision.blocks[0].path, projector_key="hidden_states"),
        "mlp": replace(
            right, text=replace(right.text, blocks=(replace(first, writers=first.writers[:1]), *others))
        ),
        "deepstack": replace(right, deepstack={}),
    }[field]
    monkeypatch.setattr("hooks.opening.declared_anatomy", lambda model: wrong)
    vlm = opened(given)
    assert watchings == [given.model]
    assert vlm.anatomy == right


@pytest.mark.parametrize("wrong", ["coefficient", "module", "axes"])
def test_what_does_not_prove_to_be_of_its_structure_is_watched(
    wrong: str, watchings: list[nn.Module]
) -> None:
    given = build("gemma2")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    key = structure_key(given.model, vlm.opening, vlm.image_token_id)
    known = STRUCTURES.get(key)
    assert known is not None
    name = "blocks.0.hook_mlp_out"
    changed = {
        "coefficient": replace(known.points[name], coefficient=0.98),
        "module": replace(known.points[name], module=vlm.anatomy.text.blocks[0].mlp),  # before its post-norm
        "axes": replace(known.points[name], axes=("batch", "pos", "head", "d_head")),
    }[wrong]
    STRUCTURES.keep(key, replace(known, points={**known.points, name: changed}))
    again = HookedVLM(given.model, inputs=given.inputs)
    assert len(watchings) == 2
    assert said_of(again) == said_of(vlm)


def test_a_type_with_a_part_of_another_is_watched(watchings: list[nn.Module]) -> None:
    given = tiny("qwen2_5_vl")
    layer = given.model.model.language_model.layers[0]
    layer.mlp = OtherMLP(layer.mlp)
    vlm = opened(given)
    assert watchings == [given.model]
    assert "blocks.0.hook_mlp_out" in vlm.hook_points


def test_a_known_structure_that_does_not_run_is_refused_in_one_sentence() -> None:
    given = tiny("qwen2_5_vl")
    vlm = opened(given)
    short = {**vlm.opening, "pixel_values": vlm.opening["pixel_values"][:-4]}
    for known in (True, False):
        if not known:
            STRUCTURES.forget()
        with pytest.raises(FrankenlensError, match="does not run on the prompt that it is opened with"):
            HookedVLM(given.model, given.processor, inputs=short)
    assert said_of(opened(given)) == said_of(vlm)


class OtherMLP(nn.Module):
    """Twice what it stands for."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.own(x)


@pytest.mark.parametrize(
    "change", ["class", "number", "hook", "forward", "config", "width", "prompt", "method"]
)
def test_another_way_of_computing_is_another_structure(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tiny("qwen2_5_vl")
    model, inputs = given.model, given.inputs()
    key = structure_of(model, inputs, True)
    assert key is not None and key == structure_of(copy.deepcopy(model), inputs, True)
    layer = model.model.language_model.layers[0]
    if change == "class":
        layer.mlp = OtherMLP(layer.mlp)
    elif change == "number":
        layer.self_attn.scaling = 0.5
    elif change == "table":
        layer.self_attn.table = {"window": 4}
    elif change == "function":
        layer.mlp.act_fn = torch.nn.functional.relu
    elif change == "own config":
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
        layer.self_attn.config.rms_norm_eps = 1e-3
    elif change == "hook":
        layer.register_forward_hook(lambda module, args, output: output)
    elif change == "forward":
        layer.forward = layer.forward
    elif change == "config":
        model.config.text_config.rms_norm_eps = 1e-3
    elif change == "width":
        layer.mlp.down_proj = nn.Linear(layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features)
    elif change == "prompt":
        inputs = given.inputs(sizes=((8, 24),))
    else:
        monkeypatch.setattr(type(layer), "forward", lambda self, *args, **kwargs: args[0])
    other = structure_of(model, inputs, True)
    assert other != key
    assert (other is None) == (change in ("hook", "forward"))


def test_where_a_checkpoint_came_from_is_no_part_of_its_structure() -> None:
    given = tiny("qwen2_5_vl")
    inputs = given.inputs()
    key = structure_of(given.model, inputs, True)
    given.model.config._name_or_path = given.model.name_or_path = "runs/rl/step-400"
    given.model.config.transformers_version = "5.0.1"
    assert structure_of(given.model, inputs, True) == key


def test_a_model_that_transformers_records_of_is_known_again(watchings: list[nn.Module]) -> None:
    given = tiny("llava")  # its vision tower's hidden states are recorded, by hooks that stay
    opened(given)
    assert any(module._forward_hooks for module in given.model.modules())
    opened(given)
    assert (
        not watchings and structure_key(given.model, given.inputs(), image_token_of(given.model)) is not None
    )


def test_how_often_a_model_runs_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tiny("qwen2_5_vl")
    runs: list[int] = []
    own = type(given.model).forward

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        runs.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(given.model), "forward", counted)

    def opening() -> int:
        runs.clear()
        opened(given)
        return len(runs)

    assert (opening(), opening()) == (3, 2)  # at its word (and where the stream is split); known
    STRUCTURES.forget()
    monkeypatch.setattr("hooks.opening.is_read_off", lambda config: False)
    assert (opening(), opening()) == (9, 2)
