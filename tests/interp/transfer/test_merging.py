"""Merge recipes against closed forms in NumPy, mergekit's own command, and transformers' own loading."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from hooks.loading import load_model
from hooks.processors import load_processor
from interp.pair.generation import greedy
from interp.prompts import PromptBuilder
from interp.questions.tasks import sample
from interp.transfer.merging import METHODS, Recipe, merge
from tests.architectures import build
from tests.families import EACH_KIND, redraw, tiny
from tests.half_pairs import HALVES, half_pair

RNG = np.random.default_rng(0)
BASE, ONE, TWO = (RNG.normal(size=(6, 5)) for _ in range(3))
D1, D2 = ONE - BASE, TWO - BASE


def _of(recipe: Recipe, *arrays: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    tensors = [torch.tensor(array) for array in arrays]
    return recipe.of(tensors, None if base is None else torch.tensor(base), "w").numpy()


def _trim(d: np.ndarray, density: float) -> np.ndarray:
    kept = np.argsort(-np.abs(d), axis=None)[: int(density * d.size)]
    out = np.zeros(d.size)
    out[kept] = d.flatten()[kept]
    return out.reshape(d.shape)


def _slerp(t: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    theta = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def _ties(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Equations of 2306.01708: trim has been done; elect the sign of the sum, then the mean of those that agree."""
    weighted = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    elected = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == elected
    divisor = (np.array(weights)[:, None, None] * agree).sum(0)
    return (weighted * agree).sum(0) / np.where(divisor == 0, 1, divisor)


def test_linear_slerp_and_task_arithmetic_are_their_closed_forms() -> None:
    np.testing.assert_allclose(_of(Recipe("linear"), ONE, TWO), (ONE + TWO) / 2, atol=1e-12)
    got = _of(Recipe("linear", weights=(0.2, 0.6)), ONE, TWO)
    np.testing.assert_allclose(got, 0.25 * ONE + 0.75 * TWO, atol=1e-12)
    got = _of(Recipe("linear", weights=(1.0, -1.0), normalize=False), ONE, TWO)
    np.testing.assert_allclose(got, ONE - TWO, atol=1e-12)
    for t in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(_of(Recipe("slerp", t=t), ONE, TWO), _slerp(t, ONE, TWO), atol=1e-12)
    got = _of(Recipe("task_arithmetic", weights=(0.5, 2.0), scale=0.7), ONE, TWO, base=BASE)
    np.testing.assert_allclose(got, BASE + 0.7 * (0.5 * D1 + 2 * D2), atol=1e-12)


