"""What `torch.save` wrote, without running a word of it: which tensors, and at which bytes of the file.

The pickle inside is read by an unpickler that admits the names on `ADMITTED` alone and puts an inert stand-in in the
place of each: nothing that a file names is imported, called or built. A tensor's numbers are not read either; what
comes back says where they lie (`View`).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hooks.errors import FrankenlensError, one_line, shown
from hooks.stored.tensors import Piece

ADMITTED: Mapping[str, frozenset[str]] = {
    "tensors": frozenset(
        {"_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter", "_rebuild_from_type_v2"}
        | {"_rebuild_wrapper_subclass", "_get_layout", "Size", "device", "Tensor", "Parameter"}
    ),
    "parts": frozenset(
        {
            "DTensor",
            "DTensorSpec",
            "TensorMeta",
            "DeviceMesh",
            "_MeshLayout",
            "_FlatLayout",
            "ShardOrderEntry",
        }
        | {"Shard", "_StridedShard", "Replicate", "Partial", "_Partial"}
        | {
            "ShardedTensor",
            "ShardMetadata",
            "ShardedTensorMetadata",
            "TensorProperties",
            "MEM_FORMAT_ENCODING",
        }
        | {"_remote_device", "ProcessGroupState", "ChunkShardingSpec", "EnumerableShardingSpec"}
    ),
    "index": frozenset(
        {"Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"}
        | {"TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta", "_StorageInfo", "Size", "_get_layout"}
    ),
}
"""Names of PyTorch's own modules: of tensors, of the parts of distributed ones, and of the index of
`torch.distributed.checkpoint`. Modules moved between versions, the names stayed."""
_ELSEWHERE = {"collections.OrderedDict", "_io.BytesIO", "io.BytesIO", "builtins.set", "__builtin__.set"}
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"}
_GETATTR = {"builtins.getattr", "__builtin__.getattr"}  # how protocol 2 writes the name of a nested class
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_AGAIN = (
    "Only tensors are read of it, and nothing that it names is run. Load it once in a place you trust, and save the "
    "model with save_pretrained(folder)."
)


class StandIn:
    """In the place of whatever a pickle names: it keeps what it was given, and does nothing.

    Attributes:
        given: arguments.
        state: what was set on it afterwards; fields by name.
        whole: the same as it was written.
    """

    given: tuple[Any, ...]
    state: dict[str, Any]
    whole: Any

    def __new__(cls, *given: Any, **named: Any) -> StandIn:
        made = object.__new__(cls)
        made.__dict__.update(given=given, state=dict(named), whole=None)
        return made

    def __init__(self, *given: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Keep fields; of an object with slots they come as the second of a pair."""
        self.__dict__["whole"] = state
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.state.update({str(name): value for name, value in part.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        self.state[name] = value

    @property
    def kind(self) -> str:
        """The name that the pickle gave."""
        return type(self).__name__

    def get(self, name: str, default: Any = None) -> Any:
        """A field."""
        return self.state.get(name, default)


class Numbers(NamedTuple):
    """A storage: its type, where it lies and how many numbers it has."""

    dtype: torch.dtype
    file: Path
    start: int
    count: int


class View(NamedTuple):
    """A tensor in a file: a storage, and which numbers of it.

    Attributes:
        numbers: the storage.
        first: the tensor's first number in it.
        shape, stride: as of a tensor.
    """

    numbers: Numbers
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.numbers.dtype

    def piece(self, what: str) -> Piece:
        """Its bytes.

        Raises:
            FrankenlensError: they are not stored in the order of its entries, or end after the storage does.
        """
        wanted, sides = 1, []
        for side, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            sides.append(side == 1 or stride == wanted)
            wanted *= side
        count = math.prod(self.shape)
        if count and not all(sides):
            raise FrankenlensError(
                f"{self.numbers.file}: {what} is stored transposed or with gaps (shape {list(self.shape)}, stride "
                f"{list(self.stride)}), which is not read. {_AGAIN}"
            )
        if self.first < 0 or self.first + count > self.numbers.count:
            raise FrankenlensError(f"{self.numbers.file}: {what} ends after its storage does; copy it again.")
        size = self.dtype.itemsize
        return self.numbers.file, self.numbers.start + self.first * size, count * size


def read_saved(file: Path, start: int = 0, size: int | None = None) -> Any:
    """What `torch.save` put into a file, or into a stretch of one: tensors as `View`, all else inert.

    Args:
        file: which.
        start, size: of the stretch, in bytes; by default all of the file.

    Raises:
        FrankenlensError: names the file: it names what is not admitted, such as a function that would be called; it is
            no archive of `torch.save`, cut short, or of another byte order.
    """
    with file.open("rb") as stream:
        whole = stream.seek(0, io.SEEK_END)
        if not 0 <= start <= whole or (size is not None and not 0 <= size <= whole - start):
            raise FrankenlensError(f"{file} ends before its last tensor does; copy it again.")
        inside: Any = _Stretch(stream, start, whole - start if size is None else size)
        try:
            with zipfile.ZipFile(inside) as archive:
                return _of_archive(archive, inside, file, start)
        except FrankenlensError:
            raise
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            KeyError,
            struct.error,
            NotImplementedError,
        ) as error:
            raise FrankenlensError(
                f"{file} cannot be read as what torch.save writes (since PyTorch 1.6): {one_line(error)}. {_AGAIN}"
            ) from error


def read_index(file: Path) -> StandIn:
    """The `.metadata` of `torch.distributed.checkpoint`, all of it inert.

    Raises:
        FrankenlensError: names the file: it names what is not admitted, is cut short, or is no such index.
    """
    found = _unpickled(file.read_bytes(), file, ("index",), None)
    if not isinstance(found, StandIn) or found.kind != "Metadata":
        raise FrankenlensError(
            f"{file} is no index of torch.distributed.checkpoint: it holds {shown(found)}."
        )
    return found


def _of_archive(archive: zipfile.ZipFile, inside: Any, file: Path, start: int) -> Any:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise FrankenlensError(
            f"{file} is an archive without data.pkl, so torch.save did not write it. {_AGAIN}"
        )
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise FrankenlensError(f"{file} was written on a big-endian machine. {_AGAIN}")

    def numbers(storage: Any) -> Numbers:
        if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage":
            raise pickle.UnpicklingError(f"{shown(storage)} is no storage")
        _, kind, key, _, count = storage
        dtype = _STORAGES.get(getattr(kind, "__name__", ""))
        if dtype is None or not isinstance(count, int) or f"data/{key}" not in names:
            raise pickle.UnpicklingError(f"{shown(storage[1:])} is no storage that is known")
        record = archive.getinfo(names[f"data/{key}"])
        if record.compress_type != zipfile.ZIP_STORED or record.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"the record of storage {key} is compressed or too short")
        return Numbers(dtype, file, start + _first_byte(inside, record), count)

    return _unpickled(archive.read(names["data.pkl"]), file, ("tensors", "parts"), numbers)


