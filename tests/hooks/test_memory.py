"""What a cache takes, how many rows fit, and what happens when memory runs out nevertheless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hooks import FrankenlensError, HookedVLM, memory
from hooks.batches import LOGIT, at_once, fitting, in_parts
from hooks.memory import free_memory, in_words, limit, memory_limit, point_bytes, room, room_of
from tests.families import EACH_KIND, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=EACH_KIND)
def opened(request: pytest.FixtureRequest) -> tuple[HookedVLM, dict[str, Any]]:
    given = tiny(request.param)
    return HookedVLM(given.model, given.processor), given.inputs(batch=2)


def test_the_decoders_activations_take_what_is_foretold(opened: tuple[HookedVLM, dict[str, Any]]) -> None:
    vlm, inputs = opened
    names = [name for name, point in vlm.hook_points.items() if not point.tower and "image" not in point.axes]
    _, cache = vlm.run_with_cache(inputs, names)
    for name in names:
        point = vlm.hook_points[name]
        if "image_token" in point.axes or ("key" in point.axes and "cross_attn" in name):
            continue
        taken = sum(one.nbytes for one in cache.calls(name))
        assert point_bytes(vlm, point, inputs) == taken, name


def test_a_cache_that_does_not_fit_is_refused_before_anything_runs(
    opened: tuple[HookedVLM, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, inputs = opened
    monkeypatch.setattr("hooks.memory.NOT_WORTH_ASKING", 0)
    ran: list[int] = []
    handle = vlm.model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with memory_limit("20kB"):
            with pytest.raises(
                FrankenlensError, match=r"would take about .* are allowed \(memory_limit\)\. Name"
            ):
                vlm.run_with_cache(inputs)
            assert not ran
            vlm.run_with_cache(inputs, "blocks.1.hook_resid_mid")  # 2 prompts x about 20 tokens x 16 numbers
    finally:
        handle.remove()
    assert ran
    assert limit() is None


def test_of_several_devices_the_fullest_decides(
    opened: tuple[HookedVLM, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the meta device is offloaded, and has no memory of its own."""
    free, (vlm, _) = {"cuda:0": 900, "cuda:1": 300, "cpu": 5000}, opened
    monkeypatch.setattr("hooks.memory.free_memory", lambda device: free[str(device)])

    def spread(*names: str) -> HookedVLM:
        parameters = [SimpleNamespace(device=torch.device(name)) for name in names]
        monkeypatch.setattr(vlm.model, "parameters", lambda: iter(parameters))
        return vlm

    assert room_of(spread("cpu", "cuda:0")) == 900
    assert room_of(spread("cuda:0", "cuda:1", "meta")) == 300
    assert fitting(spread("cuda:0", "cuda:1"), 32, 10, "this") == 15
    with memory_limit(200):
        assert room_of(spread("cuda:0", "cuda:1")) == 200


def test_the_innermost_limit_holds_and_ends_with_its_context() -> None:
    free = free_memory(CPU)
    assert free is not None and 2**20 < free < 2**50
    with memory_limit("2GiB"):
        assert room(CPU) == 2 * 2**30
        with memory_limit(1000):
            assert room(CPU) == 1000
        assert room(CPU) == 2 * 2**30
    assert limit() is None
    with pytest.raises(FrankenlensError, match="is no size"), memory_limit("much"):
        pass
    assert [in_words(n) for n in (0, 900, 2048, 3 * 2**20, 1.5 * 2**30, 2**43)] == [
        "0 B", "900 B", "2 KiB", "3.0 MiB", "1.5 GiB", "8.0 TiB",
    ]  # fmt: skip


def test_as_many_rows_as_fit(opened: tuple[HookedVLM, dict[str, Any]]) -> None:
    vlm, _ = opened
    with memory_limit(1000):
        assert fitting(vlm, 32, 100, "this") == 10
        assert fitting(vlm, 32, 100, "this", whole=450) == 5
        assert fitting(vlm, 4, 100, "this") == 4
        with pytest.raises(
            FrankenlensError, match=r"takes about 1001 B for one prompt.*1000 B of memory is allow"
        ):
            fitting(vlm, 32, 1001, "this")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: x"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(error: Exception) -> None:
    asked: list[int] = []

    def run(rows: Sequence[int]) -> list[int]:
        asked.append(len(rows))
        if len(rows) > 3:
            raise error
        return [10 * row for row in rows]

    found = {
        row: value
        for rows, values in in_parts(range(11), 8, run)
        for row, value in zip(rows, values, strict=True)
    }
    assert found == {row: 10 * row for row in range(11)}
    assert asked == [8, 4, 2, 2, 4, 2, 2, 3]

    def never(rows: Sequence[int]) -> list[int]:
        raise error

    with pytest.raises(FrankenlensError, match="memory ran out with one prompt at a time"):
        list(in_parts(range(3), 2, never))


@pytest.mark.parametrize("version", [0, 1])
def test_files_that_a_container_has_read_make_way(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was read stands in the kernel's cache, and counts as used; of 16 MiB, 15 are such files."""
    *_, word = memory._CGROUPS[version]
    texts = (f"{2**24}\n", f"{2**24 - 4096}\n", f"anon 5\nactive_file 7\n{word} {15 * 2**20}\nslab 3\n")
    paths = [tmp_path / name for name in ("most", "used", "stat")]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", ((*map(str, paths), word),))
    assert free_memory(CPU) == 15 * 2**20 + 4096
    paths[2].unlink()
    assert free_memory(CPU) == 4096


def test_what_was_begun_in_other_parts_is_gone_on_with_in_these() -> None:
    asked: list[int] = []

    def run(rows: Sequence[int]) -> list[int]:
        asked.append(len(rows))
        return [10 * row for row in rows]

    begun = {0: 5, 5: 3, 12: 1}
    found = list(in_parts(range(15), 4, run, lambda rows: begun.get(rows[0], 0)))
    assert [value for _, values in found for value in values] == [10 * row for row in range(15)]
    assert asked == [5, 3, 4, 1, 2]


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    def run(rows: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_parts(range(3), 2, run))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_take_no_more_than_a_quarter_of_a_limit(device: str) -> None:
    """With 151,936 words on a GPU they would else take two gibibytes, all of a limit of two."""
    n_words, kind = 151_936, torch.device(device)
    whole = at_once(n_words, kind)
    with memory_limit("2GiB"):
        assert at_once(n_words, kind) * LOGIT * n_words <= 2**29 and at_once(n_words, kind) <= whole
    with memory_limit("1MiB"):
        assert at_once(n_words, kind) == 1
    assert at_once(n_words, kind) == whole == {"cpu": 110, "cuda": 883}[device]
