"""RL in the memory of IN: the entries in which their checkpoints differ, read from RL's files part by part.

RL is a second module whose weights have IN's memory (`hooks.resident`), so that the pair takes IN's size and that of
the changes: a bfloat16 pair of which a share s differs takes (1 + 1/16 + s) / 2 of two models. Nothing is rounded, and
RL's checkpoint is never whole in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.exclusive import exclusive_of
from hooks.processors import load_processor
from hooks.resident import Change, Comparing, Turns, as_bits, piece_size, pieces_of
from hooks.stored.checkpoint import Checkpoint
from interp.pair.agreement import Difference, entering, model_differences

SHOWN = 5  # differences that a refusal lists

_OF_LOADING = ("dtype", "device_map", "check", "inputs", "processor", "settings")
"""How a model may be opened that has another in its memory: whatever else changes what is loaded."""


@dataclass(frozen=True)
class InMemoryOf:
    """A model that was opened in another's memory.

    Attributes:
        vlm: it.
        turns: what the two share.
        differences: what its settings spell otherwise.
    """

    vlm: HookedVLM
    turns: Turns
    differences: list[Difference]


def open_in_memory_of(in_: HookedVLM, path: str | Path, **loading: Any) -> InMemoryOf:
    """RL, opened in IN's memory.

    Arguments:
        in_: IN, in memory as a whole.
        path: folder of RL's safetensors.
        loading: what IN was loaded with.

    Raises:
        FrankenlensError: RL is no folder, or another kind of model; its configuration, shapes, types or ties are not
            IN's; IN is offloaded, quantized or spread in a way that has no memory of its own.
    """
    folder = _folder(path)
    _require_whole(in_.model)
    if other := sorted(set(loading) - set(_OF_LOADING)):
        raise FrankenlensError(f"a pair with one model in memory is not opened with {', '.join(other)}.")
    if exclusive_of(in_.model).shares_memory:
        raise FrankenlensError("another model is open in IN's memory already: close that pair first.")
    checkpoint = Checkpoint(folder, loading.get("settings"))
    with in_.exclusive("opening another model in its memory"):
        config: Any = AutoConfig.from_pretrained(checkpoint.layout.settings, local_files_only=True)
        if loading.get("dtype", "auto") == "auto":
            _require_type(in_.model, config, checkpoint)
        model, spelled = _second(in_, checkpoint, config)
        turns = Turns(in_.model, model, dict(_changes(in_.model, model, checkpoint)))
    processor = loading.get("processor", "auto")
    own = load_processor(checkpoint.layout.processor) if isinstance(processor, str) else processor
    rl = HookedVLM(model, own, inputs=loading.get("inputs"), check=loading.get("check", True))
    return InMemoryOf(rl, turns, spelled)


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FrankenlensError(
            f"{path} is no folder: with one model in memory, RL is read from its files, part by part; download it "
            "first (hf download), and give its folder."
        )
    return Path(path)


def _require_whole(model: PreTrainedModel) -> None:
    for name, one in model.named_parameters():
        if one.is_meta:
            raise FrankenlensError(
                f"{name} of IN is offloaded; with one model in memory, that one is there as a whole: give it devices "
                "that hold it, or open two models."
            )
        if type(one) is not nn.Parameter or type(one.data) is not Tensor or not one.is_floating_point():
            raise FrankenlensError(
                f"{name} of IN is packed ({type(one.data).__name__}, {one.dtype}); open a pair with one model in "
                "memory without quantization."
            )
        if not one.is_contiguous():
            raise FrankenlensError(
                f"{name} of IN does not lie in memory entry by entry; open two models instead."
            )


def _require_type(model: PreTrainedModel, config: Any, checkpoint: Checkpoint) -> None:
    """Each model's own type is the same: its configuration's, or that of its first weight."""
    own = config.dtype or next(iter(checkpoint.tensors.values())).dtype
    if own != model.dtype:
        raise FrankenlensError(
            f"IN is {model.dtype}, and {checkpoint.folder} is {own}: they share no memory as they are; give one dtype "
            "for both."
        )


def _second(in_: HookedVLM, checkpoint: Checkpoint, config: Any) -> tuple[PreTrainedModel, list[Difference]]:
    """A module like IN's, with parameters of its own that have IN's memory; and what its settings spell otherwise."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(one.data, requires_grad=one.requires_grad) for one in in_.model.parameters()
    }
    model: PreTrainedModel = copy.deepcopy(in_.model, memo)
    own, folder = model.config, checkpoint.folder
    if type(config) is not type(own):
        raise FrankenlensError(
            f"IN and RL are no pair: IN is a {own.model_type}, and {folder} a {config.model_type}."
        )
    config.dtype, model.config = own.dtype, config
    found = model_differences(in_.model, model, in_.opening)
    differences = [one for one in found if one.name.rpartition(".")[2] != "dtype"]
    if found := entering(differences):
        lines = "\n  ".join(map(str, found[:SHOWN]))
        raise FrankenlensError(
            f"IN and RL differ in (IN's and RL's):\n  {lines}\nWith one model in memory, both compute with IN's "
            "settings: open two models to accept a difference."
        )
    model.config = own  # of which the modules have their parts
    model.name_or_path = own._name_or_path = str(folder)
    there = checkpoint.layout.settings
    if (there / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(there, local_files_only=True)
    else:  # as transformers makes it
        model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), differences


def _changes(
    in_: nn.Module, rl: nn.Module, checkpoint: Checkpoint
) -> Iterator[tuple[str, list[Change | None]]]:
    """Name to what differs in each piece of a weight; buffers that differ are written to RL's own."""
    parameters, state = dict(in_.named_parameters()), rl.state_dict(keep_vars=True)
    first = {id(one): name for name, one in parameters.items()}
    of = {name: first[id(one)] for name, one in in_.named_parameters(remove_duplicate=False)}
    seen: set[str] = set()
    for name in (*checkpoint.tensors, *checkpoint.counters):
        own = of.get(name)
        if own is None:
            _write(state[name], checkpoint, name)
        elif own not in seen:
            seen.add(own)
            yield own, list(_of_tensor(parameters[own], checkpoint, name))
    if left := sorted(set(parameters) - seen):
        raise FrankenlensError(f"{checkpoint.folder} has no {left[0]}, which IN has.")


def _of_tensor(weight: nn.Parameter, checkpoint: Checkpoint, name: str) -> Iterator[Change | None]:
    theirs = checkpoint.parts(name, piece_size(weight.device))
    pieces = list(pieces_of(as_bits(weight)))
    compared = Comparing(as_bits(weight)[: piece_size(weight.device)])
    for own, other in zip(pieces, theirs, strict=True):
        yield compared(own, as_bits(other.to(weight.device, weight.dtype)))


def _write(buffer: Tensor, checkpoint: Checkpoint, name: str) -> None:
    flat, first = buffer.detach().view(-1), 0
    for part in checkpoint.parts(name):
        flat[first : first + len(part)] = part.to(flat)
        first += len(part)
