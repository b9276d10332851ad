"""Where image tokens lie, tables of planted numbers, and figures that hold what they are given."""

import re

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from hooks import FrankenlensError
from interp.lens import image_grids, logit_lens, plots
from interp.lens.tables import (
    BEFORE_ANSWER,
    answer_position,
    answer_table,
    apart_table,
    attribution_table,
    own_table,
    per_prompt,
    roles_of,
)
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.statistics import mean_interval, mean_test
from tests.families import EACH_KIND, FAMILIES, QWEN, tiny
from tests.interp.lens.lens_models import family, prompts_of


@torch.no_grad()
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_token_is_where_a_white_patch_moves_it(name) -> None:
    """Whitening a corner of the image moves the projector's output most at the token of that corner.

    The vision towers mix patches, so what is compared is the tower's input: the patches that a token is made of.
    """
    made = tiny(name)
    builder = PromptBuilder(made.processor, TraceFormat())
    size = (40, 32) if name in QWEN else (32, 16)
    black = Image.new("RGB", size)
    prompt = builder.build(Example("a", (black,), "what color", "red"))
    grids = image_grids(prompt)
    positions = np.concatenate([grid.positions.ravel() for grid in grids])
    assert sorted(positions.tolist()) == prompt.positions("image").tolist()
    plain = _features(made, prompt)
    for grid in grids:
        rows, columns = grid.positions.shape
        left, top, right, bottom = grid.box
        for row, column in ((0, 0), (rows - 1, 0), (0, columns - 1), (rows - 1, columns - 1)):
            x = size[0] * (left + (right - left) * (column + 0.5) / columns)
            y = size[1] * (top + (bottom - top) * (row + 0.5) / rows)
            white = black.copy()
            white.paste((255, 255, 255), (int(x) - 1, int(y) - 1, int(x) + 1, int(y) + 1))
            moved = _features(made, builder.build(Example("a", (white,), "what color", "red"))) - plain
            order = prompt.positions("image").tolist()
            mine = [order.index(int(p)) for p in grid.positions.ravel()]
            change = moved.abs().flatten(1).sum(1)[mine]
            assert int(change.argmax()) == row * columns + column


def _features(made, prompt) -> torch.Tensor:
    """The pixels that each image token is made of, [image_token, pixel], in the order of the projector's output."""
    pixels = prompt.inputs["pixel_values"]
    if made.family in QWEN:  # patches stand 2 x 2 merged ones together
        return pixels.unflatten(0, (-1, 4)).flatten(1)
    pixels = pixels.flatten(0, pixels.ndim - 4)
    side = 6 if made.family == "llava" else 8  # two patches of 4 are merged by the connector
    tiles = pixels.unfold(2, side, side).unfold(3, side, side)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)


def test_two_images_and_no_image() -> None:
    for name in FAMILIES:
        made = tiny(name)
        prompt = prompts_of(made)[0]
        grids = image_grids(prompt)
        assert {grid.image for grid in grids} == {0, 1}
        held = np.concatenate([grid.positions.ravel() for grid in grids])
        assert sorted(held.tolist()) == prompt.positions("image").tolist()
    blind = prompt.builder.build(Example("blind", (), "how many", "1"))
    with pytest.raises(FrankenlensError, match="'blind' has no image token"):
        image_grids(blind)


def _lens(values: np.ndarray, roles: list[list[str]], first: str, names: list[str]) -> xr.Dataset:
    """A lens with planted kl, [model layer token]."""
    row = np.repeat(range(len(roles)), [len(some) for some in roles])
    position = np.concatenate([np.arange(len(some)) for some in roles])
    dims = (first, "layer", "token")
    held = {"kl": (dims, values), "kl_reverse": (dims, 2 * values), "overlap": (dims, values / 2)}
    held |= {"entropy": (dims, values), "same_top": (dims, values > 0)}
    held["token_id"] = ((*dims, "rank"), np.zeros((*values.shape, 1), dtype=int))
    held["final_id"] = ((first, "token"), (np.arange(values.shape[2]) % 2)[None].repeat(len(names), 0))
    coords = {
        first: names,
        "layer": range(values.shape[1]),
        "row": ("token", row),
        "position": ("token", position),
    }
    return xr.Dataset(held, coords | {"role": ("token", np.concatenate(roles))}, {"top_k": 5, "n_layers": 1})


ROLES = [["image", "question", "template", "answer"]] * 12


