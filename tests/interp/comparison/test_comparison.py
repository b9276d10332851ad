"""Every number of a comparison against float64 NumPy and SciPy, on every tensor of the embedded triple."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from transformers import AutoModelForImageTextToText

from experiments import embedded
from hooks.errors import FrankenlensError
from interp.comparison import compare, gaussian_spectrum, leading, principal_angles, spectra, spectrum
from interp.comparison.singular_values import SINGLE_SHARE, SMALL, blockwise

K = 16
BOTH = {"in": ("base", "in"), "rl": ("in", "rl")}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, np.ndarray]]:
    """By stage and parameter, as transformers loads them."""
    found = {}
    for stage in embedded.STAGES:
        model = AutoModelForImageTextToText.from_pretrained(embedded.path(stage))
        found[stage] = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    return found


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    given = (embedded.path(stage) for stage in ("in", "rl", "base"))
    return compare(*given, subspace=K, progress=False)


def _rows(table: pd.DataFrame, weights: dict[str, dict[str, np.ndarray]], matrices: bool = False):
    """Each row with W before and after, W_IN, and the update, flattened to matrices."""
    for row in table.to_dict("records"):
        before, after = (weights[one][row["param_name"]] for one in BOTH[row["stage"]])
        if matrices and before.ndim < 2:
            continue
        shape = (before.shape[0], -1) if before.ndim > 1 else (-1,)
        yield row, before.reshape(shape), after.reshape(shape), weights["in"][row["param_name"]]


def _close(found: float, wanted: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=rtol)


def test_every_parameter_has_a_row_in_both_stages(table, weights) -> None:
    assert len(table) == 2 * len(weights["in"])
    for stage in BOTH:
        assert list(table.loc[table["stage"] == stage, "param_name"]) == list(weights["in"])
    assert table[["address", "section", "component"]].notna().all(axis=None)


def test_norms_and_means_are_numpys(table, weights) -> None:
    for row, before, after, reference in _rows(table, weights):
        delta = after - before
        _close(row["fro_norm"], np.linalg.norm(delta))
        _close(row["reference_norm"], np.linalg.norm(reference))
        _close(row["relative_norm"], np.linalg.norm(delta) / np.linalg.norm(reference))
        _close(row["mean_abs"], np.abs(delta).mean())
        _close(row["max_abs"], np.abs(delta).max())
        assert (row["n"], row["rows"]) == (delta.size, delta.shape[0])


def test_singular_values_and_all_that_is_made_of_them_are_numpys(table, weights) -> None:
    n = 0
    for row, before, after, _ in _rows(table, weights, matrices=True):
        values = np.linalg.svd(after - before, compute_uv=False)
        p = values / values.sum()
        _close(row["spectral_norm"], values[0])
        _close(row["nuclear_norm"], values.sum())
        _close(row["stable_rank"], (values**2).sum() / values[0] ** 2)
        _close(row["effective_rank"], np.exp(-(p * np.log(p)).sum()))
        _close(row["condition_number"], values[0] / values[-1])
        _close(row["log_volume"], np.log(values[:50]).sum())
        np.testing.assert_allclose(np.exp(row["log_spectrum"]), values[:50] / values[0], rtol=1e-5)
        assert row["n_untrusted"] == 0
        n += 1
    assert n == 2 * sum(w.ndim > 1 for w in weights["in"].values())


def test_sparsity_compares_bfloat16_values_and_the_cosine_is_of_the_two_updates(table, weights) -> None:
    for row, before, after, _ in _rows(table, weights):
        same = [torch.from_numpy(w).float().bfloat16() for w in (before, after)]
        assert row["sparsity"] == pytest.approx(float((same[0] == same[1]).double().mean()), abs=1e-12)
        base, in_, rl = (weights[stage][row["param_name"]].ravel() for stage in embedded.STAGES)
        product = (in_ - base) @ (rl - in_)
        size = np.linalg.norm(in_ - base) * np.linalg.norm(rl - in_)
        np.testing.assert_allclose(row["scalar_product"], product, atol=1e-6 * size)
        np.testing.assert_allclose(row["cosine"], product / size, atol=1e-6)


def test_angles_and_energy_outside_are_scipys(table, weights) -> None:
    for row, before, after, _ in _rows(table, weights, matrices=True):
        u, _, v = np.linalg.svd(before, full_matrices=False)
        u2, _, v2 = np.linalg.svd(after, full_matrices=False)
        sides = {"left": (u[:, :K], u2[:, :K]), "right": (v[:K].T, v2[:K].T)}
        for side, (one, other) in sides.items():
            angles = scipy.linalg.subspace_angles(one, other)
            np.testing.assert_allclose(row[f"principal_angle_max_{side}"], angles.max(), rtol=1e-5)
            np.testing.assert_allclose(row[f"principal_angle_mean_{side}"], angles.mean(), rtol=1e-5)
        delta = after - before
        inside = np.linalg.norm(u[:, :K].T @ delta @ v[:K].T) ** 2 / np.linalg.norm(delta) ** 2
        _close(row["energy_outside"], 1 - inside)
        _close(row["energy_outside_chance"], 1 - K**2 / delta.size)


def test_the_long_table_has_every_rank_of_every_matrix(table) -> None:
    long = spectra(table)
    matrices = table[table["columns"].notna()]
    assert len(long) == sum(map(len, matrices["log_spectrum"]))
    first = long[long["rank"] == 1]
    assert (first["log_ratio"] == 0).all() and len(first) == len(matrices)
    with pytest.raises(FrankenlensError, match="spectra=True"):
        spectra(table.drop(columns="log_spectrum"))


def _with_values(shape: tuple[int, int], values: np.ndarray, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(side, len(values))))[0] for side in shape)
    return torch.from_numpy(u * values @ v.T)


def _decays(n: int) -> dict[str, np.ndarray]:
    low_rank = np.where(np.arange(n) < 64, 1.0, 0.0) * np.linspace(1, 0.5, n)
    return {
        "flat": np.linspace(1, 0.1, n),
        "power": 1 / np.arange(1, n + 1),
        "steep": 10.0 ** -(np.arange(n) / 25),
        "low rank": low_rank,
        "low rank and noise": np.maximum(low_rank, 1e-5),
    }


@pytest.mark.parametrize("shape", [(700, 600), (600, 700), (SMALL + 1, 1500)])
@pytest.mark.parametrize("decay", ["flat", "power", "steep", "low rank", "low rank and noise"])
def test_large_matrices_keep_what_they_promise(shape, decay) -> None:
    """By Gram matrices: the trusted within 1e-4, the nuclear norm within 1e-4, the untrusted marked."""
    values = _decays(min(shape))[decay] * 3e-4
    found = spectrum(_with_values(shape, values).float())
    exact = np.linalg.svd(_with_values(shape, values).float().numpy().astype(np.float64), compute_uv=False)
    good = found.trusted
    np.testing.assert_allclose(found.values[good], exact[good], rtol=1e-4)
    assert good[:50].all() or decay == "steep"
    np.testing.assert_allclose(found.values.sum(), exact.sum(), rtol=1e-4)
    p = exact[exact > 0] / exact.sum()
    np.testing.assert_allclose(found.effective_rank, np.exp(-(p * np.log(p)).sum()), rtol=2e-3)
    if decay == "low rank":
        assert np.isnan(found.condition_number)
        assert not good[64:].any()


def test_without_the_second_pass_a_low_rank_update_would_look_far_richer() -> None:
    """What the float64 pass is for: float32's noise in 536 zeros."""
    delta = _with_values((700, 600), _decays(600)["low rank"]).float()
    noisy = torch.linalg.eigvalsh(delta.T @ delta).clamp(min=0).sqrt().double()
    assert noisy.sum() > 1.001 * spectrum(delta).values.sum()
    assert (noisy[: 600 - 64] > 1e-5).any()
    assert noisy[0] < SINGLE_SHARE


