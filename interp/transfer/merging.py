"""Merge recipes that mergekit knows, from checkpoint folders to a checkpoint folder: linear, SLERP, task arithmetic,
TIES and DARE.

mergekit does the arithmetic, tensor by tensor; names, shapes and ties are aligned here, by the transformers model, so
that every architecture merges and no tensor is dropped. Two of mergekit's definitions are not the papers':

- SLERP turns on the angle between whole tensors and falls back to linear interpolation where |cosine| > 0.9995. That
  is nearly every tensor of a model and its RL checkpoint: `MergeReport.collinear` counts them.
- TIES trims each tensor by itself; the paper (2306.01708) trims the task vector of the whole model. The experts of a
  layer are one tensor, as the model holds them, however they are stored.

DARE here rescales as its paper does (2311.03099): what is kept is divided by the density. mergekit's own default, to
restore the tensor's L1 norm, is `rescale="l1"`.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from hooks.errors import FrankenlensError, nearest, shown
from hooks.extras import require_installed
from hooks.stored.layouts import Layout
from interp.comparison import Checkpoint, align
from interp.results.files import is_occupied, publishing
from interp.updates import Realized

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
ON_BASE = METHODS[2:]  # add updates to a base
COLLINEAR = 0.9995  # mergekit's dot_threshold
_FEATURE = "a merge recipe"
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".py")


@dataclass(frozen=True)
class Recipe:
    """How tensors become one.

    With w_i the models, b the base, d_i = w_i - b and a_i the weights: linear is sum a_i w_i (over sum a_i where
    normalized); slerp goes from the first model to the second; task_arithmetic is b + scale sum a_i d_i; ties trims
    each d_i to its largest entries, keeps those whose sign is that of sum a_i d_i, and takes their weighted mean;
    dare_* drops each entry of d_i with probability 1 - density, then adds them (linear) or those of the elected sign
    (ties).

    Attributes:
        method: of `METHODS`.
        weights: a_i, one per model; 1 where not given.
        density: share of each d_i that is kept, one per model or one for all; for ties and dare.
        t: of slerp; 0 is the first model, 1 the second.
        scale: lambda of the papers; for the methods on a base.
        normalize: divide by the sum of the weights; by default for linear and ties.
        rescale: of dare: "density" (the paper's) or "l1" (mergekit's).
        seed: of dare's masks; every tensor and model has its own.

    Raises:
        FrankenlensError: an unknown method, or a setting that it does not take or lacks.
    """

    method: str
    weights: tuple[float, ...] | None = None
    density: float | tuple[float, ...] | None = None
    t: float | None = None
    scale: float = 1.0
    normalize: bool | None = None
    rescale: Literal["density", "l1"] = "density"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weights", "density"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
        for name in ("weights", "density", "t", "scale", "seed"):
            given = getattr(self, name)
            several = given if isinstance(given, tuple) and name in ("weights", "density") else [given]
            if given is not None and not all(_is_number(one) for one in several):
                raise FrankenlensError(f"{name}={shown(given)} of a recipe: give finite numbers")
        if self.weights is not None and not isinstance(self.weights, tuple):
            raise FrankenlensError(
                f"weights={shown(self.weights)} of a recipe: give one number a model, in a tuple"
            )
        if not isinstance(self.seed, Integral) or abs(self.seed) >= 2**62:
            raise FrankenlensError(
                f"seed={shown(self.seed)} of a recipe: give a whole number of at most 18 digits"
            )
        if self.method not in METHODS:
            hint = nearest(self.method, METHODS)
            raise FrankenlensError(
                f"no recipe {shown(self.method)}; choose {', '.join(METHODS)}. {hint}".strip()
            )
        sparse, dare = self.method in ON_BASE[1:], self.method.startswith("dare")
        slerp = self.method == "slerp"
        for name, given, wanted in (
            ("density", self.density is not None, sparse),
            ("t", self.t is not None, slerp),
        ):
            if given != wanted:
                raise FrankenlensError(f"{self.method} {'needs' if wanted else 'takes no'} {name}=")
        if slerp and (self.weights is not None or self.normalize is not None):
            raise FrankenlensError("slerp takes t= alone, no weights= and no normalize=")
        if self.scale != 1 and self.method not in ON_BASE:
            raise FrankenlensError(f"{self.method} takes no scale=; it adds nothing to a base")
        if any(not 0 < density <= 1 for density in self._per_model(self.density, 1)):
            raise FrankenlensError(f"density={self.density}: give shares above 0, up to 1")
        if self.rescale not in ("density", "l1"):
            raise FrankenlensError(f'rescale={self.rescale!r}: give "density" or "l1"')
        if dare and self.rescale == "density" and self.normalize:
            raise FrankenlensError('normalize=True goes with rescale="l1", mergekit\'s own form of DARE')

    def check(self, n_models: int, has_base: bool) -> None:
        """Refuse a number of models, or a base, that does not fit.

        Raises:
            FrankenlensError: says what the method takes.
        """
        if (self.method in ON_BASE) != has_base:
            raise FrankenlensError(
                f"{self.method} {'adds updates to a base: give base=' if not has_base else 'takes no base='}"
            )
        if n_models < 1 or (self.method == "slerp" and n_models != 2):
            raise FrankenlensError(
                f"{self.method} got {n_models} models; slerp takes two, the others one or more"
            )
        for name in ("weights", "density"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != n_models:
                raise FrankenlensError(f"{name}= has {len(given)} values for {n_models} models")
        if self.method == "linear" and self.normalize is not False and sum(self.weights or (1,)) == 0:
            raise FrankenlensError("the weights sum to 0; give normalize=False to add them as they are")

    def of(
        self,
        tensors: Sequence[Float[Tensor, "..."]],
        base: Float[Tensor, "..."] | None = None,
        name: str = "",
    ) -> Float[Tensor, "..."]:
        """One merged tensor, computed by mergekit in float32 (float64 where a tensor is), rounded once.

        Its type is that of the base, or of the first tensor.

        Args:
            tensors: one per model.
            base: of the methods that have one.
            name: makes DARE's masks differ between tensors.

        Raises:
            FrankenlensError: as `check`, or mergekit is not installed.
        """
        merged = self.wide(tensors, base, name)
        return merged.to((tensors[0] if base is None else base).dtype)

    def wide(
        self,
        tensors: Sequence[Float[Tensor, "..."]],
        base: Float[Tensor, "..."] | None = None,
        name: str = "",
    ) -> Float[Tensor, "..."]:
        """As `of`, before it is rounded."""
        self.check(len(tensors), base is not None)
        require_installed(_FEATURE, "mergekit")
        from mergekit.merge_methods import merge_tensors

        given = list(tensors) if base is None else [base, *tensors]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + zlib.crc32(name.encode()))
            return merge_tensors(
                given,
                self.method,
                parameters=self.parameters(len(tensors)),
                base_index=None if self.method == "linear" else 0,
                name=name,
                dtype=wide,
                out_dtype=wide,
            )

    def parameters(self, n_models: int) -> dict[str, Any]:
        """The recipe in mergekit's terms."""
        if self.method == "slerp":
            return {"t": self.t}
        weights = self._per_model(1.0 if self.weights is None else self.weights, n_models)
        found: dict[str, Any] = {"weight": weights}
        if self.normalize is not None:
            found["normalize"] = self.normalize
        if self.method in ON_BASE:
            found["lambda"] = self.scale
        if self.density is not None:
            found["density"] = self._per_model(self.density, n_models)
        if self.method.startswith("dare"):
            found["rescale"] = self.rescale == "l1"
            if self.rescale == "density":
                found["weight"] = [w / p for w, p in zip(weights, found["density"], strict=True)]
        return found

    @staticmethod
    def _per_model(given: float | tuple[float, ...] | None, n_models: int) -> list[float]:
        if given is None:
            return []
        return list(given) if isinstance(given, tuple) else [given] * n_models


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e30  # type: ignore[operator]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: the merged checkpoint.
        tensors: how many were merged.
        collinear: of slerp, the number that were interpolated linearly (|cosine| > 0.9995); 0 for other methods.
        held: what the tensors hold, in their type, of what the recipe makes of the base (or of the first model).
    """

    folder: Path
    tensors: int
    collinear: int
    held: Realized


def merge(
    recipe: Recipe,
    models: Sequence[Path | str],
    out: Path | str,
    base: Path | str | None = None,
    *,
    shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    rounded: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge checkpoint folders into one that transformers and `HookedVLM.from_pretrained` open; all of it or nothing.

    Config, tokenizer, processor, chat template, names on disk and types of the tensors are those of the base, or of the
    first model where there is no base. Tensors are read and merged one at a time, on the CPU; nothing is downloaded.

    Args:
        recipe: what is done.
        models: local folders.
        out: a folder that does not exist or is empty.
        base: local folder, of the methods that add updates to one.
        shard_bytes: largest file.
        dtype: "float32" to store the merge in it, whatever the models are stored in; by default in their own type.
        rounded: write a merge, too, that the type does not hold.
        progress: a bar.

    Raises:
        FrankenlensError: before anything is written: the recipe does not fit, a folder is no checkpoint that is read,
            checkpoints do not align, `out` is not empty, or mergekit is not installed. Or, before anything is left
            behind: the type of the tensors does not hold the update that the recipe makes (`interp.updates`).
    """
    out = Path(out)
    recipe.check(len(models), base is not None)
    require_installed(_FEATURE, "mergekit")
    from mergekit.io.tensor_writer import TensorWriter

    if dtype not in (None, "float32"):
        raise FrankenlensError(f'dtype={dtype!r}: give "float32", or nothing for the type of the models')
    if is_occupied(out):
        raise FrankenlensError(f"{out} is not empty; choose another folder for the merged checkpoint")
    first, *others = ([] if base is None else [base]) + list(models)
    opened = [Checkpoint(first), *(Checkpoint(folder, first) for folder in others)]
    names = align(*opened)
    keys, types = _keys(opened[0]), set[torch.dtype]()
    collinear, held = 0, Realized()
    with publishing(out) as staging:
        writer = TensorWriter(str(staging), max_shard_size=shard_bytes)
        for name in tqdm(names, desc=recipe.method, disable=not progress, delay=1):
            tensors = [checkpoint.read(name) for checkpoint in opened]
            if recipe.method == "slerp":
                collinear += _collinear(*tensors)
            if base is None:
                merged = recipe.wide(tensors, name=name)
            else:
                merged = recipe.wide(tensors[1:], tensors[0], name)
            before = tensors[0].to(merged)
            stored = merged.to(tensors[0].dtype) if dtype is None else merged
            held += Realized.of(before, stored, merged - before)
            types.add(stored.dtype)
            _save(writer, keys[name], stored)
        coarse = min(types, key=lambda one: -torch.finfo(one).eps)
        if not rounded:
            held.require(
                f"the merge ({recipe.method})", coarse, but='rounded=True; or merge with dtype="float32"'
            )
        for name in opened[0].counters:
            _save(writer, keys[name], opened[0].read(name))
        writer.finalize()
        _copy_settings(opened[0].layout, staging)
        if dtype is not None:
            _set_dtype(staging / "config.json", dtype)
        about = {**asdict(recipe), "models": [Path(m).name for m in models], "mergekit": version("mergekit")}
        about["base"] = None if base is None else Path(base).name
        (staging / "merge.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return MergeReport(out, len(names), collinear, held)


def _collinear(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> bool:
    x, y = a.flatten().double(), b.flatten().double()
    product = float(x.norm() * y.norm())
    return product > 0 and abs(float(x @ y)) / product > COLLINEAR


_OnDisk = tuple[tuple[int, ...], str, tuple[int, ...]]
"""A part of a parameter on disk: its place among the parts, its name there and its shape."""


def _keys(checkpoint: Checkpoint) -> Mapping[str, list[_OnDisk]]:
    """Parameter to what it is on disk: one tensor, or several (experts) that follow one another."""
    found = dict(checkpoint.keys)
    for name, source in checkpoint.ties.items():  # whichever of two names it is stored under
        if name in found:
            found.setdefault(source, found[name])
    return found


def _save(writer: Any, parts: Sequence[_OnDisk], merged: Shaped[Tensor, "..."]) -> None:
    """A merged parameter, in the pieces in which it was."""
    pieces = merged.flatten().split([math.prod(shape) for *_, shape in parts])
    for (_, key, shape), piece in zip(parts, pieces, strict=True):
        writer.save_tensor(key, piece.reshape(shape).clone())


def _set_dtype(file: Path, dtype: str) -> None:
    """In a configuration and its parts, under the names that it has for it."""

    def put(part: dict[str, Any]) -> None:
        for name, value in part.items():
            if name in ("dtype", "torch_dtype"):
                part[name] = dtype
            elif isinstance(value, dict):
                put(value)

    config = json.loads(file.read_text(encoding="utf-8"))
    config.setdefault("dtype", dtype)
    put(config)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_settings(layout: Layout, target: Path) -> None:
    """Everything but weights: configuration, tokenizer, processor, chat template."""
    folders = dict.fromkeys([layout.processor, layout.settings])
    for path in [path for folder in folders for path in folder.iterdir()]:
        if path.is_file() and path.suffix in _SETTINGS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
