"""The component map on a page: the same page as every other experiment's."""

import json
import re

import pytest

from interp.map.report import map_section
from interp.map.summary import summarise
from interp.results.page import Section, save_sections
from tests.interp.map.synthetic import REFUSED, synthetic_map, synthetic_result
from tests.interp.results.reading import Page


def _page(result, path) -> tuple[Section, Page]:
    section = map_section(result, seed=0)
    save_sections([section], path, json.loads(result.attrs["provenance"]))
    return section, Page(path / "report.html")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return _page(synthetic_result(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(found):
    return found[1]


def test_the_page_loads_nothing_from_elsewhere(page):
    assert [load.split(",")[0] for load in page.loads] == ["data:image/png;base64"]


def test_the_finding_says_what_there_is_to_explain_and_what_explains_it(found):
    overall, sufficient, necessary = found[0].finding.splitlines()
    assert overall.startswith("48 of 600 prompts qualify (decision: decisive). RL − IN = ")
    assert "Pairs that learnt nothing: bf16 0.00050 [" in overall
    assert re.match(
        r"RL into IN: \d+ of \d+ cells are beyond control; strongest: blocks\.6\.mlp at decision 0\.\d\d \[.*"
        r"\(random directions as large: 0\.\d+ \[.*; noise pairs reach 0\.0\d+, as another example's\); blocks\.6\.attn"
        r"\.head\.1 at decision .*, more than another example's\)",
        sufficient,
    )
    assert re.match(r"IN into RL: \d+ of .*; strongest: blocks\.6\.mlp at decision 0\.", necessary)
    assert sufficient.count("[") == 4  # two components, each with its control; no third is beyond control


def test_the_headline_stands_beside_pairs_that_learnt_nothing(page):
    result = synthetic_result()
    value = float(result["denominator"].sel(direction="rl_to_in"))
    assert re.search(rf"What a recovery of 1 is worth pair nats RL − IN {value:.2f} \[", page.text)
    assert "learnt nothing: bf16 0.00050 [" in page.text
    assert "learnt nothing: random, own decisions 0.20 [" in page.text


def test_what_was_decided_where(page):
    for words in (
        "48 of 600",
        "differ somewhere 311",
        "IN 365, RL 430",
        "median: no. 9; middle half 7 to 14, last 16",
        "reasoning 47, answer 1",
        "3 for 2 × 11",
    ):
        assert words in page.text


def test_text_from_the_data_is_escaped(page):
    assert "<b> for 4 × 7" in page.text


def test_ten_components_of_each_direction_with_controls(found, page):
    assert page.text.count("The 10 strongest") == 2
    digests = [digest for digest in found[0].digests if "strongest" in digest.heading]
    for digest in digests:
        columns = [
            "component",
            "tokens",
            "recovery",
            "n",
            "beyond control",
            "random directions",
            "noise pairs",
        ]
        columns += ["other example", "n, other", "its change moves", "itself"]
        assert list(digest.table) == columns and len(digest.table) == 10
        assert digest.table["beyond control"].tolist()[:2] == ["yes", "yes"]
        assert digest.table["its change moves"][0] == "as another example's"
        assert digest.table["component"][0] == "blocks.6.mlp"
        assert "biased upward" in digest.note
    assert len(page.marks) > 40  # every interval is drawn


def test_now_and_before(page):
    rows = re.search(r"IN's prefix RL's prefix (.*?) Now \(", page.text)
    assert rows
    assert rows[1].count("[") == 4
    assert re.search(r"Before \(IN's weights on RL's\): 1\.\d\d \[", page.text)


def test_what_was_left_out_and_where_it_comes_from(found, page):
    assert found[0].account.left_out["no decision: RL is wrong"] == 170
    assert found[0].account.left_out["IN's trace does not parse: no </think>"] == 4
    assert found[0].account.counts == {"examples": 600, "decisions": 48}
    for words in (
        "image missing 2",
        "no decision: RL is wrong (170)",
        "48 decisions (decisive) of 600 prompts",
    ):
        assert words in page.text
    for words in ("experiments/embedded/rl", "torch 2", "decision decisive", "inininin"):
        assert words in page.text


def test_a_refused_map_prints_no_recovery_and_says_why(tmp_path):
    section, page = _page(synthetic_result(refused=REFUSED, size=0.05), tmp_path)
    assert "No recovery is given" in section.finding.splitlines()[1]
    assert "is not above that of a pair that learnt nothing (random)" in page.text
    assert "effect, nats" in page.text
    for digest in section.digests:
        assert not {"recovery", "other example"} & set(digest.table)


def test_counterfactual_maps_of_one_model_have_a_page_too(tmp_path):
    data = synthetic_map(layers=2).sel(direction=["rl_to_in"]).assign_coords(direction=["clean_to_corrupt"])
    result = summarise(data)
    result.attrs["provenance"] = synthetic_result(layers=2).attrs["provenance"]
    section, page = _page(result, tmp_path)
    assert "donor − recipient" in page.text
    assert "qualify" not in page.text and section.account.left_out == {}
    assert section.finding.splitlines()[1].startswith("clean_to_corrupt: ")
    assert "no noise pairs being run" in page.text