def test_slerp_of_nearly_parallel_tensors_is_linear_as_mergekit_has_it() -> None:
    near = ONE + 0.01 * D1
    np.testing.assert_allclose(_of(Recipe("slerp", t=0.3), ONE, near), 0.7 * ONE + 0.3 * near, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(density=st.floats(0.1, 1), w1=st.floats(0.1, 2), w2=st.floats(0.1, 2), scale=st.floats(0.1, 2))
def test_ties_is_trim_elect_and_disjoint_mean(density: float, w1: float, w2: float, scale: float) -> None:
    got = _of(Recipe("ties", weights=(w1, w2), density=density, scale=scale), ONE, TWO, base=BASE)
    expected = BASE + scale * _ties([_trim(D1, density), _trim(D2, density)], [w1, w2])
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_dare_keeps_entries_at_one_over_the_density_and_is_right_on_average() -> None:
    shape = (200, 150)
    base, one = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    delta = one - base
    for density in (0.1, 0.5):
        draws = torch.stack(
            [Recipe("dare_linear", density=density, seed=i).of([one], base) - base for i in range(40)]
        )
        kept = draws != 0
        torch.testing.assert_close(draws[kept], (delta / density).expand_as(draws)[kept])
        share, error = float(kept.double().mean()), (density * (1 - density) / kept.numel()) ** 0.5
        assert abs(share - density) < 5 * error
        spread = (delta.norm() ** 2 * (1 - density) / density / len(draws)) ** 0.5
        assert float((draws.mean(0) - delta).norm() / spread) == pytest.approx(1, abs=0.05)
    again = Recipe("dare_linear", density=0.5, seed=0).of([one], base) - base
    first = Recipe("dare_linear", density=0.5, seed=0).of([one], base, "another name") - base
    assert not torch.equal(again != 0, first != 0)
    assert torch.equal(again, Recipe("dare_linear", density=0.5, seed=0).of([one], base) - base)


def test_dare_ties_adds_what_agrees_with_the_elected_sign() -> None:
    density, n = 0.4, 4000
    base = torch.zeros(n, dtype=torch.float64)
    one, two = torch.full_like(base, 1.0), torch.full_like(base, -3.0)
    values, counts = Recipe("dare_ties", density=density).of([one, two], base).unique(return_counts=True)
    shares = dict(zip((values * density).round(decimals=9).tolist(), (counts / n).tolist(), strict=True))
    expected = {-3.0: density, 1.0: density * (1 - density), 0.0: (1 - density) ** 2}
    assert set(shares) == set(expected)
    for value, share in expected.items():
        assert shares[value] == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_l1_rescaling_is_mergekits_own_dare() -> None:
    base, one = torch.randn(50, 40), torch.randn(50, 40)
    update = Recipe("dare_linear", density=0.3, rescale="l1").of([one], base) - base
    assert float(update.abs().sum()) == pytest.approx(float((one - base).abs().sum()), rel=1e-4)
    ratio = (update / (one - base))[update != 0]
    assert float(ratio.std()) < 1e-3
    assert abs(float(ratio.mean()) - 1 / 0.3) > 1e-2


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Recipe("dare_linear", density=0.5).of([torch.ones(9)], torch.zeros(9))
    assert torch.equal(torch.rand(4), expected)


TRIPLE = [
    (Recipe("linear", weights=(0.3, 0.7)), False),
    (Recipe("slerp", t=0.4), False),
    (Recipe("task_arithmetic", weights=(1.0, 0.5)), True),
    (Recipe("ties", density=0.3), True),
    (Recipe("dare_linear", density=0.3), True),
    (Recipe("dare_ties", density=0.3), True),
]


def _expected(recipe: Recipe, base: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    d1, d2 = one - base, two - base
    if recipe.method == "linear":
        return 0.3 * one + 0.7 * two
    if recipe.method == "slerp":
        cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
        return 0.6 * one + 0.4 * two if cosine > 0.9995 else _slerp(0.4, one, two)
    if recipe.method == "task_arithmetic":
        return base + d1 + 0.5 * d2
    shape = (1, -1)
    trimmed = [_trim(d.reshape(shape), 0.3) for d in (d1, d2)]
    return base + _ties(trimmed, [1, 1]).reshape(base.shape)


@pytest.mark.parametrize(("recipe", "on_base"), TRIPLE, ids=[r.method for r, _ in TRIPLE])
def test_merges_of_the_embedded_triple(recipe: Recipe, on_base: bool, tmp_path: Path) -> None:
    folders = [embedded.path("in"), embedded.path("rl")]
    report = merge(
        recipe, folders, tmp_path / "m", embedded.path("base") if on_base else None, progress=False
    )
    merged = load_file(tmp_path / "m" / "model.safetensors")
    base, one, two = (load_file(embedded.path(s) / "model.safetensors") for s in ("base", "in", "rl"))
    assert merged.keys() == one.keys()
    assert report.tensors == len(merged)
    moved = 0.0
    for name, tensor in merged.items():
        wide = [tensors[name].numpy().astype(np.float64) for tensors in (base, one, two)]
        if recipe.method.startswith("dare"):
            _require_dare(tensor.numpy() - wide[0], wide[1] - wide[0], wide[2] - wide[0], recipe)
        else:
            np.testing.assert_allclose(tensor, _expected(recipe, *wide), atol=2e-6, err_msg=name)
        moved = max(moved, float(np.abs(tensor.numpy() - wide[1]).max()))
    assert moved > 1e-3
    assert (report.collinear > 0) == (recipe.method == "slerp")
    _generates(tmp_path / "m")


def _require_dare(update: np.ndarray, d1: np.ndarray, d2: np.ndarray, recipe: Recipe) -> None:
    """Every entry is one of the four sums that the two masks allow (ties: the larger's, where they disagree)."""
    p = recipe.density
    zero = np.zeros_like(d1)
    if recipe.method == "dare_ties":
        larger = np.where(np.abs(d1) >= np.abs(d2), d1, d2)
        both = np.where(np.sign(d1) == np.sign(d2), d1 + d2, larger)
    else:
        both = d1 + d2
    allowed = np.stack([zero, d1 / p, d2 / p, both / p])
    assert np.abs(allowed - update).min(0).max() <= 2e-6


def _generates(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    example = sample("count", 1, 5, "test")[0]
    inputs = PromptBuilder(load_processor(folder)).build(example).inputs
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    new = written[0, inputs["input_ids"].shape[1] :].tolist()
    vlm = HookedVLM.from_pretrained(folder)
    ((*ours,),) = greedy(vlm, [PromptBuilder(vlm.processor).build(example)], 12)
    assert ours == new[: len(ours)]
    assert len(ours) > 1


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_the_triple_merges_as_with_mergekits_own_command(method: str, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, one, two = (str(embedded.path(stage)) for stage in ("base", "in", "rl"))
    recipes: dict[str, tuple[Recipe, dict[str, Any], dict[str, Any]]] = {
        "linear": (Recipe("linear", weights=(0.3, 0.7)), {"weight": [0.3, 0.7]}, {}),
        "slerp": (Recipe("slerp", t=0.4), {}, {"t": 0.4}),
        "task_arithmetic": (Recipe("task_arithmetic", weights=(1.0, 0.5)), {"weight": [1.0, 0.5]}, {}),
        "ties": (Recipe("ties", density=0.3), {"weight": [1.0, 1.0], "density": [0.3, 0.3]}, {}),
    }
    recipe, per_model, shared = recipes[method]
    on_base = method in ("task_arithmetic", "ties")
    models = [
        {"model": path, "parameters": {key: values[i] for key, values in per_model.items()}}
        for i, path in enumerate((one, two))
    ]
    wanted = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32"}
    if method != "linear":
        wanted["base_model"] = base if on_base else one
    theirs = tmp_path / "theirs"
    run_merge(MergeConfiguration.model_validate(wanted), str(theirs), MergeOptions(quiet=True))
    merge(recipe, [one, two], tmp_path / "ours", base if on_base else None, progress=False)
    expected = load_file(next(theirs.glob("model*.safetensors")))
    got = load_file(tmp_path / "ours" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", EACH_KIND)
def test_every_family_merges_whole_into_shards_and_loads(family: str, tmp_path: Path) -> None:
    given = tiny(family)
    inputs = given.inputs()
    logits = []
    for name, seed in (("one", 1), ("two", 2)):
        redraw(given.model, seed)
        given.model.save_pretrained(tmp_path / name)
        given.processor.save_pretrained(tmp_path / name)
    two = AutoModelForImageTextToText.from_pretrained(tmp_path / "two").eval()
    for t in (0.0, 0.5, 1.0):
        recipe = Recipe("linear", weights=(1 - t, t))
        out = tmp_path / f"m{t}"
        merge(recipe, [tmp_path / "one", tmp_path / "two"], out, shard_bytes=40_000, progress=False)
        assert len(list(out.glob("*.safetensors"))) > 1
        loaded: Any = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        model, info = loaded
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model.eval()(**inputs).logits)
    with torch.no_grad():
        assert torch.equal(logits[2], two(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[0].abs().max()
    assert load_processor(tmp_path / "m0.5") is not None


def test_half_precision_is_merged_in_single() -> None:
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(400, 30, generator=generator).bfloat16() for _ in range(3))
    got = Recipe("task_arithmetic", weights=(0.3, 0.7)).of([one, two], base)
    exact = base.double() + 0.3 * (one.double() - base.double()) + 0.7 * (two.double() - base.double())
    assert got.dtype == torch.bfloat16
    allowed = 2**-8 * exact.abs() + 1e-6  # one rounding at the end
    assert bool(((got.double() - exact).abs() <= allowed).all())
    in_half = base + 0.3 * (one - base) + 0.7 * (two - base)
    assert not bool(((in_half.double() - exact).abs() <= 2 * allowed).all())


def test_refusals(tmp_path: Path) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"method": "slurp"}, "Did you mean"),
        ({"method": "slerp"}, "needs t="),
        ({"method": "linear", "t": 0.5}, "takes no t="),
        ({"method": "ties"}, "needs density="),
        ({"method": "task_arithmetic", "density": 0.5}, "takes no density="),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "linear", "scale": 2.0}, "takes no scale="),
        ({"method": "slerp", "t": 0.5, "weights": (1.0, 1.0)}, "t= alone"),
        ({"method": "dare_ties", "density": 0.5, "normalize": True}, "l1"),
    ]
    for wanted, why in faults:
        with pytest.raises(FrankenlensError, match=why):
            Recipe(**wanted)
    in_, rl, base = (embedded.path(stage) for stage in ("in", "rl", "base"))
    out = tmp_path / "out"
    for recipe, models, on, why in (
        (Recipe("ties", density=0.5), [in_, rl], None, "give base="),
        (Recipe("linear"), [in_, rl], base, "takes no base="),
        (Recipe("slerp", t=0.5), [in_], None, "slerp takes two"),
        (Recipe("linear", weights=(1.0,)), [in_, rl], None, "1 values for 2 models"),
        (Recipe("linear"), [in_, tmp_path / "none"], None, "no such folder"),
        (Recipe("linear", weights=(1.0, -1.0)), [in_, rl], None, "sum to 0"),
    ):
        with pytest.raises(FrankenlensError, match=why):
            merge(recipe, models, out, on)
        assert not out.exists()
    out.mkdir()
    (out / "own").write_text("mine")
    with pytest.raises(FrankenlensError, match="not empty"):
        merge(Recipe("linear"), [in_, rl], out)
    assert len(METHODS) == 6


