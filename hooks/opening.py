"""What a model is taken for before it is proved: what one of its structure was, or its type is, or what is seen of it.

A model that is watched from nothing runs ten times. One of the same structure as one that was proved in this process
(the RL checkpoint beside IN, the same model again) is taken to have its anatomy, and one of a type whose module tree
says it all is taken at its word. That must then hold on its own weights, in one run with gradients, or it is watched.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks.anatomy import Anatomy, find_anatomy
from hooks.anatomy.by_names import declared_anatomy
from hooks.anatomy.observed import require_all_blocks
from hooks.anatomy.structure import structure_of
from hooks.anatomy.watching import has_pixels
from hooks.errors import FrankenlensError, one_line
from hooks.points import HookPoint, hook_point_table, unknown_points
from hooks.processors import is_visual
from hooks.selfcheck import undisturbed
from hooks.unopened import is_read_off


@dataclass(frozen=True)
class Taken:
    """What a model is taken for.

    Attributes:
        anatomy: where its parts are.
        points: the points of its structure.
        absent: those that its structure does not have, with the reason.
        proved: whether they were proved on a model of this structure.
    """

    anatomy: Anatomy
    points: Mapping[str, HookPoint]
    absent: Mapping[str, str]
    proved: bool = False


def as_table(anatomy: Anatomy) -> Taken:
    """Every point of an anatomy, before any is looked at."""
    return Taken(anatomy, hook_point_table(anatomy), unknown_points(anatomy))


class Structures:
    """What was proved in this process, by structure; the last few, because a key names every module."""

    def __init__(self, most: int = 16) -> None:
        self._known: OrderedDict[Hashable, Taken] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def get(self, key: Hashable | None) -> Taken | None:
        """What a model of this structure is; None if none was proved."""
        with self._lock:
            if key is None or key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def keep(self, key: Hashable | None, taken: Taken) -> None:
        """Note down what was proved."""
        if key is not None:
            with self._lock:
                self._known[key] = taken
                self._known.move_to_end(key)
                while len(self._known) > self._most:
                    self._known.popitem(last=False)

    def forget(self) -> None:
        """Let go of all of it: every model is then watched anew."""
        with self._lock:
            self._known.clear()


STRUCTURES = Structures()


def structure_key(model: nn.Module, inputs: Mapping[str, Any], image_token_id: int | None) -> Hashable | None:
    """The key under which a model's structure is kept."""
    ids = inputs.get("input_ids")
    image = image_token_id is not None and isinstance(ids, Tensor) and bool((ids == image_token_id).any())
    return structure_of(model, inputs, image)


def taken_for(model: PreTrainedModel, inputs: Mapping[str, Any], key: Hashable | None) -> Taken | None:
    """What a model is taken for without being watched; None where nothing is known.

    Args:
        model: the model.
        inputs: processor tensors; a type is taken at its word only with an image, since it says nothing of what runs
            without one, and only where every module is as transformers has it.
        key: its structure.
    """
    if (known := STRUCTURES.get(key)) is not None:
        return known
    if key is None or not has_pixels(inputs) or not is_read_off(model.config) or not _is_unchanged(model):
        return None
    try:
        return as_table(declared_anatomy(model))
    except (AttributeError, KeyError, TypeError, ValueError):  # not built as its type is
        return None


def _is_unchanged(model: nn.Module) -> bool:
    """Whether a model is made of modules of transformers and PyTorch alone, so that its type says what they do."""
    return all(
        type(module).__module__.startswith(("transformers.", "torch.nn.")) for module in model.modules()
    )


def watched(model: PreTrainedModel, inputs: Mapping[str, Any], token: int | None) -> Anatomy:
    """The anatomy as it is seen, with one clear error whatever happens inside the model.

    Raises:
        FrankenlensError: the model does not run on the prompt, or has no stream.
    """
    try:
        with undisturbed(model):
            found = find_anatomy(model, inputs, token)
        if is_visual(model.config) and not has_pixels(inputs):
            require_all_blocks(model, found)
        return found
    except FrankenlensError:
        raise
    except Exception as error:
        raise FrankenlensError(
            f"{type(model).__name__} does not run on the prompt that it is opened with ({', '.join(inputs)}): "
            f"{type(error).__name__}: {one_line(error)} Give processor tensors of your own: "
            "HookedVLM(model, processor, inputs=...)."
        ) from error


def weightless(model: PreTrainedModel) -> bool:
    """Whether all weights are on the meta device, and accelerate does not bring them when they are used."""
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and all(weight.is_meta for weight in model.parameters())


def on_device(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs where the model takes them."""
    device = device_of(model)
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: a model's embedding, if it says where that is."""
    try:
        own = module.get_input_embeddings() if isinstance(module, PreTrainedModel) else module
        weight = next(own.parameters())
    except (NotImplementedError, AttributeError, StopIteration):  # transformers does not know where they are
        own, weight = module, next(module.parameters())
    # of accelerate, if offloaded
    execution = getattr(getattr(own, "_hf_hook", None), "execution_device", None)
    return weight.device if execution is None else torch.device(execution)
