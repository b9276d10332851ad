"""How much memory may be taken: what is free, or less where somebody has said so; and what a cache would take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks.errors import FrankenlensError, shown
from hooks.opened import Opened
from hooks.points import HookPoint
from hooks.weights import d_mlp

NOT_WORTH_ASKING = 1 << 26
"""Bytes below which nobody asks what is free: 64 MiB."""
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s{0,8}([KMGT]?)(i?)B?", re.IGNORECASE)
_LIMIT: ContextVar[int | None] = ContextVar("frankenlens_memory_limit", default=None)
_BESIDE: ContextVar[int] = ContextVar("frankenlens_processes", default=1)
_V1, _V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
_CGROUPS = (
    (f"{_V2}/memory.max", f"{_V2}/memory.current", f"{_V2}/memory.stat", "inactive_file"),
    (
        f"{_V1}/memory.limit_in_bytes",
        f"{_V1}/memory.usage_in_bytes",
        f"{_V1}/memory.stat",
        "total_inactive_file",
    ),
)
"""Where a container's limit stands, what it uses, and how much of that are files it has read, which make way."""


def parse_bytes(size: int | str | None) -> int | None:
    """Bytes of 123, "500MB", "2GiB".

    Raises:
        FrankenlensError: it is neither.
    """
    if size is None:
        return None
    if isinstance(size, Integral) and not isinstance(size, bool) and 0 < size < 2**63:  # type: ignore[operator]
        return int(size)
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    found = 0
    if match is not None:
        number, letter, binary = match.groups()
        found = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
    if not 0 < found < 2**63:
        raise FrankenlensError(f'{shown(size)} is no size; give bytes, or such as "500MB" or "2GiB"')
    return found


def in_words(n_bytes: int | float) -> str:
    """1.5 GiB."""
    power = min(4, max(0, int(math.log(max(n_bytes, 1), 1024))))
    return f"{n_bytes / 1024**power:.{0 if power < 2 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@contextmanager
def memory_limit(size: int | str | None) -> Iterator[None]:
    """Methods inside take no more than this beside the models, on each device; None: half of what is free.

    Batches, lanes and stored activations are made as small as that takes; what cannot be made small enough is refused
    before it runs. A plain `vlm(inputs)` is run as it is.

    Args:
        size: bytes, or such as "2GiB".

    Raises:
        FrankenlensError: it is no size.

    Example:
        >>> prompt = pair.builder.build(fl.tasks.sample("sum", 1, seed=0, split="map")[0])
        >>> with fl.memory_limit("10MiB"):
        ...     ids = fl.greedy(pair.in_, [prompt], max_new_tokens=4)
    """
    token = _LIMIT.set(parse_bytes(size))
    try:
        yield
    finally:
        _LIMIT.reset(token)


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """So many processes, this one among them, take what is free of main memory, and each its share."""
    token = _BESIDE.set(processes)
    try:
        yield
    finally:
        _BESIDE.reset(token)


def limit() -> int | None:
    """The bytes of the innermost `memory_limit`; None outside of any."""
    return _LIMIT.get()


def room(device: torch.device) -> int | None:
    """Bytes that may be taken on a device: the limit, else what is free; None where that is not known."""
    given = limit()
    return free_memory(device) if given is None else given


def room_of(vlm: Opened) -> int | None:
    """The least room on any of the devices that a model is spread over; None where that is not known of one."""
    devices = {vlm.device, *(one.device for one in vlm.model.parameters() if one.device.type != "meta")}
    rooms = [room(device) for device in devices]
    return None if None in rooms else min(one for one in rooms if one is not None)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, those that PyTorch holds in reserve there among them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    free_of = [] if found is None else [1024 * int(found[1])]
    for most, used, stat, read in _CGROUPS:
        numbers = [_text(path).strip() for path in (most, used)]
        if all(number.isdigit() for number in numbers):
            files = re.search(rf"^{read} (\d+)$", _text(stat), re.MULTILINE)
            taken = int(numbers[1]) - (0 if files is None else int(files[1]))
            free_of.append(max(0, int(numbers[0]) - taken))
    return min(free_of) // _BESIDE.get() if free_of else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def require_room_for_cache(vlm: Opened, inputs: Mapping[str, Any], points: Iterable[HookPoint]) -> None:
    """Refuses a cache that there is no memory for, before anything runs.

    Raises:
        FrankenlensError: what it would take, by hook point, and what is free.
    """
    sizes: dict[str, int] = {}
    for point in points:
        sizes[point.leaf] = sizes.get(point.leaf, 0) + point_bytes(vlm, point, inputs)
    total = sum(sizes.values())
    device = next(vlm.model.parameters()).device
    if total < NOT_WORTH_ASKING or (free := room(device)) is None or total <= free:
        return
    largest = sorted(sizes, key=lambda leaf: -sizes[leaf])[:3]
    told = ", ".join(f"{in_words(sizes[leaf])} {leaf}" for leaf in largest)
    whose = f"are free on {device}" if limit() is None else "are allowed (memory_limit)"
    raise FrankenlensError(
        f"this cache would take about {in_words(total)} ({told}), and {in_words(free)} {whose}. Name the hook points "
        "that you need, run_with_cache(inputs, names), or run fewer prompts at a time."
    )


def point_bytes(vlm: Opened, point: HookPoint, inputs: Mapping[str, Any]) -> int:
    """What a hook point's activation takes on these inputs, about; what is not known of a vision tower counts as 1."""
    tower = vlm.anatomy.towers.get(point.tower, vlm.anatomy.text)
    rows, width = _tokens(inputs)
    dims = {
        "batch": rows,
        **dict.fromkeys(("pos", "query", "key"), width),
        "d_model": vlm.anatomy.text.width,
        **dict.fromkeys(("d_vision", "d_tower"), tower.width),
    }
    if point.tower:
        pixels = inputs.get("pixel_values")
        patches = len(pixels) if isinstance(pixels, Tensor) and pixels.ndim == 2 else 1
        dims |= {"patch": patches, "query": patches, "key": patches}
    if point.layer is not None and point.layer < len(tower.blocks):
        block = tower.blocks[point.layer]
        dims |= {"head": block.n_heads, "kv_head": block.n_kv_heads, "d_head": block.d_head}
        if "d_mlp" in point.axes:
            dims["d_mlp"] = d_mlp(vlm.model, block)
    if point.experts is not None:
        dims["expert"] = point.experts.n_experts
    item = next(vlm.model.parameters()).element_size()
    return item * math.prod(max(1, int(dims.get(axis, 1) or 1)) for axis in point.axes)


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    ids = inputs.get("input_ids")
    return (int(ids.shape[0]), int(ids.shape[1])) if isinstance(ids, Tensor) and ids.ndim == 2 else (1, 1)
