"""A model as its configuration says it is, without weights, and what a sweep may take for granted in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy.rebuilt import rebuilt
from hooks.errors import one_line
from hooks.loading import auto_class
from hooks.processors import load_processor
from hooks.selfcheck import opening_inputs
from hooks.stored.layouts import places
from hooks.unopened import is_read_off
from interp.metrics import LogitDifference
from interp.metrics.reading import Reading
from interp.prompts import Prompt, collate
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit


class Weightless(HookedVLM):
    """A model on the meta device, with all points of its structure; it is planned with and never run.

    Attributes:
        on: type of the device that it is planned for.
    """

    on: str = "cpu"

    @property
    def device(self) -> torch.device:
        """The device that it is planned for."""
        return torch.device(self.on)


def weightless(path_or_id: str | Path, dtype: str | torch.dtype = "auto", on: str = "cpu") -> Weightless:
    """The model of a checkpoint, or of a folder with nothing but `config.json`; no weight is read.

    Args:
        path_or_id: folder or repository id; with a processor, if there is one.
        dtype: of the weights; "auto": the configuration's own, float32 where it has none.
        on: type of the device that is planned for, "cpu" or "cuda".

    Raises:
        FrankenlensError: no configuration, or one whose parts are not found.
    """
    try:
        settings, words = places(path_or_id)
        config = AutoConfig.from_pretrained(settings)
        kind = auto_class(config)
        own = getattr(config, "dtype", None) if dtype == "auto" else dtype
        own = getattr(torch, own) if isinstance(own, str) else own
        with torch.device("meta"):
            model = kind.from_config(config, dtype=own or torch.float32)
    except FrankenlensError:
        raise
    except Exception as error:
        raise FrankenlensError(
            f"{path_or_id}: no model is made of its configuration: {one_line(error)}"
        ) from error
    return of_model(model, _processor(words), on)


def of_model(model: Any, processor: Any = None, on: str = "cpu") -> Weightless:
    """The same of a model that is on the meta device already."""
    vlm = Weightless(model.eval(), processor, check=False)
    vlm.on = on
    return vlm


def without_weights(vlm: HookedVLM, on: str = "cpu") -> Weightless:
    """An opened model's like on the meta device, with the anatomy and the points that were found for it."""
    with torch.device("meta"):
        model = type(vlm.model)._from_config(vlm.model.config, dtype=vlm.model.dtype)
    found = of_model(model, vlm.processor, on)
    found.anatomy, found.hook_points, found.absent = vlm.anatomy, dict(vlm.hook_points), dict(vlm.absent)
    found.opening = vlm.opening
    return found


def at_tokens(vlm: HookedVLM) -> bool:
    """Whether a sweep can take this kind of model up at a token: tried on a small prompt and weights that cost nothing.

    A type whose module tree says it all is known to; another runs a few times, seconds for 7B.
    """
    if is_read_off(vlm.model.config):
        return True
    other = rebuilt(type(vlm.model), vlm.model.config)
    inputs = vlm.opening or opening_inputs(other, vlm.processor)
    opened = HookedVLM(other, vlm.processor, inputs=inputs, check=False)
    prompt = Prompt.from_inputs(inputs, image_token_id=opened.image_token_id)
    batch = collate([prompt])
    metric = LogitDifference(torch.tensor([1]), torch.tensor([2]))
    point = opened.hook_points["blocks.0.hook_resid_pre"]
    edit = Edit(point, lambda activation, span: activation, batch.mask("decision"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swept = BatchSweep(opened, batch, Reading([metric], batch), [[edit]])
    opened.close()
    return swept.shortcuts == "tokens and layers"


def _processor(path_or_id: str | Path) -> Any:
    try:
        return load_processor(path_or_id)
    except FrankenlensError:  # counts of tokens can be stated
        return None
