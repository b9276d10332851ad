import re
from html.parser import HTMLParser

import pytest

from interp.map.report import save_report
from interp.map.summary import summarise
from tests.interp.map.synthetic import REFUSED, synthetic_map, synthetic_result


class _Page(HTMLParser):
    """The text of a page, and everything it would load."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.loads, self.open = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "line", "circle"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def _page(result, path) -> _Page:
    save_report(result, path / "report.html")
    return _Page((path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return _page(synthetic_result(), tmp_path_factory.mktemp("report"))


def test_the_page_loads_nothing_from_elsewhere(page):
    assert [load.split(",")[0] for load in page.loads] == ["data:image/png;base64"]


def test_the_headline_stands_beside_pairs_that_learnt_nothing(page):
    result = synthetic_result()
    value = float(result["denominator"].sel(direction="rl_to_in"))
    assert f"{value:.2f} [" in page.text
    assert "learnt nothing (bf16): 0.00050 [" in page.text
    assert "learnt nothing (random, own decisions): 0.20 [" in page.text
    assert "48 of 600 qualify" in page.text
    assert "differ somewhere on 311" in page.text
    assert "median: no. 9" in page.text
    assert "3 for 2 × 11" in page.text


def test_text_from_the_data_is_escaped(page):
    assert "<b> for 4 × 7" in page.text


def test_ten_components_of_each_direction_with_controls(page):
    assert page.text.count("The 10 strongest") == 2
    assert page.text.count("blocks.6.mlp") == 2
    assert "blocks.1.attn question" in page.text


def test_now_and_before(page):
    rows = re.search(r"IN's prefix RL's prefix (.*?) Now \(", page.text)
    assert rows
    assert rows[1].count("[") == 4
    assert re.search(r"Before \(IN's weights on RL's\): 1\.\d\d \[", page.text)


def test_what_was_left_out_and_where_it_comes_from(page):
    for words in (
        "image missing 2",
        "no decision: RL is wrong 170",
        "IN's trace does not parse: no </think> 4",
    ):
        assert words in page.text
    for words in ("experiments/embedded/rl", "torch 2", "decision decisive", "inininin"):
        assert words in page.text


def test_a_refused_map_prints_no_recovery_and_says_why(tmp_path):
    page = _page(synthetic_result(refused=REFUSED, size=0.05), tmp_path)
    assert "No recovery is given" in page.text
    assert "is not above that of a pair that learnt nothing (random)" in page.text
    assert "effect, nats" in page.text
    assert not page.loads
    assert "other example 0" not in page.text
    assert " recovery " not in page.text.replace("A recovery is a share", "").replace(
        "No recovery is given", ""
    )


def test_counterfactual_maps_of_one_model_have_a_page_too(tmp_path):
    data = synthetic_map(layers=2).sel(direction=["rl_to_in"]).assign_coords(direction=["clean_to_corrupt"])
    result = summarise(data, resamples=50)
    result.attrs["provenance"] = synthetic_result(layers=2).attrs["provenance"]
    page = _page(result, tmp_path)
    assert "donor − recipient" in page.text
    assert "qualify" not in page.text
