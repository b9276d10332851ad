"""Does RL need a component? RL again from IN with it frozen, against the same RL with nothing frozen.

Source: the necessity experiment of 2602.12395 (Table 3), which freezes Early, Mid and Late layers, once each and
without controls. Here, random layers of the same number and nothing frozen with another seed stand beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from experiments.retraining.arms import Arm, plan_arms
from experiments.retraining.own import own_recipe
from experiments.retraining.recipe import Outcome, Recipe, read_trl
from experiments.retraining.triple import TripleRecipe, require_triple
from experiments.settings import DataSettings, PairSettings, checkpoints, load_pair, publish, require_sound
from experiments.triple.evaluate import write_json
from experiments.triple.rl import RL
from hooks import FrankenlensError
from interp.freezing import frozen_rows
from interp.freezing.losses import UNFROZEN, Retrained, losses, plot_losses
from interp.pair.pair import Pair
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.statistics import bootstrap_mean, interval_text

_RL = RL()
OWN_LR = 1e-6


@dataclass(frozen=True)
class FreezeConfig(PairSettings, DataSettings):
    """Settings of the freezing experiment; the defaults repeat the RL that made the embedded RL.

    A killed run goes on where it was when it is started again. `accelerate launch` and DeepSpeed work as they do with
    TRL: launch this command with them, or name their files in --trl.

    Attributes:
        partition: paper, code, or sizes such as "8/12/8" (`interp.regions`).
        regions: which of its regions are frozen, one run each; by default all.
        random: runs with random layers frozen, as many as the regions have, in turn: the control.
        reruns: runs with nothing frozen and another seed: what differs from run to run anyway.
        also: further runs; each value is one run's addresses, separated by commas.
        steps: optimizer steps of RL.
        prompts: prompts a step.
        samples: completions a prompt.
        lr: peak learning rate; 1e-4 for the embedded triple, 1e-6 for other models.
        save_every: steps between checkpoints that a killed run goes on from.
        seeds: RL runs of every arm, with seeds `seed`, `seed` + 1, ...
        n: questions a task that are measured.
        train: JSONL to train on (or a name as for --data), with --data to measure on.
        train_images: folder of its images; by default its own.
        trl: YAML or JSON file of further arguments of TRL's GRPOConfig, e.g. deepspeed, bf16, use_vllm.
        paper: the paper's definition: its partition, 2000 steps of 4 rollouts, n = 100 a task.
        out: folder for the table, the figure, report.html, and every run in `arms`.
    """

    partition: str = "paper"
    regions: tuple[str, ...] = ()
    random: int = 3
    reruns: int = 1
    also: tuple[str, ...] = ()
    steps: int = _RL.steps
    prompts: int = _RL.prompts
    samples: int = _RL.samples
    lr: float | None = None
    save_every: int = _RL.save_every
    seeds: int = 1
    n: int = 500
    train: Path | None = None
    train_images: Path | None = None
    trl: Path | None = None
    paper: bool = False
    out: Path = Path("out/freeze")

    @property
    def settled(self) -> FreezeConfig:
        """With the paper's values, where they are asked for, and the learning rate filled in."""
        lr = self.lr if self.lr is not None else _RL.lr if self.data is None else OWN_LR
        if self.paper:
            return replace(self, partition="paper", steps=2000, samples=4, n=100, lr=lr)
        return replace(self, lr=lr)

    @property
    def training(self) -> RL:
        """The settings of the RL stage."""
        return RL(self.steps, self.prompts, self.samples, self.lr or _RL.lr, save_every=self.save_every)


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is needed to train and measure; nothing has been changed yet."""

    config: FreezeConfig
    partition: Partition
    arms: tuple[Arm, ...]
    recipe: Recipe
    n_frozen: dict[str, int]


def run(config: FreezeConfig) -> Section | None:
    """Train what is not there yet, measure all of it, and write table, figure and page to `out`, all or none.

    Returns:
        The outcome; None in processes other than the first, where there are several.

    Raises:
        FrankenlensError: settings contradict each other, an address names nothing, the models are no pair, the data
            cannot be read, or `out` holds runs with other settings; before anything is trained.
    """
    check(config)
    pair = load_pair(config)
    try:
        plan, models = prepare(pair, config), pair.provenance()
    finally:
        pair.close()
    del pair
    train(plan)
    if not _is_first_process():
        return None
    pair = load_pair(config)
    try:
        section = compare(pair, plan)
    finally:
        pair.close()
    publish([section], plan.config, config.out, models, {"questions": len(plan.recipe.tasks)})
    return section


def check(config: FreezeConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    for name in ("steps", "prompts", "samples", "save_every", "seeds"):
        if getattr(config, name) < 1:
            raise FrankenlensError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give at least 1.")
    if config.samples < 2:
        raise FrankenlensError(
            "--samples is 1; GRPO compares the completions of a prompt, so give at least 2."
        )
    for name in ("random", "reruns"):
        if getattr(config, name) < 0:
            raise FrankenlensError(f"--{name} is {getattr(config, name)}; give 0 or more.")
    if (config.data is None) != (config.train is None):
        raise FrankenlensError(
            "--train (questions to train on) and --data (others, to measure on) go together: give both, or neither for "
            "the recipe of the embedded triple."
        )
    if config.train is not None and config.train == config.data:
        raise FrankenlensError(
            "--train and --data are the same file: measure on questions that were not trained on."
        )
    if config.data is None and config.in_ is not None:
        require_triple(config.in_)
    sharding = [name for name in ("deepspeed", "fsdp") if read_trl(config.trl).get(name)]
    units = [
        text for text in config.also if any(f".{unit}." in text for unit in ("head", "kv_head", "neuron"))
    ]
    if sharding and units:
        raise FrankenlensError(
            f"--trl asks for {sharding[0]}, which may shard parameters, and --also for {units[0]}: single heads and "
            "neurons can be frozen only in whole parameters. Freeze layers, .attn or .mlp, or train data-parallel."
        )


def measure(pair: Pair, config: FreezeConfig) -> Section:
    """Train and compare with a pair that is open already: `prepare`, `train`, `compare`."""
    plan = prepare(pair, config)
    train(plan)
    return compare(pair, plan)


def prepare(pair: Pair, config: FreezeConfig) -> Plan:
    """Which runs there will be; every address is looked up in the model, and the questions are read.

    Raises:
        FrankenlensError: see `run`.
    """
    config = config.settled
    partition = parse_partition(config.partition, pair.in_.n_layers)
    regions = config.regions or tuple(partition.regions)
    arms = plan_arms(partition, regions, config.random, config.reruns, config.also, config.seed, config.seeds)
    n_frozen = {arm.name: _n_frozen(pair, arm) for arm in arms}
    trl, in_path = read_trl(config.trl), checkpoints(config)[0]
    recipe: Recipe
    if config.data is None:
        recipe = TripleRecipe(require_triple(in_path), config.training, config.n, trl)
    else:
        train_on = DataSettings(config.train, config.train_images)
        recipe = own_recipe(pair, in_path, config.training, trl, train_on, config, config)
    _require_same_settings(config, pair, trl)
    return Plan(config, partition, arms, recipe, n_frozen)


def train(plan: Plan) -> None:
    """Train every arm that is not in `out/arms` yet."""
    out = plan.config.out
    (out / "arms").mkdir(parents=True, exist_ok=True)
    for arm in plan.arms:
        (out / "unfinished" / arm.folder).mkdir(parents=True, exist_ok=True)
        frozen = {"addresses": list(arm.addresses), "seed": arm.trained_with}
        _require_begun_alike(out / "unfinished" / arm.folder / "arm.json", frozen)
    waiting = [arm for arm in plan.arms if not (out / "arms" / arm.folder).exists()]
    for arm in tqdm(waiting, desc="arms", unit="arm", delay=1):
        unfinished = out / "unfinished" / arm.folder
        print(f"training {arm.name} (seed {arm.trained_with})", file=sys.stderr)
        plan.recipe.train(arm.addresses, arm.trained_with, unfinished, out / "arms" / arm.folder)
        if _is_first_process():
            for checkpoint in unfinished.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)


def compare(pair: Pair, plan: Plan) -> Section:
    """Measure IN, RL as given and every arm, and put the table, the figure and the finding together."""
    recipe, out = plan.recipe, plan.config.out
    start = recipe.measure(pair.in_, out / "measured" / "in.json")
    given = recipe.measure(pair.rl, out / "measured" / "rl-as-given.json")
    runs, left_out = [], dict(recipe.left_out)
    for arm in plan.arms:
        outcome = recipe.measure(out / "arms" / arm.folder, out / "measured" / f"{arm.folder}.json")
        if outcome.ungraded:
            left_out[f"{arm.folder}: answers that cannot be graded"] = outcome.ungraded
        frozen, size = ", ".join(arm.addresses), plan.n_frozen[arm.name]
        runs.append(Retrained(arm.name, arm.kind, arm.seed, frozen, size, outcome.right, outcome.unreadable))
    tasks = np.array(recipe.tasks)
    groups = {name: np.flatnonzero(np.isin(tasks, some)).tolist() for name, some in recipe.groups.items()}
    table = losses(runs, start.right, groups, plan.config.seed)
    account = Account(
        recipe.definition,
        n=f"{plan.config.n} questions a task, {len(set(tasks))} tasks; {plan.config.seeds} training seed(s)",
        correction="Holm over arms and groups",
        seed=plan.config.seed,
        partition=str(plan.partition),
        left_out=left_out,
    )
    return Section(
        "freeze",
        "What RL loses with a component frozen",
        _finding(table, given, groups, plan.config),
        account,
        tables={"freeze": table, "freeze_tasks": _per_task(runs, start, given, tasks)},
        figures={"freeze": plot_losses(table)},
    )


def _is_first_process() -> bool:
    """Of those that `accelerate launch` or torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _n_frozen(pair: Pair, arm: Arm) -> int:
    if not arm.addresses:
        return 0
    rows = frozen_rows(pair.in_, arm.addresses)
    named = dict(pair.in_.model.named_parameters())
    return sum(named[name].numel() if own is None else own.kept.numel() for name, own in rows.items())


