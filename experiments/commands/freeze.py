"""Does RL need a component? RL again from IN with it frozen, against the same RL with nothing frozen.

Source: the necessity experiment of 2602.12395 (Table 3), which freezes Early, Mid and Late layers, once each and
without controls. Here, random layers of the same number and nothing frozen with another seed stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.bench import Planned
from experiments.commands import freeze_plan as plans
from experiments.contract import require_readable
from experiments.frame import Command, require_begun_alike
from experiments.options import Only, as_option, default
from experiments.papers import PaperSettings, described, paper_questions, refuse_own_data
from experiments.retraining.arms import plan_arms
from experiments.retraining.own import own_recipe, usable
from experiments.retraining.plan import Plan
from experiments.retraining.recipe import Outcome, Recipe, read_trl
from experiments.retraining.table_3 import PaperRecipe
from experiments.retraining.triple import TripleRecipe, require_triple
from experiments.settings import DataSettings, checkpoints, load_pair
from experiments.triple.grpo_settings import require_followed
from experiments.triple.rl import RL
from hooks import FrankenlensError
from interp.fine_grained import METRICS, PAPER_N
from interp.fine_grained.paper import TOKENS
from interp.freezing import n_frozen
from interp.freezing.losses import UNFROZEN, losses, plot_losses, task_table
from interp.pair.pair import Pair
from interp.regions import parse_partition
from interp.results.page import Account, Section
from interp.statistics import interval_text, mean_interval

_RL = RL()
OWN_LR = 1e-6
_OF_OWN = Only("--train; the scenes of the embedded triple have a length of their own", lambda c: c.train)


@dataclass(frozen=True)
class FreezeConfig(PaperSettings):
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
        max_new_tokens: longest generated text, of one's own questions.
        train: JSONL to train on (or a name as for --data), with --data to measure on.
        train_images: folder of its images; by default its own.
        trl: YAML or JSON file of further arguments of TRL's GRPOConfig, e.g. bf16, temperature; with --train also
            deepspeed, use_vllm and others that the loss of the embedded triple does not follow, which it refuses.
        paper: Table 3 of the paper: its partition, 2000 steps of 4 rollouts; M_vis, M_v2r and M_rea on its data
            (MathVista, MATH-500; downloaded, or of --copies), its sample of 100 each and its prompts, with accuracy
            beside them. What it trained on is not published with it: give --train.
        out: folder for the table, the figure, report.html, and every run in `arms`.
    """

    partition: str = default("paper", paper="paper")
    regions: tuple[str, ...] = ()
    random: int = 3
    reruns: int = 1
    also: tuple[str, ...] = ()
    steps: int = default(_RL.steps, paper=2000)
    prompts: int = _RL.prompts
    samples: int = default(_RL.samples, paper=4)
    lr: float | None = None
    save_every: int = _RL.save_every
    seeds: int = 1
    n: int = default(500, paper=PAPER_N)
    max_new_tokens: int = default(128, paper=TOKENS, only=_OF_OWN)
    train: Path | None = None
    train_images: Path | None = default(None, only=Only("--train", lambda config: config.train))  # noqa: RUF009
    trl: Path | None = None
    out: Path = Path("out/freeze")

    @property
    def training(self) -> RL:
        """The settings of the RL stage."""
        lr = self.lr if self.lr is not None else _RL.lr if self.train is None else OWN_LR
        return RL(self.steps, self.prompts, self.samples, lr, save_every=self.save_every)


def check(config: FreezeConfig) -> None:
    """Refuse numbers, data and arguments of TRL that there are not, or that do not go together."""
    for name in ("steps", "prompts", "samples", "save_every", "seeds"):
        if getattr(config, name) < 1:
            raise FrankenlensError(f"{as_option(name)} is {getattr(config, name)}; give at least 1.")
    if config.samples < 2:
        raise FrankenlensError(
            "--samples is 1; GRPO compares the completions of a prompt, so give at least 2."
        )
    for name in ("random", "reruns"):
        if getattr(config, name) < 0:
            raise FrankenlensError(f"--{name} is {getattr(config, name)}; give 0 or more.")
    refuse_own_data(config)
    if config.paper and config.train is None:
        raise FrankenlensError(
            "--paper trains on the paper's RL data, which is not published with it, and nothing stands in for it: give "
            "--train, questions to train on."
        )
    if not config.paper and (config.data is None) != (config.train is None):
        raise FrankenlensError(
            "--train (questions to train on) and --data (others, to measure on) go together: give both, or neither for "
            "the recipe of the embedded triple."
        )
    if config.train is not None and config.train == config.data:
        raise FrankenlensError(
            "--train and --data are the same file: measure on questions that were not trained on."
        )
    if config.data is None and config.train is None and config.in_ is not None:
        require_triple(config.in_)
    given = read_trl(config.trl)
    sharding = [name for name in ("deepspeed", "fsdp") if given.get(name)]
    units = [
        text for text in config.also if any(f".{unit}." in text for unit in ("head", "kv_head", "neuron"))
    ]
    if sharding and units:
        raise FrankenlensError(
            f"--trl asks for {sharding[0]}, which may shard parameters, and --also for {units[0]}: single heads and "
            "neurons can be frozen only in whole parameters. Freeze layers, .attn or .mlp, or train data-parallel."
        )
    if config.data is None:
        require_followed(given)


