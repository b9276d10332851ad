"""Subspaces by block Krylov steps, at sizes where NumPy's float64 SVD can say what is right."""

import numpy as np
import pytest
import scipy.linalg
import torch

from hooks.errors import FrankenlensError
from hooks.linears import product
from interp.comparison import energy_outside, leading, principal_angles, spectrum
from interp.comparison.directions import _angles
from interp.comparison.held import difference
from interp.comparison.passes import Passes
from interp.comparison.search import Search
from interp.comparison.singular_values import SMALL
from interp.comparison.subspace import ERROR, ROUNDED, Leading
from tests.interp.comparison import exact
from tests.interp.comparison.test_comparison import _with_values

K = 12
SHAPES = [(1400, 640), (640, 1400), (640, 640)]
N = 640
SPECTRA = {
    "flat": np.linspace(1, 0.9, N),
    "power": np.arange(1, N + 1) ** -0.5,
    "steep": 10.0 ** -(np.arange(N) / 40),
    "one and noise": np.where(np.arange(N) == 0, 100.0, np.linspace(1, 0.2, N)),
    "outliers": np.where(np.arange(N) < K, 1e3, 1.0) * np.linspace(1, 0.5, N),
    "close at the cut": np.where(np.arange(N) < K, 1 + 1e-4, 1.0) * np.linspace(1, 1 - 1e-4, N),
}


def _blocks(matrix: torch.Tensor):
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return lambda: iter(tall.split(100))


def _search(found: Leading) -> Search:
    assert found._search is not None, found.method
    return found._search


def _values(matrix: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


def _sides(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return left, right.T


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[0], torch.float32), (SHAPES[1], torch.bfloat16), (SHAPES[2], torch.float16)],
)
@pytest.mark.parametrize("kind", SPECTRA)
def test_leading_vectors_are_numpys_within_what_is_said(shape, dtype, kind) -> None:
    matrix = _with_values(shape, SPECTRA[kind]).to(dtype)
    found = leading(_blocks(matrix), shape, K)
    for ours, theirs in zip((found.left, found.right), _sides(matrix), strict=True):
        off = scipy.linalg.subspace_angles(ours.numpy(), theirs[:, :K]).max()
        assert off <= max(ERROR, found.error), found.method
        assert torch.allclose(ours.T @ ours, torch.eye(K, dtype=torch.float64), atol=1e-10)
    assert found.error <= ERROR
    if found.method == "krylov":
        assert found.error > 0


def test_values_that_are_equal_at_the_cut_are_left_to_the_whole_decomposition() -> None:
    matrix = torch.diag(torch.cat([torch.full((20,), 2.0), torch.linspace(1, 0.1, 600)]))
    found = leading(_blocks(matrix), matrix.shape, K)
    assert (found.method, found.error, found.k) == ("gram", 0.0, K)
    assert float(found.right[20:].abs().max()) < 1e-7  # within the twenty


def test_low_rank_zero_and_single_rows_have_what_there_is() -> None:
    low = _with_values((700, 600), np.array([3.0, 2.0, 1.0])).float()
    found = leading(_blocks(low), low.shape, K)
    assert found.k == 3
    assert scipy.linalg.subspace_angles(found.left.numpy(), _sides(low)[0][:, :3]).max() <= ERROR
    zero = torch.zeros(700, 600)
    assert leading(_blocks(zero), zero.shape, K).k == 0
    assert np.isnan(energy_outside(_blocks(zero), zero.shape, found))
    for shape in ((1, 700), (700, 1)):
        row = leading(_blocks(torch.ones(shape)), shape, K)
        assert (row.k, row.method) == (1, "svd")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(700, 600), (40, 30)])
def test_broken_numbers_are_refused(shape, value) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[3, 4] = value
    with pytest.raises(FrankenlensError, match="infinite or NaN"):
        leading(_blocks(matrix), shape, K)
    with pytest.raises(FrankenlensError, match="infinite or NaN"):
        spectrum(matrix)


def test_squares_that_leave_float32_are_decomposed_all_the_same() -> None:
    matrix = _with_values((700, 600), np.arange(1, 601) ** -0.5) * 1e25
    found = leading(_blocks(matrix), matrix.shape, K)
    assert scipy.linalg.subspace_angles(found.right.numpy(), _sides(matrix)[1][:, :K]).max() <= ERROR


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_small_and_large_angles_are_as_exact(shape, step) -> None:
    draw = torch.Generator().manual_seed(1)
    before = _with_values(shape, SPECTRA["power"]).float()
    after = before + step * torch.randn(shape, generator=draw) / 640**0.5
    found = _angles(*(Leading(_blocks(one), shape, K) for one in (before, after)))
    for side, one, other in zip(("left", "right"), _sides(before), _sides(after), strict=True):
        wanted = principal_angles(*(torch.from_numpy(some[:, :K].copy()) for some in (one, other)))
        assert found[f"principal_angle_max_{side}"] == pytest.approx(wanted.max(), rel=1e-4)
        assert found[f"principal_angle_mean_{side}"] == pytest.approx(wanted.mean(), rel=1e-4)