def test_zero_updates_have_no_ranks() -> None:
    found = blockwise(lambda: iter(()), (3, 4), 0.0)
    assert found.values.tolist() == [0, 0, 0] and np.isnan([found.stable_rank, found.effective_rank]).all()


@pytest.mark.parametrize("shape", [(700, 600), (600, 1400)])
def test_subspaces_of_large_matrices_are_scipys(shape) -> None:
    one = _with_values(shape, 1 / np.arange(1, min(shape) + 1)).float()
    other = one + 1e-4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for matrix in (one, other):
        tall = matrix if shape[0] >= shape[1] else matrix.T
        found.append(leading(lambda tall=tall: iter(tall.split(100)), shape, 12))
    exact = [np.linalg.svd(matrix.double().numpy(), full_matrices=False) for matrix in (one, other)]
    wanted = scipy.linalg.subspace_angles(exact[0][0][:, :12], exact[1][0][:, :12])
    np.testing.assert_allclose(principal_angles(found[0].left, found[1].left), wanted[::-1], rtol=1e-4)
    wanted = scipy.linalg.subspace_angles(exact[0][2][:12].T, exact[1][2][:12].T)
    np.testing.assert_allclose(principal_angles(found[0].right, found[1].right), wanted[::-1], rtol=1e-4)
    assert wanted.max() > 1e-3


