"""Every figure function there is: colours of one palette, layers from 0, a caption, and a sentence for nothing."""

import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch
from matplotlib.text import Text

import interp
from experiments import embedded
from hooks.processors import load_processor
from interp.comparison import compare, layers, spectra
from interp.knockout.route_table import route_table  # noqa: F401  (its columns are those of `routes` below)
from interp.lens.image_grid import image_grids
from interp.map.summary import summarise
from interp.planting.plots import SHOWN
from interp.prompts import PromptBuilder
from interp.questions.tasks import sample
from interp.regions import parse_partition
from interp.results import palette
from interp.results.picture import Picture, caption_of
from tests.interp.map.synthetic import NULLS, synthetic_map

PARTITION = parse_partition("3/3/3", 9)
LAYERS = range(9)
Made = tuple[tuple[Any, ...], dict[str, Any]]


def interval(value: float, name: str = "", width: float = 0.1) -> dict[str, float]:
    prefix = f"{name}_" if name else ""
    return {name or "value": value, f"{prefix}low": value - width, f"{prefix}high": value + width}


def metrics() -> Made:
    rows = [
        {"model": m, "task": "all", "measure": k, "control": 0.1, **interval(0.5)}
        for m in ("base", "in", "rl")
        for k in ("vis", "v2r", "rea")
    ]
    return (pd.DataFrame(rows), ("base", "in", "rl")), {}


def transferred() -> Made:
    names = [("Base", "model", ""), ("IN", "model", ""), ("RL", "model", ""), ("I:R:R", "order", "")]
    names += [("random update as I:R:R", "control", "I:R:R"), ("random layers as I:R:R", "control", "I:R:R")]
    rows = [
        {"metric": "M_vis", "task": "vis", "variant": name, "kind": kind, "control_of": of, "n": 9, "p": 0.01}
        | {"p_adjusted": 0.01, "accuracy": 0.6, **interval(0.5), **interval(0.1, "change")}
        for name, kind, of in names
    ]
    return (pd.DataFrame(rows), [("M_vis", "vis")]), {}


def swaps() -> Made:
    outcomes = ("source", "broke", "unchanged", "changed", "CR(k) − CR(k+1)")
    rows = [
        {"mode": mode, "pairs": pairs, "function": "counting", "first": k, "last": k, "outcome": outcome}
        | {"n": 9, **interval(0.4)}
        for mode in ("single", "suffix")
        for pairs in ("counterfactual", "same answer")
        for k in LAYERS
        for outcome in outcomes
        if outcome != outcomes[-1] or (mode == "suffix" and pairs == "counterfactual")
    ]
    return (pd.DataFrame(rows), PARTITION), {}


def ablated(parts: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "function": "counting",
                "kind": "skip",
                "layer": k,
                "part": part,
                "head": head,
                "n": 9,
                "whole": 0.9,
            }
            | {"accuracy": 0.7, "low": 0.6, "high": 0.8, "whole_low": 0.8, "whole_high": 1.0}
            | {"change": -0.2 * (k - 4), "p_corrected": 0.01 if k % 2 else 0.6}
            for k in LAYERS
            for part in parts
            for head in (range(4) if part == "head" else (-1,))
        ]
    )


def shifted(per_head: bool) -> pd.DataFrame:
    rows = []
    for k, h in itertools.product(LAYERS, range(4) if per_head else (-1,)):
        for name in ("RL − IN", "RL rounded − RL", "IN with noise − IN"):
            one = {"traces": "own", "comparison": name, "measure": "mass", "layer": k, "head": h, "n": 9}
            one |= interval(0.3, "before") | interval(0.4, "after") | {"p_corrected": 0.01 if k > 4 else 0.5}
            rows.append(one | {"difference": 0.1 * (k - 4), "low": 0.0, "high": 0.2})
    return pd.DataFrame(rows)