def test_a_new_direction_beside_all_old_ones_is_not_missed() -> None:
    """An update of rank 1, orthogonal to W on both sides, that is W's thirteenth-largest direction or its first."""
    draws = np.random.default_rng(0)
    left, right = (np.linalg.qr(draws.normal(size=(side, 641)))[0] for side in (1400, 700))
    values = np.arange(1, 641) ** -0.5
    before = torch.from_numpy(left[:, :640] * values @ right[:, :640].T)
    for size in (2.0, 1.05 * values[K - 1]):
        after = before + torch.from_numpy(size * np.outer(left[:, 640], right[:, 640]))
        found = leading(_blocks(after), after.shape, K)
        assert np.linalg.norm(found.right.numpy().T @ right[:, 640]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_matrix_nearby_is_searched_from_the_vectors_found_with_fewer_passes_and_no_less_exact(
    shape,
) -> None:
    draw = torch.Generator().manual_seed(4)
    before = _with_values(shape, SPECTRA["power"]).float()
    update = torch.randn(shape, generator=draw) * 1e-5
    after, change = before + update, float(torch.linalg.matrix_norm(update.double(), 2))
    old, cold = Leading(_blocks(before), shape, K), Leading(_blocks(after), shape, K)
    near = Leading(_blocks(after), shape, K, old, change)
    assert near.method == "krylov"
    assert _search(near).n_passes <= _search(cold).n_passes - 3
    for found in (near, cold):
        for ours, theirs in zip((found.subspace.left, found.subspace.right), _sides(after), strict=True):
            assert scipy.linalg.subspace_angles(ours.numpy(), theirs[:, :K]).max() <= ERROR
    apart = np.diff(-_values(before)[K - 1 : K + 1])[0]  # the gap that the update must not close
    assert 2 * change < apart
    doubtful = Leading(_blocks(after), shape, K, old, 1.0)
    assert _search(doubtful).n_passes == _search(cold).n_passes


def test_a_new_direction_is_not_missed_from_vectors_found_before_it() -> None:
    """Orthogonal to them all, by an update as large as it is: nothing is taken for granted, nor is it missed."""
    draws = np.random.default_rng(0)
    left, right = (np.linalg.qr(draws.normal(size=(side, 641)))[0] for side in (1400, 700))
    values = np.arange(1, 641) ** -0.5
    before = torch.from_numpy(left[:, :640] * values @ right[:, :640].T)
    old = Leading(_blocks(before), before.shape, K)
    for size in (2.0, 1.05 * values[K - 1]):
        after = before + torch.from_numpy(size * np.outer(left[:, 640], right[:, 640]))
        found = Leading(_blocks(after), after.shape, K, old, size)
        assert not _search(found).apart(_search(old), size)
        assert np.linalg.norm(found.subspace.right.numpy().T @ right[:, 640]) == pytest.approx(1, abs=1e-6)
    small = before + torch.from_numpy(1e-3 * np.outer(left[:, 640], right[:, 640]))
    assert _search(Leading(_blocks(small), small.shape, K, old, 1e-3)).apart(_search(old), 1e-3)


def test_single_products_are_those_of_float64_in_every_order() -> None:
    draw = torch.Generator().manual_seed(5)
    x, w = torch.randn(33, 70, generator=draw), torch.randn(19, 70, generator=draw)
    wanted = x.double() @ w.double().T
    for one in (x, x.T.contiguous().T):
        for other in (w, w.T.contiguous().T):
            assert (product(one, other).double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(product(x.double(), w.double()), wanted)


def test_products_are_those_of_the_whole_matrix_in_every_type_and_order() -> None:
    draw = torch.Generator().manual_seed(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for matrix in (torch.randn(900, 70, generator=draw), torch.randn(70, 900, generator=draw)):
            matrix = matrix.to(dtype)
            tall = (matrix if matrix.shape[0] > 70 else matrix.T).double().numpy()
            passes = Passes(_blocks(matrix), matrix.shape)
            some = np.random.default_rng(0).normal(size=(70, 3))
            for kind, exactly in ((np.float32, 1e-5), (np.float64, 1e-13)):
                vectors, gram = some.astype(kind), np.tril(tall.T @ tall)
                assert np.abs(passes.gram(kind) - gram).max() <= exactly * gram.max()
                found = passes.gram_times(vectors), passes.times(vectors)
                for ours, theirs in zip(found, (tall.T @ (tall @ some), tall @ some), strict=True):
                    assert ours.dtype == kind
                    assert np.abs(ours - theirs).max() <= 10 * exactly * np.abs(theirs).max()
            for ours, theirs in zip(
                passes.both_times(some), (tall @ some, tall.T @ (tall @ some)), strict=True
            ):
                assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("scale", "inside", "exactly"),
    [(1.0, 0.0, 1e-6), (1.0, 200.0, 1e-12), (1e-16, 0.0, 1e-12), (1e18, 0.0, 1e-12)],
    ids=["float32", "little outside", "squares too small", "squares too large"],
)
def test_energy_outside_is_the_definition(scale: float, inside: float, exactly: float) -> None:
    """In float32 where that is as good as the definition, and in float64 elsewhere."""
    draws = (torch.randn(700, 600, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    before, noise = (draw.bfloat16() for draw in draws)
    found = leading(_blocks(before), before.shape, K)
    update = (
        noise + inside * (found.left @ found.left.T @ noise.double() @ found.right @ found.right.T).float()
    )
    after = ((before + update) * scale).bfloat16()
    before = (before * scale).bfloat16()
    delta = difference(_blocks(before), _blocks(after), before.shape)
    wanted = exact.outside(_blocks(before), _blocks(after), before.shape, found)
    assert (wanted < ROUNDED) == (inside > 0)
    assert energy_outside(delta, before.shape, found) == pytest.approx(wanted, rel=exactly)
    assert min(before.shape) > SMALL
