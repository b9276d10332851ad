"""How well each stage of the triple answers, and what RL added: greedy, on scenes no stage has trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from experiments.triple.checkpoints import load
from experiments.triple.model import THINK
from experiments.triple.replies import Reply, greedy_replies
from interp.questions.examples import Example
from interp.questions.tasks import PERCEPTION, REASONING, Split, grade, sample
from interp.results.lock import making
from interp.results.whole import read_record, write_record, write_whole

TASK_NAMES = (*PERCEPTION, *REASONING)
GROUPS: Mapping[str, tuple[str, ...]] = {"perception": PERCEPTION, "reasoning": REASONING}
TEST_SEED = 2024
MADE_TO_THINK = "in, made to think"
Hits = Bool[np.ndarray, "task example"]
MeanHits = Shaped[np.ndarray, "task example"]  # Hits, or their mean over seeds


@dataclass(frozen=True)
class Score:
    """Greedy accuracy of one model, as fractions.

    Attributes:
        accuracy: per task.
        perception, reasoning: means over the tasks of that kind.
        chain_rate: share of replies that hold a chain of thought.
        unreadable: share of replies that do not have the declared form; they count as wrong.
    """

    accuracy: dict[str, float]
    perception: float
    reasoning: float
    chain_rate: float
    unreadable: float


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies on the same questions, in points, with a 95 % interval."""

    points: float
    low: float
    high: float


def test_examples(n: int, split: Split = "test", seed: int = TEST_SEED) -> list[Example]:
    """n examples of every task, task by task."""
    return [example for task in TASK_NAMES for example in sample(task, n, seed, split)]


def measure(folder: Path, n: int, *, start: str = "", kept: Path | None = None) -> tuple[Score, Hits]:
    """Runs a checkpoint on n test questions per task, optionally with the reply's first words given.

    Args:
        folder: the checkpoint.
        n: questions per task.
        start: what every reply is made to begin with.
        kept: JSON file that keeps the outcome; read instead of measuring where it is of these very weights.

    Returns:
        The score, and which question was answered right [task example].
    """
    about = {
        "weights": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "n": n,
        "start": start,
    }
    if kept is not None:
        record = read_record(kept)
        if record is not None and record["about"] == about:
            return Score(**record["score"]), np.array([[c == "1" for c in row] for row in record["hits"]])
    model, processor = load(folder)
    examples = test_examples(n)
    replies = greedy_replies(model, processor, examples, start=start, label=folder.name + " " + start)
    result, hits = score(replies, examples)
    if kept is not None:
        rows = ["".join("01"[hit] for hit in row) for row in hits.astype(int).tolist()]
        write_record(kept, {"about": about, "score": asdict(result), "hits": rows})
    return result, hits


def score(replies: Sequence[Reply], examples: Sequence[Example]) -> tuple[Score, Hits]:
    """Grades replies to the examples of `test_examples`."""
    hits = np.array([grade(r.answer, e) for r, e in zip(replies, examples, strict=True)])
    hits = hits.reshape(len(TASK_NAMES), -1)
    accuracy = dict(zip(TASK_NAMES, hits.mean(1).tolist(), strict=True))
    groups = {name: float(np.mean([accuracy[task] for task in tasks])) for name, tasks in GROUPS.items()}
    chains = float(np.mean([reply.chain is not None for reply in replies]))
    unreadable = float(np.mean([reply.answer is None for reply in replies]))
    return Score(accuracy, groups["perception"], groups["reasoning"], chains, unreadable), hits


