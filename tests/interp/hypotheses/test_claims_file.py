"""Files of claims: what a good one becomes, and the line that every mistake is told with."""

import numpy as np
import pytest
import xarray as xr

from hooks import FrankenlensError
from interp.hypotheses import Claim, read_claims

GOOD = """\
alpha: 0.01
correction: bh
found_on: [a, 7]
claims:
  - name: head 2
    component: blocks.8.attn.head.2
    role: reasoning
    at_least: 0.2
    expected: 0.4
  - name: Late over Early
    component: Late
    more_than: [Early, projector]
    body: weights
    quantity: accuracy
    found_on: []
    at_most: 0
"""


def test_a_file_is_a_family(tmp_path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    family = read_claims(path)
    assert (family.name, family.alpha, family.correction, family.level) == ("good.yaml", 0.01, "bh", 0.005)
    assert family.claims == (
        Claim(
            "head 2",
            "blocks.8.attn.head.2",
            at_least=0.2,
            role="reasoning",
            expected=0.4,
            alpha=0.01,
            found_on=frozenset({"a", "7"}),
        ),
        Claim(
            "Late over Early",
            "Late",
            at_most=0.0,
            more_than=("Early", "projector"),
            body="weights",
            quantity="accuracy",
            alpha=0.01,
            found_on=frozenset(),
        ),
    )
    assert [claim.where for claim in family.claims] == [f"{path}:5", f"{path}:10"]
    assert (
        family.claims[0].text
        == "recovery of blocks.8.attn.head.2 (activation, at reasoning, RL into IN) >= 0.2"
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("blocks.8.attn.head.2", "blocks.8.atn.head.2", 6, "is not an address. Did you mean"),
        ("    at_least: 0.2\n    expected: 0.4\n", "", 5, "no effect size; give at_least or at_most"),
        ("alpha: 0.01", "alpha: 1.5", 5, "alpha is 1.5; it lies between 0 and 1"),
        ("alpha: 0.01", "alpha: small", 1, "alpha is 'small'; give a number"),
        ("at_least: 0.2", "at_least: yes", 8, "at_least is True; give a number"),
        ("role: reasoning", "role: resoning", 7, "Did you mean 'reasoning'"),
        ("role: reasoning", "rol: reasoning", 7, "Did you mean 'role'"),
        ("at_most: 0\n", "at_most: 0\n    at_most: 1\n", 17, "'at_most' is given twice"),
        ("correction: bh", "correction: bonferroni", 2, "choose of holm, bh, none"),
        ("name: Late over Early", "name: head 2", 4, "two claims are named 'head 2'"),
        ("  - name: head 2\n    component", "  - component", 5, "a claim needs name"),
        ("[a, 7]", "none.nc", 3, "no such file"),
        ("[a, 7]", "{a: 7}", 3, "a result (map.nc) or a list of ids"),
        ("role: reasoning", "role: [", 7, "no YAML"),
        (GOOD, "claims: 3", 1, "claims must be a list"),
        (GOOD, "- a", 1, "expected keys and values"),
    ],
)
def test_a_mistake_is_one_error_with_its_line(tmp_path, old, new, line, words) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(FrankenlensError) as caught:
        read_claims(path)
    said = str(caught.value)
    assert words in said
    if words == "no YAML":  # where the parser gives up
        assert said.startswith(f"{path}:")
    else:
        assert said.startswith(f"{path}:{line}: ")
    assert len(said.splitlines()) == 1


def test_no_file_and_an_empty_one(tmp_path) -> None:
    with pytest.raises(FrankenlensError, match="no such file: "):
        read_claims(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(FrankenlensError, match="is empty"):
        read_claims(tmp_path / "empty.yaml")


def test_found_on_a_map_takes_its_examples(tmp_path) -> None:
    found = xr.Dataset({"effect": ("example", np.zeros(2))}, {"example": ["p", "q"]}, {"provenance": "{}"})
    found.to_netcdf(tmp_path / "map.nc", engine="h5netcdf")
    (tmp_path / "c.yaml").write_text(GOOD.replace("[a, 7]", "map.nc"))
    first, second = read_claims(tmp_path / "c.yaml").claims
    assert first.found_on == {"p", "q"}
    assert second.found_on == frozenset()
