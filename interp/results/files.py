"""Results on disk: where they come from, written all or nothing, loaded again.

A result is an `xarray.Dataset` whose attribute `provenance` holds, as JSON, what `provenance()` returns.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5netcdf
import xarray as xr
from xarray.backends import H5NetCDFStore

from hooks.errors import FrankenlensError, one_line
from hooks.whereabouts import require_file
from interp.results.lock import LOCK, locked
from interp.results.whole import sealed, told, unsealed, write_whole

_VERSIONS = ("frankenlens", "torch", "transformers", "numpy", "scipy", "xarray")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_STAGING, _READY = ".staging-", ".publishing"
_SAVE = "From Python, save it with save_dataset(dataset, path, provenance(...)), both of interp.results."


def provenance(
    models: Mapping[str, Any],
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    """What a reader needs to make a result again, as plain JSON data.

    Args:
        models: what `Pair.provenance` returns: name, class, dtype and hash of the weights of each model.
        settings: every setting that the result depends on, the seed included.
        counts: how many examples remained at each step, in order.
        dropped: reason to number of examples left out for it.
    """
    return {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoints": dict(models),
        "settings": json.loads(json.dumps(settings, default=str)),
        "counts": dict(counts),
        "dropped": dict(dropped),
        "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
    }


@contextmanager
def publishing(folder: Path | str) -> Iterator[Path]:
    """A staging folder whose files appear in `folder` together, once the block has ended well.

    If the block raises, `folder` is left as it was: no reader ever sees half a file, nor a new figure beside an old
    table because the page failed. The staging folder is renamed first, and its files then moved one by one; where that
    is cut off, whoever next reads a result there, or writes, moves the rest.

    Raises:
        FrankenlensError: `folder` cannot be made or written to, another run writes to it, the disk is full, or a folder
            stands where a file is to be.
    """
    folder = Path(folder)
    with locked(folder):
        settle(folder)
        with told(folder):
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
            try:
                yield staging
                _require_free(staging, folder)
                os.replace(staging, folder / _READY)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            settle(folder)


def settle(folder: Path) -> None:
    """Finish what was being published when a run was killed, and remove what was not complete.

    Raises:
        FrankenlensError: another run writes there, or a folder stands where a file is to be.
    """
    ready = folder / _READY
    if not os.path.isdir(ready) and not any(folder.glob(f"{_STAGING}*")):
        return
    with locked(folder):
        for left in folder.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        if os.path.isdir(ready):
            _require_free(ready, folder)
            with told(folder):
                for path in sorted(ready.iterdir()):
                    os.replace(path, folder / path.name)
                ready.rmdir()


def is_occupied(folder: Path) -> bool:
    """Whether something stands there that is not left over from a run that was killed before it published."""
    if not os.path.isdir(folder):
        return os.path.lexists(folder)
    return any(path.name != LOCK and not path.name.startswith(_STAGING) for path in folder.iterdir())


def _require_free(staging: Path, folder: Path) -> None:
    for path in sorted(staging.iterdir()):
        target = folder / path.name
        blocked = (
            os.path.lexists(target)
            if os.path.isdir(path)
            else os.path.isdir(target) and not target.is_symlink()
        )
        if blocked:
            raise FrankenlensError(
                f"{target} is {'there already' if os.path.isdir(path) else 'a folder'}, where {path.name} is to be "
                "written; remove it, or choose another --out. Nothing was written."
            )


def save_dataset(dataset: xr.Dataset, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
    """Write NetCDF 4, floats compressed, with a checksum behind it that other readers pass over; all or nothing.

    Args:
        dataset: the result; as it was, afterwards.
        path: the file.
        provenance: what the function `provenance` returns, where the attribute is not set yet; without either,
            `load_dataset` will not take the file for a result.

    Raises:
        FrankenlensError: the disk is full, or the place cannot be written to.
    """
    if provenance is not None:
        dataset = dataset.assign_attrs(provenance=json.dumps(provenance))
    packed = {str(name): {"zlib": True} for name, data in dataset.data_vars.items() if data.dtype.kind == "f"}
    # Made in memory: HDF5 that cannot write its file raises, and then ends the process.
    whole = io.BytesIO()
    with h5netcdf.File(whole, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file), encoding=packed)
    write_whole(Path(path), sealed(whole.getvalue()))


def load_dataset(path: Path | str) -> xr.Dataset:
    """Read a result into memory.

    Raises:
        FrankenlensError: there is no such file, it is not a result, or it is damaged.
    """
    path = Path(path)
    if os.path.isdir(path.parent / _READY):
        settle(path.parent)
    require_file(path, "map.nc of a result: `frankenlens map --out DIR` writes DIR/map.nc")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FrankenlensError(f"{path} cannot be read: {error.strerror}") from error
    whole = _whole(path, data)
    try:
        dataset = xr.load_dataset(io.BytesIO(whole), engine="h5netcdf")
    except MemoryError:
        raise
    except Exception as error:  # h5py, h5netcdf and xarray each raise their own
        raise FrankenlensError(
            f"{path} is not a NetCDF 4 file that can be read: {one_line(error)}"
        ) from error
    if "provenance" not in dataset.attrs:
        raise FrankenlensError(f"{path} has no provenance, so it is not a result of frankenlens. {_SAVE}")
    try:
        made = json.loads(dataset.attrs["provenance"])
    except (TypeError, ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise FrankenlensError(
            f"{path}: its provenance is no JSON object; the file is damaged, so make it again."
        )
    return dataset


def require_parts(
    dataset: xr.Dataset, path: Path | str, parts: Mapping[str, Sequence[str]], made_by: str
) -> xr.Dataset:
    """The same result, if it has the variables and coordinates that are to be read of it.

    Args:
        dataset: as `load_dataset` returns it.
        path: where it was read, for the message.
        parts: name of a variable or coordinate to its axes.
        made_by: the command whose result has them.

    Raises:
        FrankenlensError: names what it lacks.
    """
    for name, axes in parts.items():
        if name not in dataset.variables or not set(axes) <= set(map(str, dataset[name].dims)):
            raise FrankenlensError(
                f"{path} has no {name} [{' '.join(axes)}], so it is no result of `frankenlens {made_by}`; give one."
            )
    return dataset


def _whole(path: Path, data: bytes) -> bytes:
    """A result without its checksum. One that never had any is taken if it ends where it says that it does.

    So it is where other programs wrote it, or frankenlens before there were checksums. No single damage makes one of
    these of ours: what is cut off or changed behind the data leaves something, and the data are under the checksum.

    Raises:
        FrankenlensError: it is damaged.
    """
    found = unsealed(data)
    if found is not None:
        return found
    if not data.startswith(_HDF5):
        raise FrankenlensError(f"{path} is not a NetCDF 4 file, or is damaged; make it again.")
    if len(data) != _end_of_hdf5(data):
        raise FrankenlensError(
            f"{path} is damaged: its checksum does not hold, or it is cut short. Make it again."
        )
    return data


def _end_of_hdf5(data: bytes) -> int:
    """Where the file ends by its superblock (HDF5 File Format Specification, II.A); -1 where that says nothing."""
    version = data[len(_HDF5)] if len(data) > 64 else -1
    at, width = (40, data[13]) if version in (0, 1) else (28, data[9])
    at += 4 if version == 1 else 0
    return int.from_bytes(data[at : at + 8], "little") if version in (0, 1, 2, 3) and width == 8 else -1