def difference(
    after: MeanHits,
    before: MeanHits,
    draws: int = 4000,
    seed: int = 0,
) -> Difference:
    """Mean accuracy after - before, paired by question; percentile bootstrap over the questions of each task."""
    paired = after.astype(float) - before.astype(float)
    rng = np.random.default_rng(seed)
    n = paired.shape[1]
    means = np.mean([row[rng.integers(n, size=(draws, n))].mean(1) for row in paired], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(*(round(100 * float(value), 2) for value in (paired.mean(), low, high)))


def differences(after: MeanHits, before: MeanHits) -> dict[str, Any]:
    """`difference` for perception, reasoning and each task."""
    rows = {name: [TASK_NAMES.index(task) for task in tasks] for name, tasks in GROUPS.items()}
    rows |= {task: [index] for index, task in enumerate(TASK_NAMES)}
    return {name: asdict(difference(after[index], before[index])) for name, index in rows.items()}


def evaluate(folders: Mapping[str, Path], n: int, kept: Path | None = None) -> dict[str, Any]:
    """Scores every checkpoint, and compares those that came out of IN with it.

    Args:
        folders: names to checkpoints: `base`, `in`, `rl-0`, `rl-1`, ..., `control` where there is one.
        n: test questions per task.
        kept: folder for what was measured, so that an interrupted evaluation goes on.

    Returns:
        What `results.json` holds: `models`, `differences`, `n_per_task`, `split`, `seed`.
    """
    models: dict[str, Any] = {}
    hits: dict[str, Hits] = {}
    for name, folder, start in runs(folders):
        file = None if kept is None else kept / f"{name}.json"
        result, hits[name] = measure(folder, n, start=start, kept=file)
        models[name] = {**asdict(result), "weights": weights_hash(folder)}
    seeds = [name for name in folders if name.startswith("rl-")]
    pooled = np.mean([hits[name] for name in seeds], axis=0)
    compared = {f"{name} - in": (hits[name], hits["in"]) for name in seeds}
    compared["rl (mean of seeds) - in"] = (pooled, hits["in"])
    compared[f"rl (mean of seeds) - {MADE_TO_THINK}"] = (pooled, hits[MADE_TO_THINK])
    if "control" in folders:
        compared["control - in"] = (hits["control"], hits["in"])
        compared["rl (mean of seeds) - control"] = (pooled, hits["control"])
    return {
        "models": models,
        "differences": {name: differences(*pair) for name, pair in compared.items()},
        "n_per_task": n,
        "split": "test",
        "seed": TEST_SEED,
    }


def weights_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights file."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def runs(folders: Mapping[str, Path]) -> list[tuple[str, Path, str]]:
    """What is measured: every checkpoint as it is, and IN with `<think>` given: (name, folder, start)."""
    return [*((name, folder, "") for name, folder in folders.items()), (MADE_TO_THINK, folders["in"], THINK)]


def write_json(value: Any, path: Path) -> None:
    """Writes JSON atomically."""
    with making(path.parent):
        write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def table(results: Mapping[str, Any]) -> str:
    """The results as two Markdown tables: accuracies in percent, differences in points."""
    models = results["models"]
    lines = [
        f"Greedy accuracy in %, n = {results['n_per_task']} test questions per task.",
        "",
        "| | " + " | ".join(models) + " |",
        "|---|" + "---:|" * len(models),
    ]
    for task in TASK_NAMES:
        lines.append(_row(task, [model["accuracy"][task] for model in models.values()]))
    for key, title in (
        ("perception", "**perception, mean**"),
        ("reasoning", "**reasoning, mean**"),
        ("chain_rate", "replies with a chain"),
    ):
        lines.append(_row(title, [model[key] for model in models.values()]))
    lines += ["", "Differences in points with 95 % bootstrap intervals over the questions, paired.", ""]
    lines += ["| | reasoning | perception |", "|---|---:|---:|"]
    for name, groups in results["differences"].items():
        cells = [
            f"{groups[g]['points']:+.1f} [{groups[g]['low']:+.1f}, {groups[g]['high']:+.1f}]"
            for g in ("reasoning", "perception")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(title: str, fractions: Sequence[float]) -> str:
    return f"| {title} | " + " | ".join(f"{100 * fraction:.1f}" for fraction in fractions) + " |"