def test_tables_are_means_over_tokens_then_prompts_with_the_houses_intervals() -> None:
    rng = np.random.default_rng(0)
    roles = [*ROLES[:1] * 40, ["question", "answer", "answer"]]
    values = rng.uniform(1, 2, (2, 2, 163))
    lens = _lens(values, roles, "model", ["in", "rl"])
    assert roles_of(lens) == ["image", "question", "answer", "template", BEFORE_ANSWER]
    row, role = lens["row"].to_numpy(), lens["role"].to_numpy()
    expected = np.stack([values[..., (row == r) & (role == "answer")].mean(-1) for r in range(41)], -1)
    np.testing.assert_allclose(per_prompt(lens["kl"], "answer"), expected)
    before = per_prompt(lens["kl"], BEFORE_ANSWER)
    np.testing.assert_allclose(before[..., 0], values[..., 2])
    np.testing.assert_allclose(before[..., 40], values[..., 160])
    assert np.isnan(per_prompt(lens["kl"], "image")[..., 40]).all()
    table = own_table(lens)
    one = table.query("model == 'rl' and role == 'answer' and layer == 1").iloc[0]
    interval = mean_interval(expected[1, 1])
    assert np.isfinite(interval.low)
    np.testing.assert_allclose(
        [one["kl"], one["kl_low"], one["kl_high"]], [interval.value, interval.low, interval.high]
    )
    assert table.query("role == 'image'")["n"].unique().tolist() == [40]
    agrees = per_prompt(
        (lens["token_id"].isel(rank=0) == lens["final_id"]).transpose(*lens["kl"].dims), "answer"
    )
    np.testing.assert_allclose(one["agrees"], agrees[1, 1].mean())


def test_the_excess_is_over_the_null_that_is_nearest() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(1, 2, (3, 2, 160))
    values[1] -= 1
    values[0, 1] += 3
    table = apart_table(_lens(values, ROLES[:1] * 40, "comparison", ["rl", "bf16", "random"]))
    image = np.arange(160) % 4 == 0
    one = table.query("comparison == 'rl' and role == 'image' and layer == 1").iloc[0]
    np.testing.assert_allclose(one["excess"], (values[0, 1] - values[2, 1])[image].mean())
    np.testing.assert_allclose(one["p"], mean_test((values[0, 1] - values[2, 1])[image]))
    assert one["p_corrected"] < 0.05 and table.query("comparison != 'rl'")["excess"].isna().all()
    assert abs(table.query("comparison == 'rl' and role == 'image' and layer == 0")["excess"].iloc[0]) < 0.5


def test_prompts_about_one_image_count_as_one() -> None:
    """Every prompt twice: the interval of those given once."""
    rng = np.random.default_rng(3)
    values = rng.uniform(1, 2, (2, 2, 160))
    once = _lens(values, ROLES[:1] * 40, "model", ["in", "rl"])
    twice = _lens(np.concatenate([values, values], -1), ROLES[:1] * 80, "model", ["in", "rl"])
    of = np.array([f"image {row % 40}" for row in twice["row"].to_numpy()])
    columns = ["kl", "kl_low", "kl_high"]
    expected = own_table(once)[columns]
    together = own_table(twice.assign_coords(cluster=("token", of)))[columns]
    np.testing.assert_allclose(together, expected)
    assert (own_table(twice)["kl_low"] > expected["kl_low"]).all()  # taken for twice as many


def test_answers_and_attribution_are_paired() -> None:
    rng = np.random.default_rng(2)
    stays = np.stack([rng.integers(4, 8, 40), rng.integers(2, 6, 40)])
    word = np.array([["1"] * 40, ["1"] * 30 + ["2"] * 10])
    layers = ("model", "token"), stays
    held = {"appears": layers, "stays": layers, "word": (("model", "token"), word)}
    answers = xr.Dataset(held, {"model": ["in", "rl"]})
    null = answers.sel(model="in")
    table = answer_table(answers, {"random": ("in", null)})
    np.testing.assert_allclose(table["difference"], (stays[1] - stays[0]).mean())
    assert table["same_answer"].tolist() == [0.75] * 2 and (table["random_difference"] == 0).all()
    np.testing.assert_allclose(table["p_corrected"], np.minimum(2 * table["p"], 1))

    parts = rng.normal(0, 1, (2, 3, 40))
    parts[:, 2] = 0
    names = ["embed", "blocks.0.mlp", "rounding"]
    about = {"kind": ["embed", "mlp", "rounding"], "sublayer": names, "layer": [-1, 0, -1], "head": [-1] * 3}
    coords = {name: ("component", values) for name, values in about.items()}
    found = xr.Dataset(
        {
            "contribution": (("model", "component", "token"), parts),
            "logit": (("model", "token"), parts.sum(1)),
        },
        {"model": ["in", "rl"], "component": names} | coords,
    )
    table = attribution_table(found, {"random": ("in", found.sel(model="in"))})
    assert table["component"].tolist() == ["embed", "blocks.0.mlp", "rounding", "logit"]
    np.testing.assert_allclose(table["difference"][:3], (parts[1] - parts[0]).mean(-1))
    np.testing.assert_allclose(table["in"][3], parts[0].sum(0).mean())
    assert table["p_corrected"].isna().tolist() == [False, False, True, True]
    assert (table["random_difference"] == 0).all()


