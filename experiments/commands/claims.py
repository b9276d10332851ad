"""Does what was claimed hold? A file of claims put to the test on held-out prompts, on one pair or several.

`frankenlens test` is the command; the pieces are in `interp.hypotheses`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
import xarray as xr

from experiments.bench import Planned
from experiments.commands.claims_plan import assumed, structure, work
from experiments.contract import admitted
from experiments.frame import Command
from experiments.settings import Questions, QuestionSettings, load_pair, load_questions
from hooks.errors import FrankenlensError
from hooks.whereabouts import require_checkpoint, require_file
from interp.hypotheses import Family, Ledger, Outcome, plot_claims, put_to_test, read_claims, verdict_table
from interp.pair.pair import Pair
from interp.questions.examples import with_looked_at
from interp.questions.readers import Seen
from interp.results.page import Account, Section


@dataclass(frozen=True)
class ClaimsConfig(QuestionSettings):
    """Settings of a test of claims; the defaults run on the pair that ships with the package.

    Attributes:
        claims: YAML file; see `interp.hypotheses.file`.
        pairs: instead of --in and --rl, several pairs: IN RL IN RL ...
        allow_reuse: test claims on prompts they were found on, too; they are marked exploratory.
        ledger: file that keeps and counts the looks at claims; by default beside the file of claims, .looks.jsonl.
        seed: of the prompts too; another than the default of `frankenlens map`. Those that a claim was found on are
            left out anyway, and others of the data drawn in their place.
        out: folder for claims.csv, claims.png, test.nc and report.html.
    """

    claims: Annotated[Path, tyro.conf.Positional] = Path("claims.yaml")
    pairs: tuple[tuple[str, str], ...] = ()
    allow_reuse: bool = False
    ledger: Path | None = None
    seed: int = 1
    n: int = 240
    out: Path = Path("out/claims")


@dataclass(frozen=True)
class Claimed(Questions):
    """The claims, and the prompts that they are tested on."""

    family: Family = field(kw_only=True)


class Pairs:
    """The pairs of the settings, one open at a time; where they come from is known once they have been opened."""

    def __init__(self, config: ClaimsConfig) -> None:
        self._config = config
        self._models: dict[str, Any] = {}

    def each(self) -> Iterator[tuple[str, Pair]]:
        """Name and pair; it is closed when the next one is asked for."""
        for own in each_pair(self._config):
            pair, name = load_pair(own), pair_name(own)
            for role, about in pair.provenance().items():
                self._models[f"{name} {role}" if self._config.pairs else role] = about
            try:
                yield name, pair
            finally:
                pair.close()

    def provenance(self) -> dict[str, Any]:
        """Of all that were opened."""
        return self._models

    def close(self) -> None:
        """Each is closed already."""


def check(config: ClaimsConfig) -> None:
    """Refuse two ways of naming pairs, a pair named twice, and a file that is not there."""
    if config.pairs and config.in_ is not None:
        raise FrankenlensError("--pairs names all pairs; leave --in and --rl out.")
    twice = [pair for pair, count in Counter(config.pairs).items() if count > 1]
    if twice:
        raise FrankenlensError(f"--pairs names {' '.join(twice[0])} twice.")
    for path in dict.fromkeys(path for pair in config.pairs for path in pair):
        require_checkpoint(path, "--pairs")
    require_file(config.claims, "a YAML file of claims: frankenlens test CLAIMS")


def load(config: ClaimsConfig) -> Claimed:
    """The claims of the file, and the prompts.

    Raises:
        FrankenlensError: the file has a mistake, or the data cannot be read.
    """
    family = read_claims(config.claims)
    asked = held_out(family, config)
    return Claimed(asked.examples, asked.left_out, family=family)


def held_out(family: Family, config: ClaimsConfig) -> Questions:
    """Prompts that no claim of a family was found on, unless the settings allow to use those again.

    Raises:
        FrankenlensError: no row can be read, or all were looked at when the claims were found.
    """
    keys = (
        frozenset[str]()
        if config.allow_reuse
        else frozenset().union(*(c.found_on or () for c in family.claims))
    )
    return load_questions(config, Seen(keys, "when the claims were found"))


def measure(pairs: Pairs, asked: Claimed, config: ClaimsConfig) -> Iterator[Section]:
    """The claims put to the test on every pair.

    Raises:
        FrankenlensError: a component that the models do not have, or claims that were found on these prompts.
    """
    outcomes = {name: tested(pair, asked.family, asked, config) for name, pair in pairs.each()}
    tables = [verdict_table(list(one.verdicts), name) for name, one in outcomes.items()]
    table = pd.concat(tables, ignore_index=True)
    yield Section(
        "test",
        "Claims",
        finding(outcomes),
        _account(asked, outcomes, table, config),
        {"claims": table},
        {"claims": plot_claims(table)},
        _dataset(asked, outcomes),
    )


def tested(
    pair: Pair, family: Family, asked: Questions, config: ClaimsConfig, progress: bool = True
) -> Outcome:
    """One family on one pair, with the settings; looks are counted beside the file of claims, if there is one."""
    path = config.ledger or (looks_beside(config.claims) if config.claims.is_file() else None)
    ledger = None if path is None else Ledger(path)
    settings = {
        "allow_reuse": config.allow_reuse,
        "ledger": ledger,
        "seed": config.seed,
        "progress": progress,
    }
    fit = admitted(pair, asked, config)
    return put_to_test(pair, family, fit.examples, **settings, **config.running)


def looks_beside(claims: Path) -> Path:
    """The ledger of a file of claims."""
    return claims.with_name(claims.name + ".looks.jsonl")


def finding(outcomes: Mapping[str, Outcome]) -> str:
    """Each claim's verdict, with everything that a reader has to see."""
    lines = []
    for name, outcome in outcomes.items():
        lines += [f"on {name}"] if len(outcomes) > 1 else []
        lines += [verdict.text for verdict in outcome.verdicts]
    return "\n".join(lines)


