"""`frankenlens paths` on the embedded pair, end to end."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.cli import main
from experiments.commands.paths import COMMAND, PathsConfig, _senders, check
from experiments.settings import load_examples, load_pair
from hooks.errors import FrankenlensError
from interp.decision import find_decisions
from interp.map.component_map import component_map
from interp.paths.pair import pair_paths, path_table
from interp.paths.plots import plot_path_graph, plot_path_map
from interp.results.files import load_dataset
from interp.results.page import Section
from tests.interp.statistics.plain_interval import plain_interval, plain_p

FILES = ["paths.csv", "paths.nc", "paths_graph.png", "paths_map.png", "paths_senders.csv", "report.html"]
SENDERS = ("blocks.7.mlp", "blocks.8.attn.head.1")
SMALL = {"n": 24, "decision": "first", "batch_size": 16, "max_new_tokens": 48}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Section]:
    folder = tmp_path_factory.mktemp("paths")
    [section] = COMMAND.run(PathsConfig(out=folder, senders=SENDERS, **SMALL))
    return folder, section


def test_all_files_are_written_and_nothing_else(made: tuple[Path, Section]) -> None:
    out, section = made
    assert sorted(path.name for path in out.iterdir()) == FILES
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "blocks.8.attn.head.1 -&gt; logits" in page and "named in advance" in page
    assert "interaction" in section.finding and "on another example" in section.finding
    assert "pairs that learnt nothing" in section.finding and "n = " in section.finding


def test_every_path_of_each_sender_is_there_and_in_order_they_are_the_whole(
    made: tuple[Path, Section],
) -> None:
    out, _ = made
    effects, table = load_dataset(out / "paths.nc"), pd.read_csv(out / "paths.csv")
    # from MLP 7: 4 queries, 2 keys, 2 values and the MLP of layer 8, and the logits; from a head of layer 8: two
    assert table.groupby(["direction", "sender"]).size().to_dict() == {
        (direction, sender): n
        for direction in ("in_to_rl", "rl_to_in")
        for sender, n in zip(SENDERS, (10, 2), strict=True)
    }
    assert effects["complete"].all()
    assert effects.sizes["looked_at"] == SMALL["n"] >= effects.sizes["example"]
    assert float(np.abs(effects["in_order"] - effects["whole"]).max()) < 1e-4
    sums = effects["direct"].groupby("path_sender").sum().sel(path_sender=list(SENDERS))
    rest = effects["whole"].to_numpy() - sums.transpose("direction", "path_sender", "example").to_numpy()
    assert np.abs(effects["interaction"].to_numpy() - rest).max() < 1e-12


def test_recoveries_are_ratios_of_sums(made: tuple[Path, Section]) -> None:
    out, section = made
    effects = load_dataset(out / "paths.nc")
    table = path_table(effects.isel(direction=[0]), refused="")
    for row in table.to_dict("records"):
        one = effects.sel(direction=row["direction"], path=row["path"])
        expected = one["direct"].sum() / (one["donor"] - one["recipient"]).sum()
        assert row["recovery"] == pytest.approx(float(expected), rel=1e-9)
        assert np.isnan(row["recovery_low"])  # too few decisions for an interval
    assert path_table(effects.isel(path=[0, 1]), refused="no difference")["recovery"].isna().all()
    assert set(section.tables["paths"]["path"]) == set(effects["path"].to_numpy())


def test_intervals_and_ps_of_many_decisions_are_those_of_the_formulas(made: tuple[Path, Section]) -> None:
    """Of the measured effects of few decisions, drawn out to 96 about 48 images, with noise of each image's own."""
    effects = load_dataset(made[0] / "paths.nc")
    rng, n = np.random.default_rng(0), effects.sizes["example"]
    many = effects.drop_vars("example").isel(example=np.arange(96) % n)
    many = many.assign_coords(cluster=("example", [f"image {i // 2}" for i in range(96)]))
    for name in ("direct", "direct_other"):
        size = float(np.abs(many[name]).mean())
        many[name] = many[name] + size * rng.gamma(2, 0.5, (*many[name].shape[:-1], 48)).repeat(2, -1)
    table = path_table(many, refused="")
    for row in table.to_dict("records"):
        one = many.sel(direction=row["direction"], path=row["path"])
        direct, other, clusters = (one[name].to_numpy() for name in ("direct", "direct_other", "cluster"))
        whole = (one["donor"] - one["recipient"]).to_numpy()
        for name, expected in (
            ("direct", plain_interval(direct, None, clusters)),
            ("recovery", plain_interval(direct, whole, clusters)),
            ("other_recovery", plain_interval(other, whole, clusters)),
            ("excess", plain_interval(direct - other, whole, clusters)),
        ):
            found = [row[name + end] for end in ("", "_low", "_high")]
            assert np.isfinite(found).all() and found[1] < found[0] < found[2]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert 0 < row["p"] == pytest.approx(plain_p(direct, clusters), rel=1e-6)
    for _, one in table.groupby("direction"):
        p = one["p"].sort_values().to_numpy()
        holm = np.minimum(1, np.maximum.accumulate(p * np.arange(len(p), 0, -1)))
        np.testing.assert_allclose(one["p_corrected"].sort_values(), holm)
        assert (holm > p).any()


