"""Whether a claim is tested on prompts it was not found on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from hooks.errors import FrankenlensError
from interp.hypotheses.claim import Claim, Family
from interp.questions.examples import CONTENT, LOOKED_AT, Example, cluster_of, fingerprint

SHOWN = 3


def examples_of(result: Path | str) -> frozenset[str]:
    """The ids and fingerprints of all examples that a result on disk (map.nc, ...) was found on.

    Raises:
        FrankenlensError: no such file, no result, or one that does not keep all examples that were looked at.
    """
    from interp.results.files import load_dataset

    dataset = load_dataset(result)
    kept = [name for name in (LOOKED_AT, CONTENT) if name in dataset.coords]
    if kept:
        found = [str(one) for name in kept for one in dataset[name].to_numpy()]
        # a bare number is a row of some file; what it asked is told by its fingerprint
        return frozenset(one for one in found if CONTENT not in kept or not one.isdecimal())
    for name in ("id", "example"):
        if name in dataset.coords:
            ids = frozenset(map(str, dataset[name].to_numpy().ravel()))
            counts = json.loads(dataset.attrs["provenance"]).get("counts")
            looked_at = counts.get("examples", 0) if isinstance(counts, dict) else 0
            if not isinstance(looked_at, int):
                raise FrankenlensError(
                    f"{result}: its provenance does not say how many examples were looked at"
                )
            if looked_at > len(ids):
                raise FrankenlensError(
                    f"{result} names {len(ids)} of the {looked_at} examples that were looked at, so the others would "
                    "pass for held out; make it again, or list their ids or fingerprints"
                )
            return ids
    raise FrankenlensError(
        f"{result} keeps no examples, so it cannot say what a claim was found on; "
        "interp.questions.examples.with_looked_at adds them"
    )


def population_of(examples: Sequence[Example]) -> str:
    """What a mean over examples is a mean of: the mix of tasks as it was drawn, and how many clusters.

    Example:
        >>> examples = [one for task in ("sum", "count") for one in fl.tasks.sample(task, 2, seed=0, split="map")]
        >>> from interp.hypotheses import population_of
        >>> population_of(examples)
        'prompts such as these 4: sum 2, count 2, in this mix'
    """
    tasks = Counter(example.task for example in examples)
    named = ", ".join(f"{task or 'without a task'} {n}" for task, n in tasks.items())
    clusters = len({cluster_of(example) for example in examples})
    text = f"prompts such as these {len(examples)}"
    text += f": {named}, in this mix" if len(tasks) > 1 else f" of {named}" if any(tasks) else ""
    return text + (f"; {clusters} clusters" if clusters < len(examples) else "")


def reused(claim: Claim, examples: Sequence[Example]) -> list[str]:
    """Ids of the examples that a claim was found on, by id or by fingerprint."""
    if not claim.found_on:
        return []
    return [e.id for e in examples if e.id in claim.found_on or fingerprint(e) in claim.found_on]


def origins(family: Family, examples: Sequence[Example], allow_reuse: bool = False) -> dict[str, str]:
    """Of every claim, by name: "held out", "exploratory" or "not stated" (see `ORIGINS`).

    Args:
        family: the claims.
        examples: those that are to test them.
        allow_reuse: test a claim on prompts that it was found on, and call it exploratory.

    Raises:
        FrankenlensError: a claim would be tested on prompts that it was found on.
    """
    found = {}
    for claim in family.claims:
        again = reused(claim, examples)
        if again and not allow_reuse:
            raise FrankenlensError(
                f"{_at(claim)}{claim.name!r} was found on {len(again)} of the {len(examples)} prompts that are to test "
                f"it ({_listed(again)}). Give others (another seed or data, --seed or --data; `frankenlens test` draws "
                "others itself where a file of claims says what they were found on), or allow_reuse=True "
                "(--allow-reuse): it is then marked exploratory."
            )
        found[claim.name] = "exploratory" if again else "not stated" if claim.found_on is None else "held out"
    return found


def _at(claim: Claim) -> str:
    return f"{claim.where}: " if claim.where else ""


def _listed(ids: Iterable[str]) -> str:
    names = list(ids)
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
