"""Frozen addresses for trainers that know no addresses: names, a pattern, masks of rows, and a hook that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hooks import Address, FrankenlensError
from hooks.unopened import unopened_anatomy
from interp.freezing.frozen import owned_rows
from interp.freezing.patterns import pattern_of
from interp.freezing.rows import Rows
from interp.freezing.targets import target_names
from interp.freezing.trainers import Named, Setting, settings_of_trainers
from interp.results.files import publishing

FILES = ("frozen.json", "masks.safetensors", "freeze_hook.py")


@dataclass(frozen=True)
class FrozenNames:
    """What addresses come to in names.

    Attributes:
        addresses: what is to be frozen.
        names: parameters that are frozen whole, in the model's order.
        pattern: a regular expression that finds exactly these; "" where there are none.
        parts: parameter to the rows (dim 0) or columns (dim 1) of it that are frozen.
        settings: what each trainer can do of it.
        targets: modules for PEFT adapters on these addresses; empty where there are none: `no_targets` says why.
        target_modules: a regular expression that matches exactly these.
    """

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    pattern: str
    parts: dict[str, Rows]
    settings: list[Setting]
    targets: tuple[str, ...]
    target_modules: str
    no_targets: str

    def masks(self) -> dict[str, Bool[Tensor, " index"]]:
        """Parameter to True where a row (or column) of it is frozen."""
        found = {}
        for name, own in self.parts.items():
            mask = torch.zeros(len(own.index) + len(own.others), dtype=torch.bool)
            mask[own.index] = True
            found[name] = mask
        return found

    def data(self) -> dict[str, Any]:
        """As plain data: frozen.json."""
        return {
            "addresses": list(self.addresses),
            "names": list(self.names),
            "regex": self.pattern,
            "parts": {name: {"dim": own.dim, "frozen": str(own)} for name, own in self.parts.items()},
            "trainers": [asdict(one) for one in self.settings],
            "peft": {
                "target_modules": self.target_modules,
                "names": list(self.targets),
                "why_not": self.no_targets,
            },
        }

    def save(self, out: Path | str) -> None:
        """Write frozen.json, freeze_hook.py and, where parts of tensors are frozen, masks.safetensors; all or none.

        Raises:
            FrankenlensError: `out` cannot be written to.
        """
        with publishing(out) as staging:
            text = json.dumps(self.data(), indent=1) + "\n"
            (staging / FILES[0]).write_text(text, encoding="utf-8")
            if self.parts:
                save_file(self.masks(), staging / FILES[1])
            hook = (files("interp.freezing") / "freeze_hook.py.j2").read_text(encoding="utf-8")
            (staging / FILES[2]).write_text(hook, encoding="utf-8")


def frozen_names(
    model: PreTrainedModel, addresses: str | Address | Iterable[str | Address], processor: Any = None
) -> FrozenNames:
    """What freezing addresses means in names of parameters, and in the settings of other trainers.

    Args:
        model: as trainers load it; on the meta device too, since weights are not looked at.
        addresses: what is to be frozen.
        processor: as in `freeze`.

    Raises:
        FrankenlensError: no address, one that names nothing, or all weights are named.
    """
    given = [addresses] if isinstance(addresses, str | Address) else list(addresses)
    if not given:
        raise FrankenlensError("freezing needs at least one address, such as 'blocks.0-9'")
    anatomy = unopened_anatomy(model, processor)
    rows = owned_rows(model, anatomy, given)
    every = [name for name, _ in model.named_parameters()]
    whole = [name for name in every if name in rows and rows[name] is None]
    if len(whole) == len(every):
        raise FrankenlensError(f"with {', '.join(map(str, given))} frozen nothing is left to train")
    parts = {name: own for name in every if (own := rows.get(name)) is not None}
    config: Any = model.config
    named = Named(every, whole, list(parts), config.model_type, len(anatomy.text.blocks))
    try:
        targets, why = target_names(model, given, processor), ""
    except FrankenlensError as error:
        targets, why = [], str(error)
    matched = pattern_of(targets, (name for name, _ in model.named_modules())) if targets else ""
    pattern = pattern_of(whole, every) if whole else ""
    settings = settings_of_trainers(named)
    named_so = (tuple(map(str, given)), tuple(whole), pattern, parts, settings)
    return FrozenNames(*named_so, tuple(targets), matched, why)