def _first_byte(inside: Any, record: zipfile.ZipInfo) -> int:
    """Where the contents of a record begin: after its own header, which may be padded."""
    inside.seek(record.header_offset)
    header = inside.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return record.header_offset + 30 + name + extra


def _unpickled(data: bytes, file: Path, admitted: tuple[str, ...], numbers: Any) -> Any:
    try:
        return _Unpickler(data, file, frozenset().union(*(ADMITTED[one] for one in admitted)), numbers).load()
    except FrankenlensError:
        raise
    except Exception as error:  # a pickle that is no pickle can raise anything
        raise FrankenlensError(
            f"{file} is damaged, or not what PyTorch writes: {one_line(error)}. {_AGAIN}"
        ) from error


_Python: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_Python):
    """Admits names, and puts a stand-in in the place of each; the stand-ins are made anew for every file.

    The unpickler that is written in Python, since that in C makes room for as many objects as a pickle says.
    """

    def __init__(self, data: bytes, file: Path, names: frozenset[str], numbers: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._file, self._names, self._numbers = file, names, numbers
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._made:
            self._made[full] = self._stand_in(module, name, full)
        return self._made[full]

    def _stand_in(self, module: str, name: str, full: str) -> Any:
        if full in _GETATTR:
            return _calls("getattr", self._nested)
        if full == "collections.OrderedDict":
            return type("OrderedDict", (OrderedDict,), {})
        if module == "torch" and name in _STORAGES:
            return type(name, (), {})
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        ours = module == "torch" or module.startswith("torch.")
        last = name.rpartition(".")[2]
        if ours and last in self._names:
            made = {"_rebuild_tensor_v2": _view, "_rebuild_parameter": _first}.get(last)
            return _calls(last, made) if made else _stand_in_of(last)
        if full in _ELSEWHERE or (module.startswith("pathlib") and name in _PATHS):
            return _stand_in_of(name)
        raise FrankenlensError(
            f"{self._file} is a pickle that names {full}, which is neither a tensor nor a part of one; such a file can "
            f"run code when it is loaded, so it is not. {_AGAIN}"
        )

    def _nested(self, owner: Any, name: Any) -> Any:
        if isinstance(owner, type) and issubclass(owner, StandIn) and name in self._names:
            return _stand_in_of(name)
        raise FrankenlensError(
            f"{self._file} is a pickle that calls getattr({shown(owner)}, {shown(name)}), which is not done. {_AGAIN}"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._numbers is None:
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self._numbers(pid)


def _stand_in_of(name: str) -> type[StandIn]:
    return type(name, (StandIn,), {})


def _calls(name: str, function: Callable[..., Any]) -> type:
    """A class that is one of our functions: what a pickle sets on it is gone with the file."""
    return type(name, (), {"__new__": lambda cls, *given: function(*given)})


def _view(numbers: Any, first: Any, shape: Any, stride: Any, *_: Any) -> View:
    sides: list[Any] = [
        side.given[0] if isinstance(side, StandIn) and side.given else side for side in (shape, stride)
    ]
    whole = all(isinstance(one, int) for side in (*sides, [first]) for one in side)
    if not isinstance(numbers, Numbers) or not whole or len(sides[0]) != len(sides[1]):
        raise pickle.UnpicklingError(f"{shown((first, shape, stride))} describes no tensor")
    return View(numbers, first, tuple(sides[0]), tuple(sides[1]))


def _first(tensor: Any, *_: Any) -> Any:
    return tensor


class _Stretch(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: Any, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a place before the file begins")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        n = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(n)
        self._at += len(data)
        return data
