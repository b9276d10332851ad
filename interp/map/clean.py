"""Clean runs of one model that several maps start from: made once, kept while there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hooks import HookedVLM
from hooks.batches import budget
from interp.map.cells import Donor
from interp.metrics import Metric
from interp.prompts import Prompt
from interp.prompts.pairing import PatchBatch
from interp.questions.examples import fingerprint as content
from interp.results.digest import digest
from interp.results.store import fingerprint
from interp.sweep.batch import stored_bytes
from interp.sweep.stored import StoredRun


@dataclass(frozen=True, eq=False)
class CleanBatch:
    """A model's clean runs on one batch.

    Attributes:
        ready: the batch.
        donor: its activations and metric.
        stored: by the activations kept, the run that interventions are taken up from; filled by the first sweep.
    """

    ready: PatchBatch
    donor: Donor
    stored: dict[tuple[str, ...], StoredRun] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """What it holds, about: activations twice (to be put elsewhere, and to be changed), and what is taken up at."""
        rows, width = self.ready.batch.roles.shape
        return 2 * self.donor.n_bytes + rows * stored_bytes(self.donor.vlm, width)


class CleanRuns:
    """A model's clean runs, batch by batch, for maps of it against other models (`component_map(clean=...)`).

    Args:
        vlm: the model, whose weights stay as they are.
        most: bytes that are kept; by default half of what methods may take. Of what is not kept the model runs again.

    Attributes:
        made: batches that it was run on, those again among them.
        again: batches that it was run on again for want of room.
    """

    def __init__(self, vlm: HookedVLM, most: int | None = None) -> None:
        self.vlm = vlm
        self.made = self.again = 0
        given = budget(vlm) if most is None else 2 * most
        self._left = float("inf") if given is None else given / 2
        self._kept: dict[str, CleanBatch] = {}
        self._seen: set[str] = set()

    def of(
        self,
        prompts: Sequence[Prompt],
        others: Sequence[Prompt],
        names: Sequence[str],
        metric: Metric,
        make: Callable[[], CleanBatch],
    ) -> CleanBatch:
        """The runs on one batch, made where they are not kept.

        Args:
            prompts: of the batch.
            others: those that it borrows from.
            names: activations that are kept.
            metric: of these prompts.
            make: runs the model.
        """
        asked = [[(list(one.ids), content(one.example)) for one in some] for some in (prompts, others)]
        key = fingerprint(asked, list(names), digest(metric))
        if key in self._kept:
            return self._kept[key]
        made = make()
        self.made += 1
        self.again += key in self._seen
        self._seen.add(key)
        if made.n_bytes <= self._left:
            self._left -= made.n_bytes
            self._kept[key] = made
        return made