def _require_same_settings(config: FreezeConfig, pair: Pair, trl: dict[str, Any]) -> None:
    """Refuses to mix runs of different settings in one folder."""
    rl = {k: v for k, v in asdict(config.training).items() if k != "save_every"}
    settings = {
        "in": pair.provenance()["in"]["weights_sha256"],
        "rl": rl,
        "trl": trl,
        "train": None if config.train is None else str(config.train),
        "max_new_tokens": config.max_new_tokens if config.train is not None else None,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    _require_begun_alike(config.out / "settings.json", settings)


def _require_begun_alike(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in settings if begun.get(name) != settings[name])
        if other:
            raise FrankenlensError(
                f"{path} holds a run with other settings ({', '.join(other)}); choose another --out, or delete it."
            )
    write_json(settings, path)


def _per_task(runs: Sequence[Retrained], start: Outcome, given: Outcome, tasks: np.ndarray) -> pd.DataFrame:
    """Accuracy of every model on every task; columns model, rl_seed, and one per task."""
    models = [("IN", "", start.right), ("RL as given", "", given.right)]
    models += [(run.arm, str(run.seed), run.right) for run in runs]
    rows = [
        {"model": name, "rl_seed": seed}
        | {
            task or "questions": float(np.nanmean(right[tasks == task]))
            for task in dict.fromkeys(tasks.tolist())
        }
        for name, seed, right in models
    ]
    return pd.DataFrame(rows)


def _finding(table: pd.DataFrame, given: Outcome, groups: dict[str, Any], config: FreezeConfig) -> str:
    """The first group in words: what RL gains, and the share of it that is lost with each component frozen."""
    group, places = next(iter(groups.items()))
    seed = "mean" if config.seeds > 1 else config.seed
    here = table[(table["group"] == group) & (table["rl_seed"] == seed)].set_index("arm")
    gain = -here.loc["IN", ["change", "change_high", "change_low"]].to_numpy(float)
    text = f"On {group} questions, RL with nothing frozen gains {interval_text(*(100 * gain))} points over IN"
    as_given = bootstrap_mean(given.right[places], seed=config.seed)
    accuracy = 100 * float(here.loc[UNFROZEN, "accuracy"])
    text += f" (accuracy {accuracy:.1f} %; RL as given {100 * float(as_given.value):.1f} %). "
    arms = here[~here["kind"].isin(["in", "unfrozen"])]
    if arms["share"].isna().all():
        text += "That cannot be told from 0, so no share of it is given. Changes in points: "
        values = [(name, row, ("change", "change_low", "change_high"), 100) for name, row in arms.iterrows()]
    else:
        text += "Share of it that is lost: "
        values = [(name, row, ("share", "share_low", "share_high"), 1) for name, row in arms.iterrows()]
    said = (f"{name} {interval_text(*(k * row[c] for c in columns))}" for name, row, columns, k in values)
    text += "; ".join(said) + ". "
    told = [f"{name} (p = {row['p_holm']:.2g})" for name, row in arms.iterrows() if row["p_holm"] < 0.05]
    text += f"Told apart from nothing frozen, after Holm's correction: {', '.join(told) or 'none'}."
    if config.seeds == 1:
        text += " One training seed: the intervals are over questions and hold no difference from run to run"
        text += ", which the runs with another seed show." if config.reruns else "."
    return text
