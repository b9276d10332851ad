"""The unit of data that every analysis takes: images, a question and the answer that counts as right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from hooks.errors import FrankenlensError
from interp.questions.images import as_seen
from interp.questions.on_demand import Images

LOOKED_AT = "looked_at"
CONTENT = "looked_at_content"
_HASHED = "_hashed"


@dataclass(frozen=True)
class Example:
    """One question about zero or more images.

    Attributes:
        id: unique within its data set; results are labelled by it.
        images: in the order in which the question refers to them, as `interp.questions.images.as_seen` gives them; a
            tuple, or what decodes those of a file when they are used (`interp.questions.on_demand`). Their pixels stay
            as they are: an example with others is another example (`dataclasses.replace`).
        question: the user's text, without template or image placeholders.
        answer: the reference answer, compared exactly (`interp.questions.tasks.grade`).
        task: name of the task, `""` where there is only one.
        reasoning: a reference chain of thought, without delimiters; None where there is none.
        meta: whatever else is known (the synthetic scenes: see `interp.questions.tasks`).
        cluster: what it shares with others that are not independent of it; "": its images (`cluster_of`).

    Raises:
        FrankenlensError: an image that no model could be shown.
    """

    id: str
    images: Sequence[Image.Image]
    question: str
    answer: str
    task: str = ""
    reasoning: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.images, Images):
            object.__setattr__(self, "images", tuple(self._seen(*one) for one in enumerate(self.images, 1)))

    def _seen(self, n: int, image: Any) -> Image.Image:
        try:
            return as_seen(image)
        except FrankenlensError as error:
            raise FrankenlensError(f"example {self.id!r}, image {n} cannot be used: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Copies hash their own pixels."""
        return {name: value for name, value in self.__dict__.items() if name != _HASHED}

    def _sha256(self, text: str) -> str:
        """Of a text and all pixels: megabytes that every analysis asks for several times, hashed once."""
        images, known = self.__dict__.get(_HASHED, (None, {}))
        if images is not self.images:
            known = {}
            self.__dict__[_HASHED] = (self.images, known)
        if text not in known:
            digest = hashlib.sha256(text.encode())
            for image in self.images:
                digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
            known[text] = digest.hexdigest()
        return known[text]


def fingerprint(example: Example) -> str:
    """SHA-256 of what is asked: images, question and answer, whatever the example is called.

    Example:
        >>> import dataclasses
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> copy = dataclasses.replace(example, id="another name")
        >>> fl.fingerprint(copy) == fl.fingerprint(example)
        True
    """
    return example._sha256(repr((example.question, example.answer)))


def cluster_of(example: Example) -> str:
    """What makes examples hang together: the same `cluster`, else the same images, else the same question and answer.

    Intervals and tests take clusters, not examples, to be independent: five questions about one image are not five
    images.
    """
    if example.cluster:
        return f"cluster {example.cluster}"
    if not example.images:
        return f"question {fingerprint(example)[:16]}"
    return f"images {example._sha256('')[:16]}"


def clusters_of(dataset: xr.Dataset, dim: str = "example") -> np.ndarray | None:
    """The coordinate `cluster` of a result's examples; None where it has none, being older: each stands alone."""
    return (
        dataset["cluster"].to_numpy()
        if "cluster" in dataset.coords and dim in dataset["cluster"].dims
        else None
    )


def once_each(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """The first of every question that is asked more than once under several ids, and how many others there were."""
    kept: dict[str, Example] = {}
    for example in examples:
        kept.setdefault(fingerprint(example), example)
    return list(kept.values()), len(examples) - len(kept)


def with_looked_at(
    dataset: xr.Dataset, examples: Sequence[Example], before: xr.Dataset | None = None
) -> xr.Dataset:
    """A result that names all examples it was found on, those without a value (no decision, say) among them.

    Args:
        dataset: the result.
        examples: all that were looked at; `interp.hypotheses.examples_of` reads them again.
        before: a result that this one was built on, whose examples count as looked at, too.

    Returns:
        A copy with the coordinates looked_at (ids) and looked_at_content (fingerprints), of a dimension of their own.
    """
    once = {(example.id, fingerprint(example)) for example in examples}
    if before is not None and CONTENT in before.coords:
        names, contents = (before[name].to_numpy().astype(str).tolist() for name in (LOOKED_AT, CONTENT))
        once |= set(zip(names, contents, strict=True))
    ids, contents = zip(*sorted(once), strict=True) if once else ((), ())
    coords = {LOOKED_AT: np.array(ids, str), CONTENT: (LOOKED_AT, np.array(contents, str))}
    return dataset.drop_dims(LOOKED_AT, errors="ignore").assign_coords(coords)