def routes() -> Made:
    rows = []
    for name, k in itertools.product(("image -> question", "question -> last"), range(7)):
        one: dict[str, Any] = {"route": name, "window": f"{k}-{k + 2}", "n": 9}
        for side in ("before", "after"):
            one |= interval(-0.5 * k, side) | interval(-0.1, f"{side}_control")
        rows.append(one | interval(-0.2, "difference") | {"p_corrected": 0.01 if k > 3 else 0.6})
    table = pd.DataFrame(rows)
    table.attrs |= {"units": "nats", "models": ("in", "rl")}
    return (table,), {}


def confirmed() -> Made:
    rows = [
        {"function": "all", "direction": d, "group": "top 1", "condition": "top 1", "draw": draw, "n": 9}
        | {"components": "blocks.1.mlp", "size": 1, "donor": 0.8, "recipient": 0.5, "p_corrected": 0.01}
        | {"whole_donor": 0.6, "whole_recipient": 0.2, **interval(0.2, "change")}
        for d in ("rl_to_in", "in_to_rl")
        for draw in (-1, 0, 1)
    ]
    return (pd.DataFrame(rows), "all"), {}


def dosed() -> Made:
    rows = [
        {"function": "all", "model": m, "group": "blocks.4", "draw": draw, "coefficient": c, "clean": 0.5}
        | {"accuracy": 0.6, "low": 0.5, "high": 0.7, "share": 0.4}
        for m in ("IN", "RL")
        for draw in (-1, 0)
        for c in (-1.0, 1.0)
    ]
    return (pd.DataFrame(rows), "all"), {}


@cache
def prompt():
    builder = PromptBuilder(load_processor(str(embedded.path("in"))))
    return builder.build(sample("count", 1, 0, "map")[0])


def said() -> xr.Dataset:
    """What a lens over all tokens of one prompt holds, of two models."""
    n, depth = len(prompt()), 10
    shape = (2, depth, n, 1)
    share = np.random.default_rng(0).random(shape)
    coords = {"model": ["in", "rl"], "layer": range(depth), "rank": [1]}
    coords |= {"row": ("token", [0] * n), "position": ("token", range(n)), "text": ("token", ["a"] * n)}
    coords["example"] = ("token", ["one"] * n)
    dims = ("model", "layer", "token", "rank")
    values = {"word": (dims, np.full(shape, "b")), "probability": (dims, share)}
    return xr.Dataset(values, coords, {"lens": "logit lens"})


def apart() -> Made:
    rows = [
        {"comparison": c, "role": "reasoning", "layer": k, "n": 9, "top_k": 10}
        | interval(0.5, "kl") | interval(0.5, "overlap")
        for c in ("rl", "bf16", "random")
        for k in range(10)
    ]  # fmt: skip
    return (pd.DataFrame(rows),), {}


def own() -> Made:
    rows = [
        {
            "model": m,
            "role": "reasoning",
            "layer": k,
            "n": 9,
            **interval(0.5, "kl"),
            **interval(0.4, "tuned_kl"),
        }
        for m in ("in", "rl")
        for k in range(10)
    ]
    return (pd.DataFrame(rows),), {}


def answered(n: int = 5) -> xr.Dataset:
    values = np.full((2, n), 4.0)
    data = {"appears": (("model", "token"), values), "stays": (("model", "token"), values + 1)}
    return xr.Dataset(data, {"model": ["in", "rl"]}, {"n_layers": 9})


def attributed() -> Made:
    rows = [
        {"component": f"{kind}{k}", "kind": kind, "layer": k, "head": h, "in": 0.1 * k, "rl": 0.2, "n": 9}
        | {"difference": 0.2 - 0.1 * k, "p_corrected": 0.01 if k % 2 else 0.5}
        for k in LAYERS
        for kind, h in (("head", 0), ("head", 1), ("mlp", -1))
    ]
    return (pd.DataFrame(rows),), {}


