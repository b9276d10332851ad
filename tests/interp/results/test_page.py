"""One kind of page for every experiment: what is written, and what a reader sees of it."""

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from interp.results.files import load_dataset, provenance
from interp.results.marks import Scale
from interp.results.page import SHOWN, Account, Digest, Section, save_sections
from interp.results.picture import Picture, nothing
from interp.statistics import Interval
from tests.interp.results.reading import Page

MODEL = {
    "name_or_path": "some/where/rl",
    "class": "Model",
    "dtype": "torch.float32",
    "weights_sha256": "ab" * 32,
}
MADE = provenance(
    {"rl": MODEL}, {"seed": 3, "in_": None, "tasks": ["sum", "same"]}, {"read": 7}, {"no image": 2}
)
ACCOUNT = Account("what was measured", "5 questions", "Holm over 2", 3, "thirds", {"no answer": 1})


def interval(value: float, low: float, high: float) -> Interval:
    return Interval(np.asarray(value), np.asarray(low), np.asarray(high), np.asarray(9))


def section(name: str = "one", **parts) -> Section:
    return Section(name, f"Section {name}", f"Found {name}:\n  <5> of 7.", ACCOUNT, **parts)


def figure() -> Figure:
    drawn = Figure(figsize=(4, 2), layout="constrained")
    drawn.add_subplot().plot([0, 1])
    return drawn


@pytest.fixture
def written(tmp_path):
    table = pd.DataFrame({"layer": range(SHOWN + 3), "value": [0.123456] * (SHOWN + 3), "seed": "own"})
    digest = pd.DataFrame(
        {"component": ["a", "b"], "recovery": [interval(0.5, 0.0, 1.0), interval(-1.0, np.nan, np.nan)]}
    )
    one = section(
        tables={"values": table},
        figures={"picture": figure()},
        dataset=xr.Dataset({"x": ("example", [1.0, 2.0])}),
        cells=pd.DataFrame({"x": [1.5]}),
        digests=[Digest("The strongest", digest, "Strong by chance.")],
    )
    save_sections([one], tmp_path, MADE)
    return tmp_path


def test_all_that_a_section_has_is_written(written):
    names = ["one.csv", "one.nc", "picture.png", "report.html", "values.csv"]
    assert sorted(path.name for path in written.iterdir()) == names
    assert load_dataset(written / "one.nc").attrs["account"] == ACCOUNT.text


def test_tables_carry_the_account_and_the_cells_of_a_dataset_do_not(written):
    table = pd.read_csv(written / "values.csv")
    assert set(table["definition"]) == {"what was measured"} and set(table["correction"]) == {"Holm over 2"}
    assert set(table["seed"]) == {"own"}  # a column of that name stays
    assert (written / "one.csv").read_text() == "x\n1.5\n"


def test_the_finding_opens_the_page_and_everything_else_follows(written):
    page = Page(written / "report.html")
    text = page.text
    order = [
        "Section one",
        "Found one: <5> of 7.",
        "what was measured; n: 5 questions",
        "The strongest",
        "Left out",
    ]
    places = [text.rindex(words) for words in order]
    assert places == sorted(places)
    for words in (
        "0.50 [0.00, 1.00]",
        "−1 [no interval]",
        "Strong by chance.",
        "and 3 more rows in the file",
    ):
        assert words in text
    for words in ("no image 2", "tasks sum same", "read 7", "torch 2", "abababababababab"):
        assert words in text
    assert "in None" not in text  # what was not set is left out
    assert [load.split(",")[0] for load in page.loads] == ["data:image/png;base64"]


def test_the_findings_are_the_first_section_before_any_figure(tmp_path):
    """Also of several experiments: all findings, then all figures, each with its caption; details stand below."""
    drawn = Picture("What is drawn here, in words.", figsize=(3, 2))
    drawn.add_subplot().plot([0, 1])
    parts = [
        section("one", figures={"first": drawn}, details="More was found."),
        section("two", figures={"second": nothing("Nothing was measured.")}),
    ]
    save_sections(parts, tmp_path, MADE)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.index('<section class="findings"') < html.index("Found one") < html.index("Found two")
    assert html.index("Found two") < html.index("</section>") < html.index("<figure>")
    assert html.index("<figure>") < html.index("What is drawn here, in words.</figcaption>")
    assert html.index("</figcaption>") < html.index("More was found.")
    assert "<p>Nothing was measured.</p>" in html and html.count("<img") == 1
    assert (tmp_path / "second.png").read_bytes()[:4] == b"\x89PNG"


def test_the_file_of_a_figure_has_its_caption_and_the_account(tmp_path):
    drawn: Any = Picture("What is drawn here.", figsize=(3, 2))
    drawn.add_subplot().plot([0, 1])
    save_sections([section(figures={"picture": drawn})], tmp_path, MADE)
    assert drawn._supxlabel is not None
    text = " ".join(drawn._supxlabel.get_text().split())
    assert text.startswith("What is drawn here. what was measured; n: 5 questions")


def test_intervals_are_drawn_on_one_scale_with_0_on_it(written):
    first, second = Page(written / "report.html").marks
    assert float(first["x1"]) < float(first["x2"])
    assert second["x1"] == second["x2"]  # no interval: a bare dot
    scale = Scale.of([interval(0.5, 0.25, 1.0)])
    assert scale.place(0.0) == 4.0 and scale.place(1.0) == 86.0
    mark = scale.mark(interval(0.5, 0.25, 1.0))
    assert mark is not None and (mark.low, mark.value, mark.high) == (24.5, 45.0, 86.0)
    assert scale.mark(interval(np.nan, np.nan, np.nan)) is None
    assert Scale.of([]).place(0.0) == 4.0


def test_several_sections_share_a_page_with_a_way_to_each(tmp_path):
    save_sections([section("one"), section("two")], tmp_path, MADE)
    page = Page(tmp_path / "report.html")
    assert page.loads == ["#one", "#two"]
    assert page.text.index("Found one") < page.text.index("Found two") < page.text.index("Left out")


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</table></style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "javascript:alert(1)",
    "<!--<iframe srcdoc='<script>alert(1)</script>'>",
    "\u202e</td>",
)


class Elements(HTMLParser):
    """Names of elements, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_nothing_that_a_stranger_wrote_runs_on_a_page(tmp_path):
    for n, bad in enumerate(HOSTILE):
        model = dict.fromkeys(MODEL, bad)
        made = provenance({bad: model}, {bad: bad}, {bad: 1}, {bad: 2})
        made["versions"] = {bad: bad}
        table = pd.DataFrame({bad: [bad, bad], "n": [1, 2]})
        account = Account(bad, bad, bad, 3, bad, {bad: 1})
        picture = figure()
        picture.supxlabel("x")
        one = Section(
            "one", bad, bad, account, tables={"t": table}, digests=[Digest(bad, table, bad)],
            figures={"p": picture}, details=bad,
        )  # fmt: skip
        folder = tmp_path / str(n)
        folder.mkdir()
        save_sections([one, one], folder, made)
        page = Elements((folder / "report.html").read_text(encoding="utf-8"))
        assert not page.names & {"script", "iframe", "object", "embed", "base", "form", "link", "input"}
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "srcdoc"]
        links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
        assert links and all(value.startswith(("#one", "data:image/png;base64,")) for value in links)
        text = Page(folder / "report.html").text
        assert "".join(bad.split()) in "".join(text.split())