def test_the_answer_position_is_the_one_before_the_answer() -> None:
    prompt = prompts_of(tiny("llava"))[0]
    at = answer_position(prompt)
    assert prompt.roles[at + 1] == "answer" and prompt.roles[at] == "template"
    assert prompt.builder.decode([prompt.ids[at + 1]]) == "5"
    with pytest.raises(FrankenlensError, match="'e0' holds no answer"):
        answer_position(prompt.truncated(prompt.n_prompt_tokens))


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_figures_hold_the_words_of_the_lens(tmp_path) -> None:
    _, vlm, prompts = family("idefics3")
    lens = logit_lens(vlm, prompts, where="all", progress=False)
    figure = plots.plot_tokens(lens, row=1, last=6)
    some = lens.isel(token=lens["row"].to_numpy() == 1).isel(token=slice(-6, None), rank=0)
    assert _texts(figure) == [plots._shown(word) for word in some["word"].to_numpy().ravel()]
    figure = plots.plot_image(lens, prompts[0], layers=[0, 3])
    grids = image_grids(prompts[0])
    words = []
    for grid in grids:
        for layer in (0, 3):
            one = lens.sel(layer=layer).isel(rank=0, token=lens["row"].to_numpy() == 0)
            words += [plots._shown(one["word"].to_numpy()[p]) for p in grid.positions.ravel()]
    assert _texts(figure) == words
    figure.savefig(tmp_path / "image.png")
    assert matplotlib.image.imread(tmp_path / "image.png").std() > 0.05
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert any(re.search(r"image 1\ntile 1, 2", label) for label in labels)
    with pytest.raises(FrankenlensError, match="no layer 7"):
        plots.plot_image(lens, prompts[0], layers=[7])
    with pytest.raises(FrankenlensError, match="no token of prompt 5"):
        plots.plot_tokens(lens, row=5)
    decision = logit_lens(vlm, prompts, progress=False)
    with pytest.raises(FrankenlensError, match="lacks image token"):
        plots.plot_image(decision, prompts[0])


def test_figures_of_tables_are_drawn_with_few_examples_and_without_bias(tmp_path) -> None:
    lens = _lens(np.random.default_rng(0).uniform(1, 2, (2, 2, 8)), ROLES[:2], "model", ["in", "rl"])
    apart = _lens(np.random.default_rng(0).uniform(1, 2, (1, 2, 8)), ROLES[:2], "comparison", ["rl"])
    rows = [
        {"component": f"blocks.0.attn.head.{h}", "kind": "head", "layer": 0, "head": h, "in": 1.0, "rl": -1.0}
        for h in range(2)
    ]
    rows.append(
        {"component": "blocks.0.attn.bias", "kind": "attn_bias", "layer": 0, "head": -1, "in": 0.0, "rl": 0.0}
    )
    dla = pd.DataFrame(rows).assign(difference=-2.0, p_corrected=[0.01, 0.2, np.nan])
    figure = plots.plot_attribution(dla)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["head 0", "head 1"]
    assert len(figure.axes[2].lines) == 1
    for at, one in enumerate((figure, plots.plot_own(own_table(lens)), plots.plot_apart(apart_table(apart)))):
        one.savefig(tmp_path / f"{at}.png")


def test_words_are_shown_as_they_fit() -> None:
    assert [plots._shown(word) for word in (" red", "\n", "  ", "$x$", "<|im_start|>")] == [
        "red",
        "⏎",
        "␣␣",
        r"\$x\$",
        "<|im_sta…",
    ]
