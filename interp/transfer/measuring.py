"""What models and variants do on the metrics of a transfer, alone or together; kept where there is a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from interp.pair.pair import weights_sha256
from interp.results.store import Store, fingerprint, under
from interp.transfer.grafts import Graft
from interp.transfer.outcomes import Metrics, Outcomes, measured, names_of, read, texts_of
from interp.transfer.writing import Writing


class Measuring:
    """Outcomes by the name of their model or variant.

    What was measured is kept by the hash of the very weights, a part for what is measured together; of variants that
    write together, every batch of what each writes as well.

    Args:
        metrics: by name.
        store: where it is kept what each did; None: nowhere.
        bar: of all answers.
    """

    def __init__(self, metrics: Metrics, store: Store | None, bar: tqdm) -> None:
        self._metrics, self._store, self._bar = metrics, store, bar
        self._found: dict[str, dict[str, Outcomes]] = {}
        self._weights: dict[str, str] = {}
        self._later: dict[str, list[str]] = {}

    def run(self, name: str, vlm: HookedVLM, later: bool = False) -> None:
        """Measure a model as it stands; what is known from texts alone only `later`, with others, if so asked.

        Raises:
            FrankenlensError: a metric is of other examples than for the first model; of the store.
        """
        self._found[name] = {}
        if self._store is not None:
            self._weights[name] = weights_sha256(vlm.model)
        for metric, one in self._metrics.items():
            kept = self._load(name, metric)
            if kept is None and later and texts_of(one):
                self._later.setdefault(metric, []).append(name)
                continue
            self._take(name, metric, measured(metric, one, vlm) if kept is None else kept, new=kept is None)
            self._bar.update(sum(len(texts.prompts) for texts in texts_of(one)) or 1)

    def together(self, recipient: HookedVLM, donor: HookedVLM, runs: Mapping[str, Sequence[Graft]]) -> None:
        """Measure what was left for later.

        Raises:
            FrankenlensError: as `run`, and as `Writing.written`.
        """
        for metric, names in self._later.items():
            writing = Writing(recipient, donor, {name: runs[name] for name in runs if name in names})
            written: list[dict[str, list[list[int]]]] = []
            for number, texts in enumerate(texts_of(self._metrics[metric])):
                own = {name: self._under(name, metric, number) for name in names}
                written.append(writing.written(texts, own.get, self._bar.update))
            for name in names:
                graded = read(metric, self._metrics[metric], [some[name] for some in written])
                self._take(name, metric, graded, new=True)

    def rows(self) -> dict[str, list[Outcomes]]:
        """All that was measured, each in the order of the metrics."""
        return {
            name: [found[metric] for metric in names_of(self._metrics)] for name, found in self._found.items()
        }

    def _take(self, name: str, metric: str, found: Mapping[str, Outcomes], new: bool) -> None:
        if new and self._store is not None:
            part, of = self._part(name, metric)
            plain = {key: astuple(own) for key, own in found.items()}
            found = _outcomes(self._store.part(part, lambda: plain, of))
        for key, own in found.items():
            first = next((other[key] for other in self._found.values() if key in other), own)
            if own.examples != first.examples:
                raise FrankenlensError(
                    f"metric {key!r} returned other examples for {name} than for the first model"
                )
        self._found[name] |= found

    def _load(self, name: str, metric: str) -> Mapping[str, Outcomes] | None:
        """What was measured of these very weights."""
        if self._store is None:
            return None
        found = self._store.load(*self._part(name, metric))
        return None if found is None else _outcomes(found)

    def _part(self, name: str, metric: str) -> tuple[str, str]:
        of = fingerprint(names_of({metric: self._metrics[metric]}))
        return f"{self._weights[name]}-{of[:8]}", of

    def _under(self, name: str, metric: str, number: int) -> Store | None:
        return under(self._store, f"{self._part(name, metric)[0]}-{number}") if self._store else None


def _outcomes(part: Mapping[str, Any]) -> dict[str, Outcomes]:
    return {metric: Outcomes(*(tuple(column) for column in columns)) for metric, columns in part.items()}
