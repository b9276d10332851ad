"""Finished parts of a sweep on disk, so that a killed one loses nothing.

A shard is one safetensors file, written under a temporary name and renamed once it is complete; its header holds a
checksum of the numbers and the fingerprint of what they are of. Processes that share a folder can at worst compute
the same shard twice, and then both write the same bytes.
"""

from __future__ import annotations

import json
import os
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hooks import FrankenlensError

Values = Float64[np.ndarray, "..."]


class ShardStore:
    """A folder of shards of one sweep.

    Args:
        folder: made if it is not there.
        about: what the sweep is of; a folder serves one sweep.

    Raises:
        FrankenlensError: the folder holds another sweep, or cannot be written.
    """

    def __init__(self, folder: Path | str, about: dict[str, Any]) -> None:
        self.folder = Path(folder)
        text = json.dumps(about, indent=1, sort_keys=True)
        self.key = sha256(text.encode()).hexdigest()
        manifest = self.folder / "sweep.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists():
                _write(manifest, text.encode())
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except OSError as error:
            raise FrankenlensError(
                f"cannot write to {folder}: {error.strerror}; choose another out="
            ) from error
        except json.JSONDecodeError as error:
            raise FrankenlensError(
                f"{manifest} is damaged ({error}); delete it to go on with the shards beside it"
            ) from error
        mine = json.loads(text)
        other = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))
        if other:
            raise FrankenlensError(
                f"{folder} holds another sweep (other {', '.join(other)}); choose another out=, or delete the folder"
            )

    def load(self, name: str, fingerprint: str) -> Values | None:
        """The values of a shard; None if it is not there, or (with a warning) damaged or of something else."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            values = load(data)["values"]
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            header = json.loads(metadata["shard"])
            sound = header["sha256"] == sha256(values.tobytes()).hexdigest()
        except (SafetensorError, KeyError, ValueError) as error:
            sound, header = False, {"error": str(error)}
            values = np.empty(0)
        if not sound:
            warnings.warn(f"shard {path} is damaged and is made again", stacklevel=2)
            return None
        if header["of"] != self._of(fingerprint):
            raise FrankenlensError(
                f"{path} is of other prompts or interventions than this sweep's; choose another out=, or delete "
                "the folder"
            )
        return values

    def save(self, name: str, fingerprint: str, values: Values) -> None:
        """Writes a shard, all or nothing."""
        values = np.ascontiguousarray(values)
        header = {"sha256": sha256(values.tobytes()).hexdigest(), "of": self._of(fingerprint)}
        # One entry: safetensors writes several in no fixed order.
        _write(self._path(name), save({"values": values}, metadata={"shard": json.dumps(header)}))

    def _of(self, fingerprint: str) -> str:
        return sha256((self.key + fingerprint).encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