def test_principal_angles_in_closed_form() -> None:
    angles = np.array([1e-9, 1e-4, 0.3, 1.2, np.pi / 2])
    a = torch.eye(10, 5, dtype=torch.float64)
    b = torch.zeros(10, 5, dtype=torch.float64)
    b[range(5), range(5)] = torch.from_numpy(np.cos(angles))
    b[range(5, 10), range(5)] = torch.from_numpy(np.sin(angles))
    np.testing.assert_allclose(principal_angles(a, b), angles, rtol=1e-9)


def test_a_matrix_of_low_rank_has_no_larger_subspace() -> None:
    found = leading(lambda: iter((_with_values((30, 20), np.array([3.0, 2.0, 1.0])),)), (30, 20), 8)
    assert found.k == 3
    assert leading(lambda: iter((torch.zeros(30, 20),)), (30, 20), 8).k == 0


def test_the_gaussian_control_has_the_spectrum_of_gaussian_matrices() -> None:
    """Against 200 dense draws: mean within 5 standard errors; and far from any trained update."""
    draw = np.random.default_rng(0)
    dense = np.stack([np.linalg.svd(draw.normal(size=(40, 25)), compute_uv=False) for _ in range(200)])
    ours = np.stack([gaussian_spectrum(25, 40, seed).values for seed in range(200)])
    error = np.sqrt((dense.var(0) + ours.var(0)) / 200)
    assert (np.abs(ours.mean(0) - dense.mean(0)) < 5 * error).all()
    assert gaussian_spectrum(40, 25, 3).stable_rank == gaussian_spectrum(25, 40, 3).stable_rank


def test_random_updates_leave_as_much_unchanged_as_a_plain_loop_says(table, weights) -> None:
    draw = np.random.default_rng(1)
    for row, before, after, _ in _rows(table, weights):
        if row["n"] < 1 << 13:
            continue
        noise = draw.normal(size=before.shape) * np.linalg.norm(after - before) / before.size**0.5
        old, new = (torch.from_numpy(w).bfloat16() for w in (before, before + noise))
        share = float((old == new).double().mean())
        assert row["sparsity_random"] == pytest.approx(share, abs=5 * (2 * share / row["n"]) ** 0.5)
        rounding = np.linalg.norm(before - old.double().numpy())
        assert row["rounding_norm"] == pytest.approx(rounding, rel=0.03)


@pytest.mark.parametrize("asked", [{"top": 0}, {"subspace": 0}])
def test_counts_below_one_are_refused(asked) -> None:
    with pytest.raises(FrankenlensError, match="at least 1"):
        compare(embedded.path("in"), embedded.path("rl"), **asked)
