"""Attention that is computed with its scores is offered only where it is the model's own, however slightly it differs.

What computes it is broken here in small ways, one at a time: scores and patterns that are not its own may not be
offered, in any precision, whatever way the model was opened in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hooks import HookedVLM, attention
from hooks.anatomy import find_anatomy
from hooks.opening import STRUCTURES, structure_key
from hooks.processors import image_token_of
from hooks.selfcheck_attention import SQUARES
from tests.families import redraw, tiny

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
Mutate = Callable[[pytest.MonkeyPatch], None]


def scaled(factor: float) -> Mutate:
    """Scores are larger by a factor."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        own: Any = attention._dense

        def dense(tap, module, query, key, value, mask, scaling, *rest):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return own(tap, module, query, key, value, mask, scale * factor, *rest)

        patch.setattr(attention, "_dense", dense)

    return mutate


def capped(patch: pytest.MonkeyPatch) -> None:
    """Scores are squeezed softly below 50."""
    own: Any = attention._dense

    def dense(*given):
        return own(*given[:-1], {**given[-1], "softcap": 50.0})

    patch.setattr(attention, "_dense", dense)


def one_hidden(patch: pytest.MonkeyPatch) -> None:
    """The last token does not see itself, in one head."""
    own: Any = attention._mask

    def mask(*given) -> Tensor:
        scores = own(*given)
        scores[:, 0, -1, -1] = -torch.inf
        return scores

    patch.setattr(attention, "_mask", mask)


def all_visible(patch: pytest.MonkeyPatch) -> None:
    """Tokens see what follows them, and what is in other windows."""
    patch.setattr(attention, "_mask", lambda tap, module, scores, *rest: scores)


MUTATIONS: dict[str, Mutate] = {
    "scores x 1.001": scaled(1.001),
    "scores x 1.1": scaled(1.1),
    "a soft cap": capped,
    "a hidden key": one_hidden,
    "no mask": all_visible,
}
WAYS = ("watched", "at its word", "again")


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    STRUCTURES.forget()
    yield
    STRUCTURES.forget()


@cache
def pictured(dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """A small model with images, whose type says what it is made of; its tower attends in windows, then fully."""
    given = tiny("qwen2_5_vl")
    config = copy.deepcopy(given.model.config)
    config.text_config.num_hidden_layers, config.vision_config.depth = 1, 2
    config.text_config.layer_types = config.text_config.layer_types[:1]
    model: Any = type(given.model)(config).eval()
    redraw(model, seed=0)
    return model.to(dtype), given.processor


@cache
def written(dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """A small one of text alone, with scores so large that half precision knows them to a quarter."""
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32, initializer_range=1.0)
    model: Any = LlamaForCausalLM(config).eval()
    return model.to(dtype), None


def squares(names: Any) -> set[str]:
    return {name for name in names if name.rsplit(".", 1)[-1] in SQUARES}


def opened(
    given: tuple[PreTrainedModel, Any], way: str, patch: pytest.MonkeyPatch, mutate: Mutate | None = None
) -> HookedVLM:
    """The model in one of the ways, of which `again` has seen it before attention was broken."""
    if way == "again":
        HookedVLM(*given)
    if way == "watched":
        patch.setattr("hooks.opening.is_read_off", lambda config: False)
    if mutate is not None:
        mutate(patch)
    return HookedVLM(*given)


def require_gone(vlm: HookedVLM, gone: set[str], right: frozenset[str]) -> None:
    assert gone
    assert set(right) - set(vlm.hook_points) == set(vlm.absent) == gone
    for name in gone:
        assert "gives out other numbers than the model's own" in vlm.absent[name]


@cache
def unbroken(make: Callable, dtype: torch.dtype) -> frozenset[str]:
    """The points of the model as it is."""
    return frozenset(HookedVLM(*make(dtype)).hook_points)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_attention_that_is_not_the_models_own_is_not_offered(
    dtype: torch.dtype, way: str, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = unbroken(pictured, dtype)
    vlm = opened(pictured(dtype), way, monkeypatch, MUTATIONS[mutation])
    gone = squares(right)
    if mutation == "no mask":  # block 1 of the vision tower has none itself
        gone = {name for name in gone if not name.startswith("vision.blocks.1.")}
    require_gone(vlm, gone, right)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("way", ["watched", "again"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_nor_where_scores_are_large_and_most_keys_weigh_nothing(
    dtype: torch.dtype, way: str, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = unbroken(written, dtype)
    vlm = opened(written(dtype), way, monkeypatch, MUTATIONS[mutation])
    require_gone(vlm, squares(right), right)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_scores_are_as_large_as_that(dtype: torch.dtype) -> None:
    vlm = HookedVLM(*written(dtype))
    names = [f"blocks.0.attn.{leaf}" for leaf in SQUARES]
    cache = vlm.run_with_cache(vlm.opening, names)[1]
    scores, pattern = (cache[f"blocks.0.attn.{leaf}"] for leaf in ("hook_attn_scores", "hook_pattern"))
    assert scores[scores.isfinite()].abs().max() > 50
    assert pattern[0, 0, -1, -1] < 1e-6  # of the key that is hidden


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_the_models_own_attention_is_offered(
    dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = opened(pictured(dtype), way, monkeypatch)
    assert not vlm.absent
    places = {name.rsplit(".", 2)[0] for name in squares(vlm.hook_points)}
    assert places == {"blocks.0", "vision.blocks.0", "vision.blocks.1"}
    assert set(vlm.hook_points) == unbroken(pictured, dtype)


@pytest.mark.parametrize(("way", "n"), [("watched", 1), ("at its word", 0), ("again", 0)])
def test_the_ways_are_what_they_are_called(way: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = pictured(torch.float32), []

    def counted(*rest: Any) -> Any:
        seen.append(rest)
        return find_anatomy(*rest)

    monkeypatch.setattr("hooks.opening.find_anatomy", counted)
    opened(given, way, monkeypatch)
    assert len(seen) == n
    assert STRUCTURES.get(structure_key(given[0], HookedVLM(*given).opening, image_token_of(given[0])))