def paths() -> Made:
    rows = [
        {"sender": f"blocks.{k}.mlp", "receiver": "logits", "direction": d, "n": 9, "layer": k}
        | interval(0.3 - 0.1 * k, "direct", 0.05) | interval(0.3 - 0.1 * k, "recovery", 0.05)
        | {"excess_low": 0.01, "excess_high": 0.2}
        for d in ("rl_to_in", "in_to_rl")
        for k in range(3)
    ]  # fmt: skip
    return (pd.DataFrame(rows),), {}


@cache
def compared() -> pd.DataFrame:
    stages = (embedded.path(name) for name in ("in", "rl", "base"))
    return compare(*stages, spectra=True, subspace=None, progress=False)


def planted() -> Made:
    names = list(SHOWN)
    found = pd.DataFrame(
        [
            {"method": m, "kind": k, "auroc": 0.8, "in_reach": 3, "n_pairs": 4}
            for m in names
            for k in ("head", "mlp")
        ]
    )
    null = pd.DataFrame(
        [{"method": m, "kind": "bf16", "tested": 0.2, "claimed": 0.1, "n_pairs": 4} for m in names]
    )
    effects = np.tile(np.geomspace(0.3, 30, 60), len(names))
    alone = pd.DataFrame(
        {"method": np.repeat(names, 60), "times_noise": effects, "auroc": 0.7, "in_reach": True}
    )
    return (found, null, alone), {}


def claimed() -> Made:
    rows = [
        {"claim": f"claim {v}", "pair": "one", "quantity": "recovery", "verdict": v, "n": 9, "relation": ">="}
        | {"value": 0.4, "low": 0.3, "high": 0.5, "bound": 0.2, "origin": "", "control_says": "told"}
        | interval(0.1, "control")
        for v in palette.VERDICTS
    ]
    return (pd.DataFrame(rows),), {}


