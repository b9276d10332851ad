"""Which localizing method finds what was hidden, and claims nothing where nothing is? Pairs with a known change.

`frankenlens planted` is the command; the pieces are in `interp.planting`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.bench import Planned
from experiments.commands.planted_pairs import PlantedPairs
from experiments.commands.planted_plan import assumed, work
from experiments.contract import admitted, require_readable
from experiments.frame import Command, finished, steps
from experiments.options import Only, as_option, default, require_known
from experiments.retraining import plants
from experiments.retraining.triple import require_triple
from experiments.settings import Questions, QuestionSettings, checkpoints, load_examples, load_pair
from experiments.triple.rl import require_grpo
from hooks.errors import FrankenlensError
from hooks.shared import shared
from interp.pair.pair import Pair
from interp.planting import DRAWN, KINDS, METHODS, MOST, NULLS, TRAINED, Draws, chosen, mark_table, on_grid
from interp.planting.plots import plot_found
from interp.planting.table import HELD, by_effect, by_pair, found_table, null_table
from interp.planting.trial import TEST
from interp.questions.examples import Example, fingerprint
from interp.results.page import Account, Section, told
from interp.results.store import opened
from interp.statistics import interval_text

FIRST = "rl"
"""The kind of which there are --pairs."""


def _of_kinds(kinds: tuple[str, ...], needs: str) -> Only:
    return Only(needs, lambda config: any(kind in kinds for kind in config.planted))


@dataclass(frozen=True)
class PlantedConfig(QuestionSettings):
    """Settings of the planted pairs; the defaults plant into the IN that ships with the package.

    Attributes:
        n: prompts of every pair, drawn anew for each.
        kinds: of rl, random, rotated, decoys, supervised, reinforced, layer, region, vision, projector, experts, tower,
            query-key, joint, cancelling, backup; null pairs: identical, bf16, noise. supervised and reinforced train
            the embedded IN.
        components: addresses that change together, e.g. blocks.3.mlp blocks.5.attn.head.1; a kind of its own, named.
        change: of these: donor (RL's weights), random (an update of RL's norm) or rotated (at their own norm).
        pairs: pairs of kind rl.
        others: pairs of every other kind.
        nulls: pairs of each kind in which nothing was changed.
        changed: components that change, where they are drawn one by one; every other weight gets noise of the size
            of rounding.
        methods: which are tried; also "integrated gradients RL → IN" and "integrated gradients IN → RL".
        marks: also which components a component map marks as beyond control, in both directions, and how often it does
            where nothing was changed; planted_marks.csv.
        noise_pairs: noise pairs whose 95th percentile says from where on a plant is visible.
        max_new_tokens: longest generated text; the soft metric reads all of it.
        out: folder for scores.csv, plants.csv, the tables, the figure, report.html, and finished pairs.
    """

    n: int = 12
    kinds: tuple[str, ...] = (
        *("rl", "random", "rotated", "decoys", "layer", "region", "vision", "projector"),
        *NULLS,
    )
    components: tuple[str, ...] = ()
    change: Literal["donor", "random", "rotated"] = default(
        "donor", only=Only("--components that change so", lambda config: config.components)
    )
    pairs: int = default(10, only=_of_kinds((FIRST,), "rl among --kinds"))
    others: int = default(
        8,
        only=_of_kinds(
            tuple(kind for kind in KINDS if kind not in (FIRST, *NULLS)),
            "a kind other than rl and the null ones among --kinds",
        ),
    )
    nulls: int = default(8, only=_of_kinds(tuple(NULLS), "a null kind among --kinds"))
    changed: int = default(3, only=_of_kinds(DRAWN, f"one of {', '.join(DRAWN)} among --kinds"))
    methods: tuple[str, ...] = tuple(METHODS)
    marks: bool = False
    noise_pairs: int = 40
    max_new_tokens: int = 24
    out: Path = Path("out/planted")

    @property
    def planted(self) -> tuple[str, ...]:
        """All kinds, that of the components which are named among them."""
        return tuple(dict.fromkeys([*self.kinds, *(["named"] if self.components else [])]))

    def pairs_of(self, kind: str) -> int:
        """How many pairs of a kind are made."""
        return self.pairs if kind == FIRST else self.nulls if kind in NULLS else self.others


def check(config: PlantedConfig) -> None:
    """Refuse methods and kinds that there are not, numbers without seeds, and training of what cannot be trained."""
    chosen(config.methods)
    require_known("kinds", config.kinds, KINDS)
    if "named" in config.kinds and not config.components:
        raise FrankenlensError(
            "the kind named needs --components, such as blocks.3.mlp blocks.5.attn.head.1."
        )
    for name in ("pairs", "others", "nulls", "changed", "noise_pairs"):
        if not 1 <= getattr(config, name) < MOST:
            raise FrankenlensError(f"{as_option(name)} is {getattr(config, name)}; give 1 to {MOST - 1}.")
    if config.ray is not None and (trained := sorted(set(config.kinds) & set(TRAINED))):
        raise FrankenlensError(
            f"--kinds {', '.join(trained)} are trained in a folder of one machine; leave them, or --ray, out."
        )
    if set(config.kinds) & set(TRAINED):
        require_triple(checkpoints(config)[0])
    if "reinforced" in config.kinds:
        require_grpo()


def load(config: PlantedConfig) -> Questions:
    """All rows of the user's data, of which every pair draws its own; none where the synthetic tasks are asked.

    Raises:
        FrankenlensError: no row can be read.
    """
    if config.data is None:
        return Questions([])
    return Questions(*load_examples(replace(config, n=1_000_000), 0))


def admit(pair: Pair, asked: Questions, config: PlantedConfig) -> Questions:
    """See `experiments.contract.admitted`; of the synthetic tasks, those of the first pair are tried."""
    if config.data is None:
        require_readable(pair, pair.builder, load_examples(config, config.seed)[0], config)
    return admitted(pair, asked, config)


def measure(pair: Pair, asked: Questions, config: PlantedConfig) -> Iterator[Section]:
    """All planted pairs; those that are finished are not made again.

    Raises:
        FrankenlensError: fewer components than `changed`, or none that RL changed where it should have.
    """
    made, kinds, left_out = _made(pair, asked, config), list(config.planted), {}
    if "bf16" in kinds and all(on_grid(p) for p in pair.in_.model.parameters()):
        kinds.remove("bf16")
        left_out["pairs of kind bf16, as every weight of IN is a bfloat16 number already"] = config.nulls
    work = [(kind, i) for kind in kinds for i in range(config.pairs_of(kind))]
    shares = shared("noise pairs", range(config.noise_pairs), made.noise)
    noise = [one for _, one in steps(shares, "noise pairs", "pair", config.noise_pairs)]
    scores, effects, marked = [], [pd.concat(noise)], []

    def tried(one: tuple[str, int]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
        return *made.tried(*one), made.marked(*one) if config.marks else None

    for _, (found, own, marks) in steps(
        shared("planted pairs", work, tried), "planted pairs", "pair", len(work)
    ):
        scores.append(found)
        effects.append(own)
        marked += [] if marks is None else [marks]
    both = [pd.concat(some, ignore_index=True) for some in (scores, effects)]
    yield section(
        both[0], both[1], config, left_out, pd.concat(marked, ignore_index=True) if marked else None
    )


def _made(pair: Pair, asked: Questions, config: PlantedConfig) -> PlantedPairs:
    methods = chosen(config.methods)
    draws = Draws(pair.in_, pair.rl, config.changed, config.components, config.change, config.seed)
    own = pair.builder
    wording = {"template": own.template, "system": own.system, "instruction": own.instruction}
    running: dict[str, Any] = {**config.running, "trace_format": pair.trace_format, **wording}
    about: dict[str, Any] = dict(
        models={name: one["weights_sha256"] for name, one in pair.provenance().items()},
        methods=config.methods,
        settings=[str(getattr(config, name)) for name in ("n", "changed", "seed", "dtype")],
        named=[config.components, config.change],
        measured=HELD,
        text=[config.max_new_tokens, repr(pair.trace_format), *map(str, wording.values())],
        training=repr((plants.SUPERVISED, plants.REINFORCED)),
        questions=None if config.data is None else sorted(map(fingerprint, asked.examples)),
    )
    keep = opened(finished(config.out, **about), about)

    def prompts(seed: int) -> list[Example]:
        if config.data is None:
            return load_examples(config, seed)[0]
        return random.Random(seed).sample(list(asked.examples), min(config.n, len(asked.examples)))

    return PlantedPairs(pair, draws, prompts, methods, running, checkpoints(config)[0], keep)


def section(
    scores: pd.DataFrame,
    effects: pd.DataFrame,
    config: PlantedConfig,
    left_out: Mapping[str, int],
    marked: pd.DataFrame | None = None,
) -> Section:
    """Tables, figure and finding from what was measured.

    Args:
        scores, effects: see `interp.planting.table.by_pair`.
        config: the settings.
        left_out: reason to number of pairs.
        marked: see `interp.planting.mark_table`.
    """
    pairs = by_pair(scores, effects)
    found, null = found_table(pairs), null_table(pairs)
    figures = {"planted": plot_found(found, null, by_effect(scores, effects))}
    tables = {"planted": found, "planted_null": null, "planted_pairs": pairs, "plants": effects}
    account = _account(config, pairs, left_out)
    first, details = told(finding(found, null))
    if marked is not None:
        of_marks = mark_table(marked, effects)
        tables |= {"planted_marks": of_marks, "marks": marked}
        first += "\n" + marks_in_words(of_marks)
    every = {**tables, "scores": scores}
    return Section("planted", "Planted changes", first, account, every, figures, details=details)


def marks_in_words(table: pd.DataFrame) -> str:
    """What share of each sort of cells a map marks as beyond control."""
    lines = []
    for direction in dict.fromkeys(table["direction"]):
        own = table.loc[table["direction"] == direction]
        parts = "; ".join(
            f"{row['cells']} {interval_text(row['marked'], row['low'], row['high'])} (n = {row['n_cells']})"
            for _, row in own.iterrows()
        )
        lines.append(f"marked as beyond control, {direction}: {parts}.")
    return "\n".join(lines)


def finding(found: pd.DataFrame, null: pd.DataFrame) -> list[str]:
    """Every kind's methods by AUROC, what was invisible, and the claims on null pairs."""
    parts = []
    for kind in dict.fromkeys(found["kind"]):
        own = found.loc[found["kind"] == kind].sort_values("auroc", ascending=False)
        first = own.iloc[0]
        told = ", ".join(
            f"{row['method']} {interval_text(row['auroc'], row['auroc_low'], row['auroc_high'])}"
            for _, row in own.iterrows()
        )
        parts.append(
            f"{kind} ({first['n_pairs']} pairs, {first['n_invisible']} of {first['n_changed']} changed components "
            f"invisible): AUROC {told}"
        )
    some = null.dropna(subset="claimed")
    if len(some):
        worst = some.loc[some["claimed"].idxmax()]
        parts.append(
            f"null pairs with a claim: at most {worst['claimed']:.0%} ({worst['method']}, {worst['kind']}, n = "
            f"{worst['n_pairs']}); by tests alone, without the refusal of recoveries, at most "
            f"{some['tested'].max():.0%}"
        )
        parts = [*parts[:2], parts[-1], *parts[2:-1]]  # the control opens the page, too
    return [f"{part[0].upper()}{part[1:]}." for part in parts]


