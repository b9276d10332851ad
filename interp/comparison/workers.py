"""Work on many tensors at once: a thread each, which share PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm.auto import tqdm

READERS = 4
"""Items at once where files are read: some wait for the disk while others are computed with."""
Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(
    function: Callable[[Item], Found],
    items: Sequence[Item],
    sizes: Sequence[int],
    label: str,
    progress: bool = True,
    at_least: int = 1,
    at_most: int | None = None,
) -> list[Found]:
    """`function` of every item, in the items' order.

    As many at once as PyTorch may use threads (`torch.set_num_threads`), which share these; the largest begin.

    Args:
        function: what is done.
        items: what it is done with.
        sizes: of the items, for the bar and the order.
        label: of the bar.
        progress: whether a bar is shown.
        at_least: items at once, whatever PyTorch may use (`READERS`, where most of the time goes into reading).
        at_most: items at once, where each takes much memory.
    """
    threads = torch.get_num_threads()
    order = sorted(range(len(items)), key=lambda i: -sizes[i])
    workers = min(max(threads, at_least), at_most or len(items) or 1)
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        running = {pool.submit(function, items[i]): i for i in order}
        found = {}
        with tqdm(total=sum(sizes), desc=label, unit_scale=True, disable=not progress, delay=1) as bar:
            for done in as_completed(running):
                found[running[done]] = done.result()
                bar.update(sizes[running[done]])
        return [found[i] for i in range(len(items))]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