def frozen() -> Made:
    kinds = {
        "IN": "in",
        "unfrozen": "unfrozen",
        "Early": "region",
        "random 1": "random",
        "a": "other",
        "b": "rerun",
    }
    rows = [
        {"arm": arm, "kind": kind, "rl_seed": 0, "group": "M_vis", "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for arm, kind in kinds.items()
    ]
    return (pd.DataFrame(rows),), {}


@cache
def mapped(refused: bool = False) -> xr.Dataset:
    return summarise(synthetic_map(), nulls={} if refused else NULLS)


def imaged() -> Made:
    lens = said()
    assert len(image_grids(prompt())) == 1
    return (lens, prompt()), {}


def over_the_steps() -> Made:
    names = [f"blocks.{layer}.attn.head.{head}" for layer in range(4) for head in range(3)]
    names += [f"blocks.{layer}.mlp" for layer in range(4)]
    steps, roles, rng = [10, 20, 40], ["image", "decision", "all"], np.random.default_rng(0)
    axes = {"direction": ["rl_to_in"], "step": steps, "component": names, "role": roles}
    share = xr.DataArray(rng.normal(0, 0.3, [len(one) for one in axes.values()]), axes)
    addresses = ["projector", *(f"blocks.{layer}" for layer in range(4))]
    norms = xr.DataArray(rng.random((5, 3)), {"address": addresses, "step": steps})
    values = {"share": share, "share_low": share - 0.1, "share_high": share + 0.1, "effect": share}
    values |= {"margin": share - 0.2, "beyond": share > 0.2, "relative_norm": norms}
    values |= {"accuracy": xr.DataArray([0.4, 0.6, 0.7], {"step": steps})}
    data = xr.Dataset(values).assign_coords(point=("component", ["head"] * 12 + ["mlp_out"] * 4))
    return (data.assign_attrs(reference=40, in_accuracy=0.3, refused=False),), {}


MAKERS: Mapping[str, Callable[[], Made]] = {
    "trajectory.plot_trajectory": over_the_steps,
    "fine_grained.plot_metrics": metrics,
    "results.plot_transfer": transferred,
    "localization.plot_swaps": swaps,
    "localization.plot_ablations": lambda: ((ablated(("block", "attn", "mlp")), PARTITION), {}),
    "localization.plot_head_ablations": lambda: ((ablated(("head",)),), {}),
    "attention.plot_shift": lambda: ((shifted(False), PARTITION), {}),
    "attention.plot_head_shift": lambda: ((shifted(True),), {}),
    "knockout.plot_routes": routes,
    "knockout.plot_flow": routes,
    "lockstep.plot_confirmation": confirmed,
    "lockstep.plot_followed": confirmed,
    "steering.plot_dose": dosed,
    "lens.plot_tokens": lambda: ((said(),), {}),
    "lens.plot_image": imaged,
    "lens.plot_apart": apart,
    "lens.plot_own": own,
    "lens.plot_answers": lambda: ((answered(),), {}),
    "lens.plot_attribution": attributed,
    "paths.plot_path_map": paths,
    "paths.plot_path_graph": paths,
    "comparison.plot_energy": lambda: ((layers(compared()), PARTITION), {}),
    "comparison.plot_spectra": lambda: ((spectra(compared()), PARTITION), {}),
    "comparison.plot_directions": lambda: ((layers(compared()), PARTITION), {}),
    "planting.plot_found": planted,
    "hypotheses.plot_claims": claimed,
    "freezing.plot_losses": frozen,
    "map.plot_map": lambda: ((mapped(),), {}),
    "map.plot_strongest": lambda: ((mapped(), "rl_to_in"), {}),
}
"""Room and name of every figure function to what it is called with."""


@cache
def functions() -> Mapping[str, Callable[..., Figure]]:
    """All functions of `interp` whose name begins with plot_, where they are written."""
    found = {}
    for module in pkgutil.walk_packages(interp.__path__, "interp."):
        loaded = importlib.import_module(module.name)
        for name, value in vars(loaded).items():
            if name.startswith("plot_") and inspect.isfunction(value) and value.__module__ == module.name:
                found[f"{module.name.split('.')[1]}.{name}"] = value
    return found


@cache
def figure(name: str) -> Figure:
    args, named = MAKERS[name]()
    drawn = functions()[name](*args, **named)
    drawn.draw_without_rendering()
    return drawn


def test_no_figure_function_is_forgotten() -> None:
    assert set(functions()) == set(MAKERS)


def painted(figure: Figure) -> Iterator[tuple[Any, Any]]:
    """Artists and the colours that they bring in; what a colour map paints is none of them."""
    backgrounds = {id(figure.patch), *(id(axes.patch) for axes in figure.axes)}
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    backgrounds |= {id(part) for axes in bars for part in axes.findobj(Patch)}
    for artist in figure.findobj():
        if isinstance(artist, Line2D):
            yield artist, artist.get_color()
            face = artist.get_markerfacecolor()
            yield from () if isinstance(face, str) and face == "none" else ((artist, face),)
        elif isinstance(artist, Collection) and artist.get_array() is None:
            yield from ((artist, one) for one in artist.get_facecolor())
            yield from ((artist, one) for one in artist.get_edgecolor())
        elif isinstance(artist, FancyArrowPatch) and artist.get_arrowstyle() is not None:
            continue  # of paths: by the colour map of effects; of routes: checked below
        elif (
            isinstance(artist, Patch)
            and id(artist) not in backgrounds
            and to_rgba(artist.get_facecolor())[3] > 0
        ):
            yield artist, artist.get_facecolor()
        elif isinstance(artist, Text) and artist.get_text():
            yield artist, artist.get_color()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_colours_are_those_of_the_palette(name) -> None:
    strangers = {
        (type(artist).__name__, to_hex(one))
        for artist, one in painted(figure(name))
        if not palette.is_ours(one)
    }
    assert not strangers


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_model_has_one_colour(name) -> None:
    """Whatever is labelled with a model's name, and nothing else, has that model's colour."""
    for artist in figure(name).findobj():
        label = str(artist.get_label()).partition(",")[0].removesuffix("'s own trace")
        if label.lower() in palette.MODELS and isinstance(artist, Line2D):
            assert to_hex(artist.get_color()) == palette.of_model(label), (name, artist.get_label())


def test_the_routes_that_a_model_needs_have_its_colour() -> None:
    above, below, _ = figure("knockout.plot_flow").axes
    for axes, colour in ((above, palette.IN), (below, palette.RL)):
        assert {to_hex(arrow.get_facecolor()) for arrow in axes.patches} == {colour}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_layers_count_from_0(name) -> None:
    for axes in figure(name).axes:
        for label, ticks in (
            (axes.get_xlabel(), axes.get_xticklabels()),
            (axes.get_ylabel(), axes.get_yticklabels()),
        ):
            if not re.search(r"\blayers?\b", label) or "layer's" in label:
                continue
            assert "from 0" in label, label
            shown = [text.get_text() for text in ticks if text.get_text()[:1].isdigit()]
            assert not shown or shown[0].partition("-")[0] == "0", (label, shown)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_figure_says_what_it_draws(name) -> None:
    drawn = figure(name)
    assert isinstance(drawn, Picture) and not drawn.sentence
    caption = caption_of(drawn)
    assert len(caption.split()) >= 12 and caption.endswith(".")
    if any("layer " in axes.get_xlabel() + axes.get_ylabel() for axes in drawn.axes):
        assert "from 0" in caption


def test_captions_differ() -> None:
    captions = [caption_of(figure(name)) for name in MAKERS]
    assert len(set(captions)) == len(captions)


def without_rows(value: Any) -> Any:
    """The same with nothing in it: a table without rows, a dataset without tokens."""
    if isinstance(value, pd.DataFrame):
        empty = value.iloc[:0].copy()
        empty.attrs = value.attrs
        return empty
    return answered(0) if isinstance(value, xr.Dataset) else value


OF_ONE_PROMPT = {
    "lens.plot_tokens",
    "lens.plot_image",
}  # refuse a prompt that the lens does not hold, by name
OF_A_MAP = {"map.plot_map", "map.plot_strongest"}


@pytest.mark.parametrize("name", sorted(set(MAKERS) - OF_ONE_PROMPT - OF_A_MAP))
def test_nothing_is_a_sentence_and_no_empty_axes(name) -> None:
    args, named = MAKERS[name]()
    drawn = functions()[name](*map(without_rows, args), **named)
    assert isinstance(drawn, Picture) and drawn.sentence.endswith(".") and drawn.caption == drawn.sentence
    assert all(not axes.axison for axes in drawn.axes)
    assert "".join(drawn.sentence.split()) == "".join(drawn.axes[0].texts[0].get_text().split())


def test_a_refused_map_is_a_sentence() -> None:
    refused = mapped().assign_attrs(refused="it cannot be told from noise")
    drawn = functions()["map.plot_map"](refused)
    assert isinstance(drawn, Picture)
    assert drawn.sentence.startswith("No recovery is given: it cannot be told from noise.")


def test_no_other_file_names_a_colour() -> None:
    """Of figures: code and pages take them from the palette, or use its very values where they are no Python."""
    root = Path(interp.__path__[0])
    for path in sorted(root.rglob("*.py")):
        if path.name == "palette.py":
            continue
        named = re.findall(r"[\"']#[0-9a-fA-F]{6}[\"']", path.read_text(encoding="utf-8"))
        assert all(palette.is_ours(one.strip("\"'")) for one in named), (path.name, named)
    page = (root / "attention" / "view.html.j2").read_text(encoding="utf-8")
    assert palette.MIXED in page and not {palette.IN, palette.RL} & set(re.findall(r"#[0-9a-f]{6}", page))