def _dataset(asked: Claimed, outcomes: Mapping[str, Outcome]) -> xr.Dataset | None:
    """The values per example of every pair on which something could be measured."""
    kept = {name: one.dataset() for name, one in outcomes.items() if one.measured}
    if not kept:
        return None
    data = [dataset.expand_dims(pair=[name]) for name, dataset in kept.items()]
    together: Any = xr.concat(data, "pair", join="outer")
    return with_looked_at(together, asked.examples)


def each_pair(config: ClaimsConfig) -> list[ClaimsConfig]:
    """The settings of every pair that they name."""
    return [replace(config, in_=in_, rl=rl) for in_, rl in config.pairs] or [config]


def pair_name(config: ClaimsConfig) -> str:
    """The pair by the ends of its paths, or by the whole paths where several pairs end alike."""
    if config.in_ is None or config.rl is None:
        return "the pair that ships"
    depth = 2 if config.pairs else 1
    short = [tuple("/".join(Path(one).parts[-depth:]) for one in pair) for pair in config.pairs]
    own = (config.in_, config.rl)
    if len(set(short)) == len(short):
        own = tuple("/".join(Path(one).parts[-depth:]) for one in own)
    return " → ".join(own)


def _account(
    asked: Claimed, outcomes: Mapping[str, Outcome], table: pd.DataFrame, config: ClaimsConfig
) -> Account:
    family = asked.family
    definition = (
        "one-sided paired tests (the largest p of Student's t, Hall's skewness-corrected t, for changes of right or "
        "wrong answers exact tests and Tango's score test, and, for verdicts that something is small, the chance that "
        "no prompt which moves all the way was drawn) at alpha "
        f"{family.alpha:g} for and against each claim; examples of one image are one unit; intervals at 1 - 2 alpha, "
        "uncorrected; "
        "controls: a random direction as large as the donor's difference at each token, or a random update as large; "
        f"decision {family.decision}"
    )
    sizes = sorted({int(n) for n in table.loc[table["verdict"] != "refused", "n"]})
    tested_on = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}" if sizes else "no"
    names = {"holm": "Holm", "bh": "Benjamini-Hochberg", "none": "none"}
    over = "" if family.correction == "none" else f" over {len(family.claims)} claims, for each pair"
    reused = sorted(set(table.loc[table["origin"] == "exploratory", "claim"]))
    again = ", or looked at again" if (table["look"] > 1).any() else ""
    marked = (
        f"; exploratory (tested on prompts they were found on{again}): {', '.join(reused)}" if reused else ""
    )
    counts = {"examples": len(asked.examples)}
    for name, one in outcomes.items():
        counts |= {} if one.decisions is None else {f"decisions {name}": len(one.decisions)}
    return Account(
        definition + marked,
        f"{tested_on} of {len(asked.examples)} examples",
        names[family.correction] + over,
        config.seed,
        family.partition if _regions(family) else "",
        left_out=_left_out(outcomes),
        counts=counts,
    )


def _left_out(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """The same on every pair, or of each."""
    found = [one.left_out for one in outcomes.values()]
    if all(one == found[0] for one in found):
        return dict(found[0]) if found else {}
    return {f"{why} ({name})": n for name, one in outcomes.items() for why, n in one.left_out.items()}


def _regions(family: Family) -> bool:
    named = [one for claim in family.claims for one in (*claim.component, *claim.more_than)]
    return any(one[:1].isupper() or one.startswith("region ") for one in named)


PLAN = Planned(work, assumed=assumed, structure=structure)
COMMAND = Command(ClaimsConfig, check, load, Pairs, measure, plan=PLAN)
