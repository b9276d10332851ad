"""What is kept on disk: whole or not at all, of what it says, by one run at a time, and never believed when damaged."""

import errno
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from hooks.errors import FrankenlensError
from interp.metrics import LogitDifference
from interp.results import files, load_dataset, provenance, publishing, save_dataset
from interp.results.digest import digest
from interp.results.lock import locked
from interp.results.store import Store, fingerprint, part
from interp.results.whole import read_record, write_record

Damage = Callable[[Path, random.Random], None]
VALUE = {"ids": [[1, 2], [3]], "text": "ä\n", "none": None, "x": 0.1, "nan": float("nan")}


def _truncated(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _made_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _linked_to_nothing(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def _linked_elsewhere(path: Path, rng: random.Random) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    path.unlink()
    path.symlink_to(other)


def _another_part(path: Path, rng: random.Random) -> None:
    """A sound part under the wrong name."""
    Store(path.parent, {"a": 1}).save("another", [9])
    path.write_bytes(path.with_name("another.part").read_bytes())


DAMAGES: tuple[Damage, ...] = (
    _truncated,
    _flipped,
    _flipped,
    _emptied,
    _made_a_folder,
    _linked_to_nothing,
    _linked_elsewhere,
)


def _is_refused_or_remade(read: Callable[[], Any]) -> bool:
    """True: named in a refusal, or read as nothing; False: something was read."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = read()
        except FrankenlensError as error:
            return "/" in str(error)
    return found is None and any("is damaged and is made again" in str(one.message) for one in said)


def test_damaged_parts_are_never_believed(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(120):
        folder = tmp_path / str(trial)
        store = Store(folder, {"a": 1})
        store.save("x", VALUE)
        damage = rng.choice((*DAMAGES, _another_part))
        before = (folder / "x.part").read_bytes()
        damage(folder / "x.part", rng)
        if (folder / "x.part").is_file() and (folder / "x.part").read_bytes() == before:
            continue  # flipped back
        assert _is_refused_or_remade(lambda store=store: store.load("x")), damage.__name__
        if not (folder / "x.part").is_dir() and damage is not _another_part:
            with pytest.warns(UserWarning, match=r"x\.part is damaged and is made again"):
                assert store.part("x", lambda: [1]) == [1]
            assert store.load("x") == [1] and not (folder / "x.part").is_symlink()


def test_a_damaged_description_of_a_folder_is_written_again_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(40):
        folder = tmp_path / str(trial)
        Store(folder, {"a": 1, "text": "b"}).save("x", [1])
        before = (folder / "about.json").read_bytes()
        damage = rng.choice(DAMAGES)
        damage(folder / "about.json", rng)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                assert Store(folder, {"a": 1, "text": "b"}).load("x") == [1]
                if not (folder / "about.json").is_symlink():
                    assert (folder / "about.json").read_bytes().split() == before.split()
            except FrankenlensError:
                assert damage is _made_a_folder
            with pytest.raises(FrankenlensError, match="is of other|holds another|is a folder"):
                Store(folder, {"a": 2, "text": "b"}).load("x")


def test_damaged_records_are_never_believed(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(40):
        path = tmp_path / str(trial) / "record.json"
        write_record(path, {"right": [1.0, None], "why": ["", "x"]})
        assert read_record(path) == {"right": [1.0, None], "why": ["", "x"]}
        damage = rng.choice(DAMAGES)
        damage(path, rng)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = read_record(path)
            except FrankenlensError:
                assert damage is _made_a_folder
                continue
        # a flipped space of the layout changes nothing that is read
        assert found == {"right": [1.0, None], "why": ["", "x"]} or (found is None and len(said) == 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_record_that_may_not_be_read_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, [1])
    path.chmod(0)
    with pytest.raises(FrankenlensError, match=r"Cannot read .*record.json: Permission denied"):
        read_record(path)


def test_a_record_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_record(path, [1])

    def failing(self: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(FrankenlensError, match=rf"Cannot read .*record.json: {os.strerror(errno.EIO)}"):
        read_record(path)


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    rng = np.random.default_rng(0)
    names = np.array(["a", "bc"], str)
    return xr.Dataset(
        {
            "effect": (("x", "name"), rng.normal(size=(40, 2))),
            "why": ("name", names),
            "n": ("x", np.arange(40)),
        },
        coords={"name": names},
        attrs={"units": "nats", "both": ["a", "b"]},
    )


def test_damaged_results_are_never_believed(result: xr.Dataset, tmp_path: Path) -> None:
    whole = tmp_path / "whole.nc"
    save_dataset(result, whole, provenance({}, {}, {}, {}))
    rng, data, refused = random.Random(0), whole.read_bytes(), 0
    for trial in range(100):
        path = tmp_path / str(trial) / "map.nc"
        path.parent.mkdir()
        path.write_bytes(data)
        damage = rng.choice(DAMAGES)
        damage(path, rng)
        if path.is_file() and path.read_bytes() == data:
            continue
        with pytest.raises(FrankenlensError, match=r"map\.nc"):
            load_dataset(path)
        refused += 1
    assert refused >= 95


def test_other_programs_read_a_result_with_its_checksum(result: xr.Dataset, tmp_path: Path) -> None:
    save_dataset(result, tmp_path / "own.nc", provenance({}, {}, {}, {}))
    ours = load_dataset(tmp_path / "own.nc")
    xr.testing.assert_identical(ours.drop_attrs(), result.drop_attrs())
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "own.nc", engine="h5netcdf"), ours)
    again = tmp_path / "again.nc"
    ours.to_netcdf(again, engine="h5netcdf")  # as results were before there were checksums
    xr.testing.assert_identical(load_dataset(again), ours)
    again.write_bytes(again.read_bytes()[:-1])
    with pytest.raises(FrankenlensError, match="cut short"):
        load_dataset(again)
    sealed = (tmp_path / "own.nc").read_bytes()
    seal = len(b"\nfrankenlens sha256 ") + 64 + 1
    for end in range(1, seal):  # whatever is left of the checksum
        (tmp_path / "own.nc").write_bytes(sealed[:-end])
        with pytest.raises(FrankenlensError, match="is damaged"):
            load_dataset(tmp_path / "own.nc")
    (tmp_path / "own.nc").write_bytes(sealed[:-seal])  # all of the data, and nothing but the data
    xr.testing.assert_identical(load_dataset(tmp_path / "own.nc"), ours)


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", {"a": 1})
    rng = np.random.default_rng(0)
    arrays = {"double": rng.normal(size=(2, 0, 3)), "single": rng.normal(size=4).astype("f4")}
    arrays |= {"odd": np.array([np.nan, np.inf, -0.0, 5e-324]), "text": np.array([["ä", ""], ["b\n", "c"]])}
    table = pd.DataFrame({"name": ["a", ""], "x": [0.1 + 0.2, np.nan], "n": [1, 2], "yes": [True, False]})
    store.save("x", {"arrays": arrays, "table": table, "plain": VALUE})
    found = Store(tmp_path / "new", {"a": 1}).load("x")
    for name, array in arrays.items():
        assert found["arrays"][name].dtype.kind == array.dtype.kind
        np.testing.assert_array_equal(found["arrays"][name], array)
    pd.testing.assert_frame_equal(found["table"], table)
    assert found["plain"]["x"] == 0.1 and found["plain"]["text"] == "ä\n" and found["plain"]["none"] is None
    with pytest.raises(TypeError, match="plain data"):
        store.save("y", object())


def test_a_part_is_computed_once_and_read_the_same_before_and_after(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return {"x": (1, 2), "y": np.float32(0.1)}

    store = Store(tmp_path, {"a": 1})
    first = store.under("one").part("x", compute)
    assert first == store.under("one").part("x", compute) == {"x": [1, 2], "y": float(np.float32(0.1))}
    assert len(calls) == 1 and part(None, "x", compute) != first and len(calls) == 2
    with pytest.raises(FrankenlensError, match="of other prompts or settings"):
        store.under("one").part("x", compute, "another fingerprint")


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    Store(tmp_path, {"a": 1}).save("x", [1])
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / f".x.part.{child}").write_text("half")
    Store(tmp_path, {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "x.part"]


# publishing


def _killed_at(dies_at: int) -> Callable[..., None]:
    """os.replace of a process that is killed before it calls it for that time."""
    done, own = [0], os.replace

    def replace(one: Any, other: Any) -> None:
        done[0] += 1
        if done[0] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        own(one, other)

    return replace


def _publish(out: Path, texts: dict[str, str], dataset: xr.Dataset | None = None) -> None:
    with publishing(out) as staging:
        for name, text in texts.items():
            (staging / name).write_text(text)
        if dataset is not None:
            save_dataset(dataset, staging / "map.nc", provenance({}, {}, {}, {}))


def test_killed_between_renames_all_files_appear_in_the_end(tmp_path: Path, monkeypatch) -> None:
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / name).write_text("old")
    for dies_at in range(1, 5):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(files.os, "replace", _killed_at(dies_at))
            with publishing(tmp_path) as staging:
                for name in ("a.csv", "b.csv", "c.csv"):
                    (staging / name).write_text(f"new {dies_at}")
            os._exit(0)
        os.waitpid(child, 0)
        files.settle(tmp_path)
        texts = {(tmp_path / name).read_text() for name in ("a.csv", "b.csv", "c.csv")}
        assert len(texts) == 1  # all old before the first rename, all new after it
        assert (texts == {f"new {dies_at}"}) == (dies_at > 1)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
            "a.csv",
            "b.csv",
            "c.csv",
        ]


def test_a_folder_where_a_file_is_to_be_stops_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(FrankenlensError, match=r"b\.csv is a folder, where b\.csv is to be written"):
        _publish(tmp_path, {"a.csv": "new", "b.csv": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]
    assert (tmp_path / "a.csv").read_text() == "old"


def test_a_failed_run_leaves_no_empty_folder(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), publishing(tmp_path / "new" / "out"):
            raise error
        assert not any(tmp_path.iterdir())


# one run a folder


def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "out"):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    with (
        pytest.raises(FrankenlensError, match=f"Another run writes to .*process {child} on "),
        locked(tmp_path / "out"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "out" / ".lock").exists()
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out" / ".lock").exists()


def test_threads_of_one_process_are_two_runs(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path):
                said.append("in")
        except FrankenlensError as error:
            said.append(str(error))

    for inside in (True, False):
        thread = threading.Thread(target=other)
        if inside:
            with locked(tmp_path):
                thread.start()
                thread.join()
        else:
            thread.start()
            thread.join()
    assert "Another thread of this process" in said[0] and said[1] == "in"


# a full disk


class _Full:
    """A file that a full disk takes no more than some bytes of."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self._file, self._room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, data: Any) -> int:
        self._room[0] -= len(data)
        if self._room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
    """From now on files below a folder take that many bytes together."""
    import builtins
    import io

    left, own = [room], builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        made = own(file, mode, *args, **kwargs)
        inside = isinstance(file, (str, os.PathLike)) and str(file).startswith(str(folder))
        return _Full(made, left) if inside and set(mode) & set("wax+") else made

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)


@pytest.mark.parametrize("room", [0, 50, 3000])
def test_a_full_disk_is_one_error_and_leaves_what_was_there(
    room: int, result: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with publishing(out) as staging:
        (staging / "map.csv").write_text("old")
    store = Store(out / "finished", {"a": 1})
    store.save("x", [1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        full_disk(patched, tmp_path, room)
        with pytest.raises(FrankenlensError, match="No space is left for"):
            _publish(out, {"map.csv": "new" * 1000}, result)
        with pytest.raises(FrankenlensError, match="No space is left for"):
            store.save("x", ["more"] * 1000)
        with pytest.raises(FrankenlensError, match="No space is left for"):
            Store(out / "further" / "store", {"a" * 4000: 1}).save("x", [1])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert store.load("x") == [1]


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_numbers_that_print_alike_are_told_apart(kind: Any) -> None:
    near, long = kind([0.123456, 1.0]), kind([0.0] * 3000)
    for one, other in ((near, kind([0.123459, 1.0])), (long, kind([0.0] * 1500 + [1.0] + [0.0] * 1499))):
        assert repr(one) == repr(other) or kind is np.array
        assert fingerprint(one) != fingerprint(other) and digest(one) != digest(other)
        assert fingerprint([one]) == fingerprint([kind(one.tolist())])
    assert digest(LogitDifference(torch.tensor([1]), torch.tensor([2]))) != digest(
        LogitDifference(torch.tensor([1]), torch.tensor([3]))
    )
