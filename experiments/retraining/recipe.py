"""What every recipe of retraining shares: its face, the freezing around it, and TRL's further arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import yaml
from jaxtyping import Float
from transformers import PreTrainedModel

from experiments.triple.rl import require_grpo
from hooks import FrankenlensError, HookedVLM
from hooks.errors import nearest, one_line
from hooks.whereabouts import require_file
from interp.freezing import Frozen, freeze
from interp.results.csv import write_csv

MANAGED = {
    "output_dir": "--out",
    "seed": "--seed",
    "max_steps": "--steps",
    "num_generations": "--samples",
    "learning_rate": "--lr",
    "save_steps": "--save-every",
    "max_completion_length": "--max-new-tokens",
}
"""Arguments of `GRPOConfig` that have an option of their own."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a model answers.

    Attributes:
        right: 1 or 0 per question; NaN where the answer is neither right nor wrong (`interp.questions.grading`).
        unreadable: share of replies without an answer that can be read; they count as wrong.
    """

    right: Float[np.ndarray, " question"]
    unreadable: float

    @property
    def ungraded(self) -> int:
        """Answers that are neither right nor wrong."""
        return int(np.isnan(self.right).sum())


@runtime_checkable
class Recipe(Protocol):
    """A way to train IN by RL, and the questions that the result is measured on."""

    @property
    def definition(self) -> str:
        """The training and the measure in words."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """The task of every question."""
        ...

    @property
    def clusters(self) -> Sequence[str] | None:
        """Which questions hang together (`interp.questions.examples.cluster_of`); None: each stands alone."""
        ...

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Name of a group of questions to its tasks; the one that the finding is about comes first."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """Reason to number of questions left out."""
        ...

    def train(self, addresses: Sequence[str], seed: int, unfinished: Path, folder: Path) -> None:
        """Train into `folder`, which appears complete or not at all; go on from what `unfinished` holds.

        `unfinished/freezing.csv` is what `Frozen.report` says at the end.
        """
        ...

    def measure(self, checkpoint: Path | HookedVLM, kept: Path) -> Outcome:
        """Answer the questions greedily; `kept` keeps the outcome."""
        ...


def frozen_or_not(model: PreTrainedModel, addresses: Sequence[str]) -> AbstractContextManager[Frozen | None]:
    """`freeze`, or nothing where there are no addresses."""
    return freeze(model, list(addresses)) if addresses else nullcontext()


def require_kept(frozen: Frozen | None, folder: Path, saved: Any = None) -> None:
    """Writes freezing.csv.

    Raises:
        FrankenlensError: a frozen part moved, or nothing else did.
    """
    if frozen is None:
        return
    report = frozen.report(saved)
    write_csv(report, folder / "freezing.csv")
    moved = report.loc[report["frozen"] & ~report["identical"], "tensor"].tolist()
    if moved:
        raise FrankenlensError(
            f"{len(moved)} frozen parts changed in training, the first of {moved[0]}; see "
            f"{folder / 'freezing.csv'}. Does the trainer step with something that is no torch.optim.Optimizer?"
        )
    if report.loc[~report["frozen"], "identical"].all():
        raise FrankenlensError(
            f"training changed nothing at all (so few --steps that all is warm-up? no reward ever?); see {folder}"
        )


def read_trl(path: Path | None) -> dict[str, Any]:
    """Arguments of `GRPOConfig` from a YAML or JSON file; {} without a file.

    Raises:
        MissingPackage: there is no TRL to take them.
        FrankenlensError: no such file, no mapping, an argument that GRPOConfig lacks or that has an option of its own.
    """
    require_grpo()
    if path is None:
        return {}
    require_file(path, "a YAML or JSON file of GRPOConfig's arguments", "--trl")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FrankenlensError(f"--trl {path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise FrankenlensError(
            f"--trl {path} must hold a mapping of GRPOConfig's arguments, such as bf16: true"
        )
    from trl import GRPOConfig

    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    for name in found:
        if name in MANAGED:
            raise FrankenlensError(f"--trl {path} sets {name}; use {MANAGED[name]}")
        if name not in known:
            hint = nearest(str(name), known)
            raise FrankenlensError(f"--trl {path}: GRPOConfig has no argument {name!r}. {hint}".strip())
    return found