def test_checkpoints_that_do_not_align_are_one_error_before_the_work_starts(tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(embedded.path("rl"), other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:80].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] = 80
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(FrankenlensError, match="do not align"):
        merge(Recipe("linear"), [embedded.path("in"), other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_holds_the_buffers_that_are_saved(tmp_path: Path) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for seed in (1, 2):
        model = build("glm4v_moe", seed).model
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.fill_(float(seed))
            wanted[name] = wanted.get(name, 0) + tensor / 2
        model.save_pretrained(tmp_path / str(seed))
    merge(Recipe("linear"), [tmp_path / "1", tmp_path / "2"], tmp_path / "out", progress=False)
    found = load_model(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    biases = [tensor for name, tensor in found.items() if name.endswith("e_score_correction_bias")]
    assert biases and all(bool((bias == 1.5).all()) for bias in biases)


def test_counters_come_from_the_first_checkpoint(tmp_path: Path) -> None:
    for seed in (1, 2):
        model = build("emu3", seed).model
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(10 * seed)
        model.save_pretrained(tmp_path / str(seed))
    merge(Recipe("linear"), [tmp_path / "1", tmp_path / "2"], tmp_path / "out", progress=False)
    found = load_model(tmp_path / "out").state_dict()
    assert {int(v) for name, v in found.items() if name.endswith("num_batches_tracked")} == {10}


def _saved(vlm, folder: Path) -> Path:
    vlm.model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_merge_that_its_type_does_not_hold_is_refused_and_float32_holds_it(dtype, tmp_path: Path) -> None:
    in_, rl = (_saved(vlm, tmp_path / name) for vlm, name in zip(half_pair(dtype), ("in", "rl"), strict=True))
    half = Recipe("linear", weights=(0.5, 0.5))
    with pytest.raises(
        FrankenlensError, match=r'the merge \(linear\): weights in \w+ hold .* dtype="float32"'
    ):
        merge(half, [in_, rl], tmp_path / "refused", progress=False)
    assert not list((tmp_path / "refused").rglob("*"))
    report = merge(half, [in_, rl], tmp_path / "rounded", rounded=True, progress=False)
    wide = merge(half, [in_, rl], tmp_path / "wide", dtype="float32", progress=False)
    one, two, got, exact = (load_file(f / "model.safetensors") for f in (in_, rl, report.folder, wide.folder))
    asked = torch.cat([(0.5 * (two[n].double() - one[n].double())).flatten() for n in one])
    moved = torch.cat([(got[n].double() - one[n].double()).flatten() for n in one])
    assert all(got[name].dtype == dtype and exact[name].dtype == torch.float32 for name in one)
    assert report.held.norm_ratio == pytest.approx(float(moved.norm() / asked.norm()), rel=1e-5)
    assert report.held.cosine == pytest.approx(float(torch.cosine_similarity(moved, asked, dim=0)), abs=1e-5)
    assert abs(report.held.norm_ratio - 1) > 0.1
    for name, value in exact.items():
        torch.testing.assert_close(
            value.double(), (one[name].double() + two[name].double()) / 2, rtol=1e-6, atol=1e-9
        )
    assert (wide.held.norm_ratio, wide.held.cosine) == pytest.approx((1, 1), abs=1e-4)
    assert (
        next(HookedVLM.from_pretrained(wide.folder, processor=None, check=False).model.parameters()).dtype
        == torch.float32
    )
    with pytest.raises(FrankenlensError, match='give "float32"'):
        merge(half, [in_, rl], tmp_path / "other", dtype="float16", progress=False)


def test_one_value_a_model_is_a_tuple_or_a_list() -> None:
    for name in ("weights", "density"):
        given: dict[str, Any] = {"density": 0.5, name: [0.5, 0.25]}
        assert Recipe("dare_ties", **given) == Recipe("dare_ties", **{**given, name: (0.5, 0.25)})
    with pytest.raises(FrankenlensError, match="shares above 0"):
        Recipe("ties", density=[0.5, 2.0])  # type: ignore[arg-type]
    one: Any = 0.5
    with pytest.raises(FrankenlensError, match="one number a model"):
        Recipe("linear", weights=one)
    for seed in (10**20, 0.5):
        with pytest.raises(FrankenlensError, match="a whole number"):
            Recipe("linear", seed=seed)  # type: ignore[arg-type]
