"""Names under which trainers save a model that they have wrapped, and the model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from hooks.errors import FrankenlensError
from hooks.stored.entry import Entry
from hooks.stored.names import Names

INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""What FSDP, activation checkpointing and `torch.compile` put between the parts of a name."""
BEFORE = ("module", "model", "actor", "policy", "_forward_module", "base")
"""What a trainer's own module, data parallelism or DeepSpeed put before a name."""
_SHOWN = 5
_ADAPTER = re.compile(r"^base_model\.model\.|\.lora_[AB]\.|\.base_layer\.")


def is_wrapped(keys: Mapping[str, Entry]) -> bool:
    """Whether names of a plain checkpoint look like those of a wrapped model."""
    return bool(keys) and (
        any(part in INSIDE for key in keys for part in key.split("."))
        or all(key.split(".")[0] in ("module", "actor", "policy", "_forward_module") for key in keys)
    )


def unwrapped(
    stored: Mapping[str, Entry], model: PreTrainedModel, folder: Path
) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a model under names that its loader knows, and the keys that are none of its.

    What is put around a name is taken away only where all of the model's own names come of it.

    Args:
        stored: names on disk.
        model: on the meta device.
        folder: for messages.

    Raises:
        FrankenlensError: whatever is taken away, some of the model's names are not there; lists those, and what is.
    """
    inner = {_inner(key): key for key in stored}
    if len(inner) < len(stored):
        twice = next(key for key in stored if inner[_inner(key)] != key)
        raise FrankenlensError(
            f"{folder} holds {_inner(twice)} twice, as {twice} and as {inner[_inner(twice)]}."
        )
    names, best = Names(model), None
    for prefix in _prefixes(inner):
        own = {key.removeprefix(prefix): old for key, old in inner.items() if key.startswith(prefix)}
        absent, found = _absent(own, stored, names, model)
        if not absent:
            return {key: stored[own[key]] for key in found}, [
                old
                for key, old in inner.items()
                if key.removeprefix(prefix) not in found or old not in own.values()
            ]
        if best is None or len(absent) < len(best):
            best = absent
    if any(_ADAPTER.search(key) for key in stored):
        raise FrankenlensError(
            f"{folder} holds a PEFT adapter and the model under it in shards ({next(iter(stored))}): give the "
            f"adapter's own folder as RL{_adapter_beside(folder)}."
        )
    kind = type(model).__name__
    raise FrankenlensError(
        f"{folder}: {len(best or ())} weights of {kind} are not in it, whatever is taken from before their names: "
        f"{', '.join((best or [])[:_SHOWN])}. It holds {', '.join(list(stored)[:_SHOWN])} …; is it of another model, "
        "or were only some of its parts trained and saved?"
    )


def _inner(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in INSIDE)


def _prefixes(keys: Mapping[str, str]) -> Iterator[str]:
    """What may stand before all names, shortest first."""
    found = {""}
    for key in keys:
        parts = key.split(".")
        for n, part in enumerate(parts[:3]):
            if part not in BEFORE:
                break
            found.add(".".join(parts[: n + 1]) + ".")
    yield from sorted(found, key=lambda one: (len(one), one))


def _absent(
    own: Mapping[str, str], stored: Mapping[str, Entry], names: Names, model: PreTrainedModel
) -> tuple[list[str], set[str]]:
    """The model's names that none of these keys is, and the keys that are one of its."""
    wanted = model.state_dict()
    found, covered = set(), set()
    for key, old in own.items():
        try:
            name, _ = names(key, stored[old].shape)
        except FrankenlensError:  # a layout that transformers converts; told where the tensor is read
            name = key
        if name in wanted:
            found.add(key)
            covered.add(name)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    covered |= {target for target, source in ties.items() if source in covered}
    covered |= {source for target, source in ties.items() if target in covered}
    made = model._keys_to_ignore_on_load_missing or ()
    absent = [name for name in wanted if name not in covered]
    return [name for name in absent if not any(re.search(pattern, name) for pattern in made)], found


def _adapter_beside(folder: Path) -> str:
    beside = [one for one in (folder / "lora_adapter", folder / "actor" / "lora_adapter") if one.is_dir()]
    return f", {beside[0]}" if beside else " (verl and EasyR1 save it as lora_adapter/)"