def load(config: FreezeConfig) -> Plan:
    """Plan every run, and train those that are not there yet; the pair is open only for the former.

    Raises:
        FrankenlensError: an address names nothing, the models are no pair, the data cannot be read, or `out` holds runs
            with other settings; before anything is trained.
    """
    pair = load_pair(config)
    try:
        plan = planned(pair, config)
    finally:
        pair.close()
    del pair  # its memory is needed for training
    plan.train()
    return plan


def planned(pair: Pair, config: FreezeConfig) -> Plan:
    """Which runs there will be; every address is looked up in the model, and the questions are read.

    Raises:
        FrankenlensError: see `load`.
    """
    partition = parse_partition(config.partition, pair.in_.n_layers)
    regions = config.regions or tuple(partition.regions)
    arms = plan_arms(partition, regions, config.random, config.reruns, config.also, config.seed, config.seeds)
    sizes = {arm.name: n_frozen(pair.in_, arm.addresses) for arm in arms}
    trl, in_path = read_trl(config.trl), checkpoints(config)[0]
    recipe: Recipe
    if config.paper:
        recipe = _papers(pair, in_path, config, trl)
    elif config.data is None:
        recipe = TripleRecipe(require_triple(in_path), config.training, config.n, trl)
    else:
        train_on = DataSettings(
            config.train,
            config.train_images,
            fields=config.fields,
            encoding=config.encoding,
            **config.access,
        )
        recipe = own_recipe(pair, in_path, config.training, trl, train_on, config, config)
        require_readable(pair, pair.builder, [prompt.example for prompt in recipe.prompts], config)
    _require_same_settings(config, pair, trl)
    return Plan(partition, arms, recipe, sizes, config.out)


def _papers(pair: Pair, in_path: str, config: FreezeConfig, trl: dict[str, Any]) -> PaperRecipe:
    """Trained on the user's questions, measured on the paper's, of which IN describes what has to be described."""
    train_on, left_out = usable(
        pair, DataSettings(config.train, config.train_images, **config.access), "training"
    )
    questions = paper_questions(config, config.seed, METRICS)
    running: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    examples = described(pair, questions.examples, **running)
    require_readable(pair, pair.builder, examples, config)
    every = [prompt.example for prompt in train_on]
    with_image = [example for example in every if example.images] or every
    left_out = {**left_out, **questions.left_out}
    if len(with_image) < len(every):
        left_out["training questions without an image"] = len(every) - len(with_image)
    if not with_image:
        raise FrankenlensError(f"no question is left to train on: {left_out}")
    asked = {name: [one for one in examples if one.task == name] for name in METRICS}
    measured = {name: some for name, some in asked.items() if some}
    own = (config.max_new_tokens, config.batch_size, config.dtype, config.device_map, left_out)
    return PaperRecipe(in_path, config.training, trl, pair.builder, with_image, (), *own, measured)


def measure(pair: Pair, plan: Plan, config: FreezeConfig) -> Iterator[Section]:
    """IN, RL as given and every arm, on the same questions."""
    start, given = plan.given(pair.in_, "in"), plan.given(pair.rl, "rl-as-given")
    runs, left_out = plan.measured()
    groups, tasks = plan.groups(), list(plan.recipe.tasks)
    table = losses(runs, start.right, groups, plan.recipe.clusters)
    yield Section(
        "freeze",
        "What RL loses with a component frozen",
        _finding(table, given, groups, config),
        Account(
            plan.recipe.definition,
            n=f"{config.n} questions a task, {len(set(tasks))} tasks; {config.seeds} training seed(s)",
            correction="Holm over arms and groups",
            seed=config.seed,
            partition=str(plan.partition),
            left_out=left_out,
            counts={"questions": len(tasks)},
        ),
        {
            "freeze": table,
            "freeze_tasks": task_table(runs, {"IN": start.right, "RL as given": given.right}, tasks),
        },
        {"freeze": plot_losses(table)},
    )


def _require_same_settings(config: FreezeConfig, pair: Pair, trl: dict[str, Any]) -> None:
    """Refuses to mix runs of different settings in one folder."""
    settings = {
        "in": pair.provenance()["in"]["weights_sha256"],
        "rl": {name: value for name, value in asdict(config.training).items() if name != "save_every"},
        "trl": trl,
        "train": None if config.train is None else str(config.train),
        "max_new_tokens": config.max_new_tokens if config.train is not None else None,
    }
    require_begun_alike(config.out / "settings.json", settings)


def _finding(table: pd.DataFrame, given: Outcome, groups: dict[str, Any], config: FreezeConfig) -> str:
    """The first group in words: what RL gains, and the share of it that is lost with each component frozen."""
    group, places = next(iter(groups.items()))
    seed = "mean" if config.seeds > 1 else config.seed
    here = table[(table["group"] == group) & (table["rl_seed"] == seed)].set_index("arm")
    gain = -here.loc["IN", ["change", "change_high", "change_low"]].to_numpy(float)
    text = f"On {group} questions, RL with nothing frozen gains {interval_text(*(100 * gain))} points over IN"
    as_given = mean_interval(given.right[places])
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


PLAN = Planned(
    plans.work,
    assumed=plans.assumed,
    asks=False,
    weights=lambda bench, config: {},
    structure=plans.structure,
    load=plans.load,
)
COMMAND = Command(FreezeConfig, check, load, load_pair, measure, plan=PLAN)
