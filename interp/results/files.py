"""Results on disk: where they come from, written all or nothing, loaded again.

A result is an `xarray.Dataset` whose attribute `provenance` holds, as JSON, what `provenance()` returns.
"""

from __future__ import annotations

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

import xarray as xr

from hooks.errors import FrankenlensError, one_line
from hooks.whereabouts import require_file

_VERSIONS = ("frankenlens", "torch", "transformers", "numpy", "scipy", "xarray")


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
    """A staging folder whose files appear in `folder` together, each by one rename, once the block has ended well.

    If the block raises, `folder` is left as it was: no reader ever sees half a file, nor a new figure beside
    an old table because the page failed.

    Raises:
        FrankenlensError: `folder` cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise FrankenlensError(
            f"Cannot write to {folder}: {error.strerror}. Choose another --out."
        ) from error
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging)


def save_dataset(dataset: xr.Dataset, path: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
    """Write NetCDF 4, floats compressed; inside `publishing`, all or nothing.

    Args:
        dataset: the result; as it was, afterwards.
        path: the file.
        provenance: what the function `provenance` returns, where the attribute is not set yet; without either,
            `load_dataset` will not take the file for a result.
    """
    if provenance is not None:
        dataset = dataset.assign_attrs(provenance=json.dumps(provenance))
    packed = {str(name): {"zlib": True} for name, data in dataset.data_vars.items() if data.dtype.kind == "f"}
    dataset.to_netcdf(path, engine="h5netcdf", encoding=packed)


def load_dataset(path: Path | str) -> xr.Dataset:
    """Read a result into memory.

    Raises:
        FrankenlensError: there is no such file, or it is not a result.
    """
    path = Path(path)
    require_file(path, "map.nc of a result: `frankenlens map --out DIR` writes DIR/map.nc")
    try:
        dataset = xr.load_dataset(path, engine="h5netcdf")
    except MemoryError:
        raise
    except Exception as error:  # h5py, h5netcdf and xarray each raise their own at what is damaged
        raise FrankenlensError(
            f"{path} is not a NetCDF 4 file that can be read: {one_line(error)}"
        ) from error
    if "provenance" not in dataset.attrs:
        raise FrankenlensError(
            f"{path} has no provenance, so it is not a result of frankenlens. From Python, save it with "
            "save_dataset(dataset, path, provenance(...)), both of interp.results."
        )
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
