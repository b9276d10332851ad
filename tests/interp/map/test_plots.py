import io

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from interp.map.plots import denominator_text, plot_map, plot_strongest
from interp.map.summary import summarise
from interp.results.palette import EFFECT
from tests.interp.map.synthetic import NULLS, REFUSED, synthetic_map


@pytest.fixture(scope="module")
def summary():
    return summarise(synthetic_map(), nulls=NULLS)


def _panels(figure: Figure) -> dict[str, list]:
    """Axes by title, in the order of the directions."""
    found: dict[str, list] = {}
    for axes in figure.axes:
        found.setdefault(axes.get_title(), []).append(axes)
    return found


def _texts(figure: Figure) -> str:
    parts = [figure, *figure.subfigs]
    texts = [text.get_text() for part in parts for text in part.texts]
    return "\n".join(texts + [part.get_suptitle() for part in parts])


def _colours(axes) -> np.ndarray:
    return np.asarray(axes.get_images()[0].get_array())


def _drawn(figure: Figure) -> np.ndarray:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=50)
    out.seek(0)
    return image.imread(out)


def _norm_of(figure, colours):
    """Where on the scale of effects each colour stands, 0 to 1; pale cells next to what they are a tint of."""
    scale = matplotlib.colormaps[EFFECT](np.linspace(0, 1, 512))
    tinted = np.concatenate([scale, 0.35 * scale + 0.65])[:, :3]
    nearest = np.abs(colours[..., None, :3] - tinted).sum(-1).argmin(-1)
    return (nearest % 512) / 511


def test_one_line_per_direction_and_one_panel_per_kind_of_component(summary):
    panels = _panels(plot_map(summary))
    for title in ("residual stream", "attention", "MLP", "heads, decision", "vision"):
        assert len(panels[title]) == 2
    shape = _colours(panels["MLP"][0]).shape[:2]
    assert shape == (9, 6)
    assert _colours(panels["heads, decision"][0]).shape[:2] == (9, 4)
    assert [t.get_text() for t in panels["vision"][0].get_yticklabels()] == ["0", "1", "2", "projector"]


def test_colours_say_the_sign_and_the_planted_cell_is_the_strongest(summary):
    mlp = _colours(_panels(plot_map(summary))["MLP"][0])
    roles = [label.get_text() for label in _panels(plot_map(summary))["MLP"][0].get_xticklabels()]
    at = roles.index("decision")
    strength = _norm_of(plot_map(summary), mlp)
    assert np.unravel_index(strength[:, :at].argmax(), strength.shape) != (6, at)
    assert strength[:, at].argmax() == 6
    residual = _norm_of(plot_map(summary), _colours(_panels(plot_map(summary))["residual stream"][0]))
    assert residual[0, roles.index("image")] < 0.5  # against the donor


def test_cells_without_examples_are_see_through_to_the_grey(summary):
    data = synthetic_map()
    data["effect"].loc[{"role": "question", "component": "blocks.4.mlp"}] = np.nan
    axes = _panels(plot_map(summarise(data)))["MLP"][0]
    alpha = _colours(axes)[..., 3]
    assert alpha[4, 1] == 0
    assert (alpha == 0).sum() == 1


def test_what_is_not_beyond_control_is_struck_through(summary):
    def struck(title):
        axes = _panels(plot_map(summary))[title][0]
        roles = [label.get_text() for label in axes.get_xticklabels()]
        middles = {tuple(float(np.mean(ends)) for ends in line.get_data()) for line in axes.lines}
        return middles, roles

    attention, roles = struck("attention")
    assert (roles.index("question"), 1) in attention  # random directions do as much
    mlp, roles = struck("MLP")
    assert (roles.index("decision"), 6) not in mlp and (roles.index("image"), 6) in mlp


def test_the_figure_says_what_a_recovery_of_1_is_worth(summary):
    text = _texts(plot_map(summary))
    value = float(summary["denominator"].sel(direction="rl_to_in"))
    assert f"RL − IN = {value:.2f} [" in text.replace("\n", " ")
    assert "random, own decisions 0.20" in text.replace("\n", " ")
    assert "n = 48" in text


def test_the_denominator_keeps_its_sign_when_only_one_direction_was_run():
    both = summarise(synthetic_map())
    back = summarise(synthetic_map().sel(direction=["in_to_rl"]))
    assert denominator_text(back).split(" [")[0] == denominator_text(both).split(" [")[0]


def test_a_refused_map_is_not_drawn():
    figure = plot_map(summarise(synthetic_map(size=0.05), refused=REFUSED))
    (axes,) = figure.axes
    assert not axes.get_images()
    assert axes.texts[0].get_text().startswith("No recovery is given: the denominator, 0.05")
    axes = plot_strongest(summarise(synthetic_map(size=0.05), refused=REFUSED), "rl_to_in").axes[0]
    assert axes.get_xlabel() == "patched − recipient (nats)"


@pytest.mark.parametrize("points", [["head"], ["resid_pre"], ["projector"], ["attn_out", "z"]])
def test_any_selection_of_points_can_be_drawn(points):
    data = synthetic_map(layers=2, heads=2, vision=1, examples=6)
    data["point"] = data["point"].where(data["point"] != "head", "z") if "z" in points else data["point"]
    data = data.isel(component=np.isin(data["point"].to_numpy(), points))
    assert _drawn(plot_map(summarise(data))).std() > 0


def test_a_large_model_can_be_drawn():
    data = synthetic_map(layers=28, heads=28, vision=32, examples=4)
    assert _drawn(plot_map(summarise(data))).std() > 0


def test_strongest_shows_ten_components_with_their_controls(summary):
    figure = plot_strongest(summary, "rl_to_in")
    axes = figure.axes[0]
    assert len(axes.get_yticks()) == 10
    assert axes.get_yticklabels()[0].get_text() == "blocks.6.mlp  ·  decision"
    assert len(axes.containers) == 2
    assert "o" in [line.get_marker() for line in axes.lines]
    assert _drawn(figure).std() > 0
