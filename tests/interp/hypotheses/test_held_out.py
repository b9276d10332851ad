"""What a result remembers of the examples it was found on, and whom the guard lets pass for held out."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr

from hooks.errors import FrankenlensError
from interp.hypotheses import Claim, Family, examples_of, fingerprint, origins
from interp.questions.examples import with_looked_at
from interp.questions.tasks import sample
from interp.results.files import save_dataset

MADE = {"counts": {"examples": 6, "decisions": 2}}
LOOKED_AT = sample("sum", 6, seed=3, split="map")


@pytest.fixture
def effects() -> xr.Dataset:
    """Only two of the six examples have a value."""
    kept = [example.id for example in LOOKED_AT[:2]]
    return xr.Dataset({"effect": ("example", np.zeros(2))}, {"example": kept})


def _family(path) -> Family:
    claim = Claim("a", "blocks.3.mlp", at_least=0.1, found_on=examples_of(path))
    return Family("f", (claim,))


def test_examples_without_a_value_are_no_held_out_ones_whatever_they_are_called(effects, tmp_path) -> None:
    save_dataset(with_looked_at(effects, LOOKED_AT), tmp_path / "map.nc", MADE)
    family = _family(tmp_path / "map.nc")
    without = LOOKED_AT[2:]
    renamed = [dataclasses.replace(example, id=f"other {i}") for i, example in enumerate(without)]
    for prompts in (without, renamed, [*sample("sum", 4, seed=4, split="map"), renamed[0]]):
        n = sum(fingerprint(example) in {fingerprint(one) for one in LOOKED_AT} for example in prompts)
        with pytest.raises(FrankenlensError, match=f"found on {n} of the {len(prompts)} prompts"):
            origins(family, prompts)
        assert origins(family, prompts, allow_reuse=True) == {"a": "exploratory"}
    fresh = sample("sum", 4, seed=4, split="map")
    assert origins(family, fresh) == {"a": "held out"}


def test_adding_the_examples_changes_no_value_and_the_last_word_counts(effects) -> None:
    once = with_looked_at(effects, LOOKED_AT)
    xr.testing.assert_identical(once.drop_dims("looked_at"), effects)
    again = with_looked_at(once, [*LOOKED_AT[:3], *LOOKED_AT[:3]])
    assert again["looked_at"].to_numpy().tolist() == sorted(example.id for example in LOOKED_AT[:3])


def test_a_result_that_does_not_name_all_it_looked_at_is_refused(effects, tmp_path) -> None:
    save_dataset(effects, tmp_path / "old.nc", MADE)
    with pytest.raises(FrankenlensError, match=r"old.nc names 2 of the 6 examples that were looked at"):
        examples_of(tmp_path / "old.nc")
    save_dataset(effects, tmp_path / "whole.nc", {"counts": {"examples": 2}})
    assert examples_of(tmp_path / "whole.nc") == {example.id for example in LOOKED_AT[:2]}
    save_dataset(xr.Dataset({"x": 1}, attrs={"provenance": json.dumps({})}), tmp_path / "none.nc")
    with pytest.raises(FrankenlensError, match="keeps no examples.*with_looked_at"):
        examples_of(tmp_path / "none.nc")


def test_the_refusal_speaks_python_and_the_command_line() -> None:
    claim = Claim("a", "blocks.3.mlp", at_least=0.1, found_on=frozenset({LOOKED_AT[0].id}))
    with pytest.raises(FrankenlensError, match=r"allow_reuse=True.*--allow-reuse") as refused:
        origins(Family("f", (claim,)), LOOKED_AT)
    assert "another seed or data, --seed or --data" in str(refused.value)
