"""Does what was claimed hold? A file of claims put to the test on held-out prompts, on one pair or several.

`frankenlens test` is the command; the pieces are in `interp.hypotheses`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.hypotheses import Family, Outcome, plot_claims, put_to_test, read_claims, verdict_table
from interp.pair.pair import Pair
from interp.questions.examples import Example, with_looked_at
from interp.results.page import Account, Section


@dataclass(frozen=True)
class ClaimsConfig(PairSettings, DataSettings):
    """Settings of a test of claims; the defaults run on the pair that ships with the package.

    Attributes:
        claims: YAML file; see `interp.hypotheses.file`.
        pairs: instead of --in and --rl, several pairs: IN RL IN RL ...
        allow_reuse: test claims on prompts they were found on, too; they are marked exploratory.
        seed: of the prompts too, where they are synthetic; another than the default of `frankenlens map`, so that what
            was found there is tested on others.
        out: folder for claims.csv, claims.png, test.nc and report.html.
    """

    claims: Annotated[Path, tyro.conf.Positional] = Path("claims.yaml")
    pairs: tuple[tuple[str, str], ...] = ()
    allow_reuse: bool = False
    seed: int = 1
    n: int = 240
    out: Path = Path("out/claims")


def run(config: ClaimsConfig) -> pd.DataFrame:
    """Test the claims and write table, figure, dataset and page, all or none.

    Returns:
        The table of claims.csv: see `interp.hypotheses.verdict_table`.

    Raises:
        FrankenlensError: settings contradict each other; the file has a mistake; a component that the models do not
            have; claims that were found on these prompts; the models are no pair; the data cannot be read.
    """
    check(config)
    family = read_claims(config.claims)
    examples, dropped = load_examples(config, config.seed)
    outcomes: dict[str, Outcome] = {}
    models: dict[str, object] = {}
    for own in _each_pair(config):
        pair = load_pair(own)
        try:
            name = _name(own)
            models |= {
                (f"{name} {key}" if config.pairs else key): value for key, value in pair.provenance().items()
            }
            outcomes[name] = tested(pair, family, examples, own)
        finally:
            pair.close()
    section = summarised(family, outcomes, config, dropped)
    counts = {"examples": len(examples)}
    counts |= {
        f"decisions {name}": len(o.decisions) for name, o in outcomes.items() if o.decisions is not None
    }
    publish([section], config, config.out, models, counts)
    for name, outcome in outcomes.items():
        print("\n".join([f"\n{name}:" if config.pairs else "", *(v.text for v in outcome.verdicts)]))
    return section.tables["claims"]


def check(config: ClaimsConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    if config.pairs and config.in_ is not None:
        raise FrankenlensError("--pairs names all pairs; leave --in and --rl out.")
    twice = [pair for pair, count in Counter(config.pairs).items() if count > 1]
    if twice:
        raise FrankenlensError(f"--pairs names {' '.join(twice[0])} twice.")
    if not config.claims.is_file():
        raise FrankenlensError(
            f"There is no file of claims {config.claims}; give one: frankenlens test CLAIMS."
        )


def tested(
    pair: Pair, family: Family, examples: Sequence[Example], config: ClaimsConfig, progress: bool = True
) -> Outcome:
    """One family on one pair, with the settings."""
    return put_to_test(
        pair,
        family,
        examples,
        allow_reuse=config.allow_reuse,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
    )


def measure(pair: Pair, examples: Sequence[Example], config: ClaimsConfig) -> Section:
    """The claims of the settings' file on an opened pair, as a section of a page.

    Raises:
        FrankenlensError: as `run`.
    """
    family = read_claims(config.claims)
    return summarised(family, {_name(config): tested(pair, family, examples, config)}, config, {})


def summarised(
    family: Family, outcomes: dict[str, Outcome], config: ClaimsConfig, dropped: dict[str, int]
) -> Section:
    """One table, one figure, the values per example and a sentence, of all pairs."""
    table = pd.concat(
        [verdict_table(list(o.verdicts), name) for name, o in outcomes.items()], ignore_index=True
    )
    kept: dict[str, xr.Dataset] = {name: o.dataset() for name, o in outcomes.items() if o.measured}
    data = [dataset.expand_dims(pair=[name]) for name, dataset in kept.items()]
    dataset: xr.Dataset | None = xr.concat(data, "pair", join="outer") if data else None  # type: ignore[assignment]
    examples = next(iter(outcomes.values())).examples
    dataset = None if dataset is None else with_looked_at(dataset, examples)
    account = _account(family, table, len(examples), config, dropped)
    figures = {"claims": plot_claims(table)}
    return Section("test", "Claims", finding(outcomes), account, {"claims": table}, figures, dataset=dataset)


def finding(outcomes: Mapping[str, Outcome]) -> str:
    """Each claim's verdict, in a sentence."""
    said = []
    for name, outcome in outcomes.items():
        for v in outcome.verdicts:
            of = f" ({name})" if len(outcomes) > 1 else ""
            beside = "; ".join(filter(None, (v.control_says, v.reason)))
            said.append(f"{v.line}{of}{f' ({beside})' if beside else ''}.")
    return " ".join(said)


def _each_pair(config: ClaimsConfig) -> list[ClaimsConfig]:
    return [replace(config, in_=in_, rl=rl) for in_, rl in config.pairs] or [config]


def _name(config: ClaimsConfig) -> str:
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
    family: Family, table: pd.DataFrame, n: int, config: ClaimsConfig, dropped: dict[str, int]
) -> Account:
    definition = (
        "one-sided paired tests (the largest p of Student's t, Hall's skewness-corrected t and, for verdicts that "
        "something is small, the chance that no prompt which moves all the way was drawn) at alpha "
        f"{family.alpha:g} for and against each claim; intervals at 1 - 2 alpha, uncorrected (BCa bootstrap); "
        "controls: the donor's activation on another example, or a random update as large; decision "
        f"{family.decision}"
    )
    sizes = sorted({int(n) for n in table.loc[table["verdict"] != "refused", "n"]})
    tested_on = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}" if sizes else "no"
    names = {"holm": "Holm", "bh": "Benjamini-Hochberg", "none": "none"}
    over = "" if family.correction == "none" else f" over {len(family.claims)} claims, for each pair"
    reused = sorted(set(table.loc[table["origin"] == "exploratory", "claim"]))
    marked = f"; exploratory (tested on prompts they were found on): {', '.join(reused)}" if reused else ""
    return Account(
        definition + marked,
        f"{tested_on} of {n} examples",
        names[family.correction] + over,
        config.seed,
        family.partition if _regions(family) else "",
        dropped,
    )


def _regions(family: Family) -> bool:
    named = [one for claim in family.claims for one in (*claim.component, *claim.more_than)]
    return any(one[:1].isupper() or one.startswith("region ") for one in named)