def _account(config: PlantedConfig, pairs: pd.DataFrame, left_out: Mapping[str, int]) -> Account:
    definition = (
        "changes planted into a copy of IN, every other weight with Gaussian noise of the norm of rounding to bfloat16 "
        "(not in identical and bf16 pairs); soft metric over the copy's greedy text; score of a component: |mean "
        "effect| at all its tokens; AUROC: share of (changed, unchanged) couples in which the changed one scores "
        "higher; invisible: alone, on other prompts, it moves the probabilities of next tokens along IN's text (total "
        f"variation, summed) no more than 95 % of {config.noise_pairs} noise pairs do; "
        f"intervals: over pairs (95 %); claim: corrected p < 0.05 of {TEST}; and, for what moves something between the "
        "models, no refusal of recoveries"
    )
    some = pairs.loc[pairs["n_changed"] > 0]
    if len(some):
        definition += (
            f"; of the changes that were asked for, the weights hold {some['norm_ratio'].min():.2f} to "
            f"{some['norm_ratio'].max():.2f} of the norm, at cosines of {some['cosine'].min():.2f} and more; of the "
            f"noise, {some['noise_ratio'].min():.2f} to {some['noise_ratio'].max():.2f}"
        )
    if not pairs["tested"].any():
        definition += f" (with {config.n} prompts a pair no p can be small enough, so nothing is tested)"
    counts = pairs.groupby("kind", sort=False)["pair"].nunique()
    n = f"{config.n} prompts a pair; pairs: " + ", ".join(f"{kind} {count}" for kind, count in counts.items())
    holm = "Holm over the components of a pair, method by method"
    return Account(definition, n, holm, config.seed, left_out=left_out, counts={"examples": config.n})


PLAN = Planned(work, assumed=assumed, asks=False)
COMMAND = Command(PlantedConfig, check, load, load_pair, measure, admit, PLAN, on_ray=True)