def test_whole_effects_are_those_of_the_component_map(made: tuple[Path, Section]) -> None:
    out, _ = made
    effects = load_dataset(out / "paths.nc")
    config = PathsConfig(**SMALL)
    pair = load_pair(config)
    examples, _ = load_examples(config, config.seed)
    decisions = find_decisions(pair, examples, "first", max_new_tokens=48)
    mapped = component_map(
        pair, decisions, points=("mlp_out", "head"), roles=["all"], batch_size=16, progress=False
    )
    mapped = mapped.sel(component=list(SENDERS), role="all", direction=effects["direction"])
    for name, of_map in (("whole", "effect"), ("whole_other", "control_other")):
        np.testing.assert_allclose(effects[name], mapped[of_map], atol=1e-4)
        assert float(np.abs(effects[name]).max()) > 1e-2
    # chosen by attribution, and by a map: heads and MLPs only, in the order of the layers
    senders, how = _senders(pair, decisions, PathsConfig(top=4, **SMALL))
    assert len(senders) == 4 and "attribution" in how and all(".mlp" in s or ".head." in s for s in senders)
    assert senders == sorted(senders, key=lambda name: int(name.split(".")[1]))
    one = pair_paths(
        pair, decisions, senders=SENDERS[:1], receivers=["logits"], control=False, progress=False
    )
    assert one["in_order"].isnull().all() and one["interaction"].isnull().all()
    table = path_table(one)
    assert isinstance(plot_path_map(table), Figure) and isinstance(plot_path_graph(table, 1), Figure)
    pair.close()


MISTAKES = {
    ("--senders", "blocks.9.mlp"): "there is no layer 9",
    ("--senders", "blocks.2.attn.head.7"): "no head 7 in layer 2",
    ("--senders", "vision.blocks.0.mlp"): "sends nothing",
    ("--receivers", "blocks.5.attn.head.0"): "Add .q, .k or .v",
    ("--receivers", "blocks.5.attn.head.3.k"): "write blocks.5.attn.kv_head.1.k",
    ("--top", "0"): "--top is 0",
    ("--map", "nowhere.nc"): "no such file: nowhere.nc (--map)",
    ("--rl", "somewhere"): "go together",
}


@pytest.mark.parametrize(("given", "match"), MISTAKES.items())
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, given: tuple[str, ...], match: str
) -> None:
    assert main(["paths", "--out", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert match in told[-1] and not (tmp_path / "out").exists()


def test_senders_are_named_or_taken_from_a_map_but_not_both(tmp_path: Path) -> None:
    with pytest.raises(FrankenlensError, match="give one of the two"):
        check(PathsConfig(senders=("embed",), map=tmp_path))
    with pytest.raises(FrankenlensError, match="--top 3 needs no --senders: give that, or leave out --top"):
        COMMAND.prepare(PathsConfig(senders=("embed",), top=3))
