"""A trajectory: IN and the checkpoints of one RL run, of which one is in memory at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from hooks import HookedVLM
from hooks.errors import FrankenlensError, shown
from hooks.stored.layouts import trainers
from hooks.whereabouts import require_checkpoint
from interp.pair.pair import Pair

_STEP = re.compile(r"(?:global_?step|checkpoint|step|iter(?:ation)?|epoch)?[-_]?0*(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Step:
    """One checkpoint of a run.

    Attributes:
        number: of optimiser steps, as its folder says it; its place in the order given, where the folders say none.
        path: a folder, or a repository id.
    """

    number: int
    path: str


class Trajectory:
    """IN and the checkpoints of one RL run, in the order of their steps.

    Arguments:
        in_: IN, opened; it stays open through all steps.
        in_path: where it was loaded from.
        steps: the checkpoints (`steps_of`).
        loading: further arguments of `Pair.beside`: how IN was loaded, and what stands around every question.

    Example:
        >>> from interp.pair.trajectory import steps_of
        >>> [step.number for step in steps_of(["run/global_step_100/actor", "run/global_step_20/actor"])]
        [20, 100]
    """

    def __init__(self, in_: HookedVLM, in_path: str | Path, steps: Sequence[Step], **loading: Any) -> None:
        if not steps:
            raise FrankenlensError("a trajectory has at least one checkpoint of RL; there is none.")
        self.in_, self.in_path, self.steps = in_, in_path, tuple(steps)
        self._loading, self._models = loading, dict[str, Any]()

    @classmethod
    def from_pretrained(
        cls, in_path: str | Path, rl_paths: Sequence[str | Path] | str | Path, **loading: Any
    ) -> Trajectory:
        """Load IN, and find the checkpoints of a run.

        Arguments:
            in_path: IN, a folder or a repository id.
            rl_paths: the checkpoints, a pattern such as `run/global_step_*`, or the folder of the run; each of them in
                whatever layout `Pair.from_pretrained` reads, adapters too.
            loading: as in `Pair.from_pretrained`.

        Raises:
            FrankenlensError: no such checkpoints, two of one step, or IN cannot be loaded.
        """
        steps = steps_of([rl_paths] if isinstance(rl_paths, str | Path) else rl_paths)
        for path in (in_path, *(step.path for step in steps)):
            require_checkpoint(path)
        of_prompts = ("trace_format", "template", "system", "accept", "instruction")
        own = {name: value for name, value in loading.items() if name not in of_prompts}
        return cls(HookedVLM.from_pretrained(in_path, **own), in_path, steps, **loading)

    @property
    def last(self) -> Step:
        """The last of the run."""
        return self.steps[-1]

    @contextmanager
    def at(self, step: Step) -> Iterator[Pair]:
        """IN and one checkpoint, which is loaded now; at the end its weights are let go, whoever still holds the pair.

        Raises:
            FrankenlensError: the checkpoint cannot be loaded, or is no pair with IN.
        """
        pair = Pair.beside(self.in_, self.in_path, step.path, **self._loading)
        try:
            yield pair
            if "in" not in self._models or f"step {step.number}" not in self._models:
                about = pair.provenance()
                self._models |= {"in": about["in"], f"step {step.number}": about["rl"]}
        finally:
            pair.rl.close()
            _emptied(pair.rl.model)

    def provenance(self) -> dict[str, Any]:
        """Where IN and the checkpoints that were opened come from, with a hash of all weights of each."""
        return dict(self._models)

    def close(self) -> None:
        """Close IN; the checkpoints are closed already."""
        self.in_.close()


def steps_of(paths: Sequence[str | Path]) -> tuple[Step, ...]:
    """Checkpoints in the order of the numbers in their names, whatever order they are given in.

    Args:
        paths: folders, repository ids, patterns (`run/global_step_*`), or folders that hold a folder for each step.

    Raises:
        FrankenlensError: a pattern or folder has none, or two are of one step.
    """
    every = list(dict.fromkeys(one for path in paths for one in _each(str(path))))
    numbers = _numbers(every)
    if numbers is None:
        return tuple(Step(place, path) for place, path in enumerate(every, start=1))
    found = sorted(zip(numbers, every, strict=True))
    for (one, first), (other, second) in pairwise(found):
        if one == other:
            raise FrankenlensError(
                f"two checkpoints are of step {one}: {first} and {second}; leave one of them out."
            )
    return tuple(Step(number, path) for number, path in found)


def _each(path: str) -> list[str]:
    """The checkpoints that a path stands for."""
    if has_magic(path):
        found = sorted(one for one in glob(path) if os.path.isdir(one))
        if not found:
            raise FrankenlensError(f"no folder is called {shown(path)}; give the checkpoints of a run.")
        return found
    if not os.path.isdir(path) or _is_checkpoint(Path(path)):
        return [path]
    inside = sorted(os.path.join(path, one) for one in os.listdir(path) if _STEP.fullmatch(one))
    found = [one for one in inside if os.path.isdir(one)]
    return found or [path]


def _is_checkpoint(folder: Path) -> bool:
    files = ("config.json", "adapter_config.json")
    return any(os.path.isfile(folder / name) for name in files) or trainers(folder) is not None


def _numbers(every: Sequence[str]) -> list[int] | None:
    """The numbers by which paths differ: those of the last part of them that has one in each, and not the same."""
    parts = [Path(one).parts[::-1] for one in every]
    for names in zip(*parts, strict=False):
        found = [_NUMBER.findall(name) for name in names]
        if all(found) and (len(set(names)) > 1 or len(every) == 1):
            return [int(numbers[-1]) for numbers in found]
    return None


def _emptied(model: torch.nn.Module) -> None:
    """Let go of a closed model's weights, though somebody may still hold it."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(weight, device="meta"), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
