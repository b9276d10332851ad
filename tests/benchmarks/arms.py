"""The same interventions by four engines. Each arm is given the donor's activations and returns the metric."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.metrics.reading import Reading
from interp.prompts import collate
from interp.sweep.activations import activation_of
from interp.sweep.batch import BatchSweep
from interp.sweep.intervention import Intervention, bind
from tests.benchmarks.models import HEADS, LAYERS, TEXT, TOKENS, WIDTH, Setting, convolves

D_HEAD = WIDTH // HEADS
EVERY = 4
"""The scan over all tokens is measured at every fourth; the clean run's share of it is four times too large for us."""


@dataclass(frozen=True)
class Site:
    """One intervention: the residual stream before a layer, or a head's z, at one token or (None) at all.

    Layer -1: the input of the vision tower's first block, before which there is nothing to reuse.
    """

    layer: int
    head: int | None
    token: int | None


SCANS: dict[str, list[Site]] = {
    "layer x position, text tokens": [
        Site(layer, None, token) for layer in range(LAYERS) for token in range(TOKENS - TEXT, TOKENS)
    ],
    "layer x position, all tokens": [
        Site(layer, None, token) for layer in range(LAYERS) for token in range(0, TOKENS, EVERY)
    ],
    "layer x head, all tokens": [Site(layer, head, None) for layer in range(LAYERS) for head in range(HEADS)],
    "layer x head, decision token": [
        Site(layer, head, TOKENS - 1) for layer in range(LAYERS) for head in range(HEADS)
    ],
    "nothing to reuse": [Site(-1, None, None)] * 48,
}


def scan_sites(family: str, scan: str) -> list[Site]:
    """The sites of a scan that a family has: heads in the layers that attend."""
    return [site for site in SCANS[scan] if site.head is None or not convolves(family, site.layer)]


Donated = Mapping[str, Float[Tensor, "batch pos ..."]]
Arm = Callable[[Sequence[Site]], Float[Tensor, "site batch"]]


def donated(setting: Setting) -> dict[str, Tensor]:
    """The donor prompts' residual streams and z, handed to every arm."""
    names = [f"blocks.{i}.{leaf}" for i in range(LAYERS) for leaf in ("hook_resid_pre", "attn.hook_z")]
    names = [name for name in names if name in setting.vlm.hook_points]
    names.append(_name(Site(-1, None, None)))
    with torch.no_grad():
        return dict(setting.vlm.run_with_cache(collate(setting.donors).inputs, names, use_cache=False)[1])


def _name(site: Site) -> str:
    if site.layer < 0:
        return "vision.blocks.0.hook_resid_pre"
    return f"blocks.{site.layer}." + ("hook_resid_pre" if site.head is None else "attn.hook_z")


def _columns(site: Site) -> slice:
    return slice(None) if site.token is None else slice(site.token, site.token + 1)


def ours(setting: Setting, given: Donated) -> Arm:
    """The sweep engine, whole scan at once; its own clean run is part of the time."""

    def run(sites: Sequence[Site]) -> Tensor:
        batch, metric = collate(setting.prompts), setting.metric
        wanted = [
            Intervention(_name(s), "replace", "all" if s.token is None else s.token, s.head) for s in sites
        ]

        def activation(hook: str, index: int | None) -> Tensor:
            return activation_of(setting.vlm, given.__getitem__, hook, index)

        bound = [bind(i, setting.vlm, batch, activation, activation, {}) for i in wanted]
        sweeper = BatchSweep(
            setting.vlm, batch, Reading([metric], batch), [b.edits for b in bound], check=False
        )
        found = dict(sweeper.run(range(len(sites))))
        return torch.stack([found[n][0] for n in range(len(sites))])

    return run


def plain(setting: Setting, given: Donated) -> Arm:
    """A loop of plain PyTorch hooks."""
    batch = collate(setting.prompts)
    model, text, vision = (
        setting.vlm.model,
        setting.vlm.anatomy.text.blocks,
        setting.vlm.anatomy.vision.blocks,
    )

    def run(sites: Sequence[Site]) -> Tensor:
        found = []
        for site in sites:
            handle = _plain_hook(
                given, site, model.get_submodule, text[site.layer] if site.layer >= 0 else vision[0]
            )
            try:
                found.append(setting.metric(model(**batch.inputs, use_cache=False).logits, batch))
            finally:
                handle.remove()
        return torch.stack(found)

    return run


def _plain_hook(given: Donated, site: Site, module: Any, block: Any) -> Any:
    value, columns = given[_name(site)], _columns(site)
    if site.head is None:

        def residual(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[:, columns] = value[:, columns]  # a vision tower's [patch, d] has no token axis: all of it
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return module(block.path).register_forward_pre_hook(residual, with_kwargs=True)
    head = slice(site.head * D_HEAD, (site.head + 1) * D_HEAD)

    def z(_: Any, args: tuple) -> tuple:
        mixed = args[0].clone()
        mixed[:, columns, head] = value[:, columns, site.head]
        return (mixed, *args[1:])

    return module(block.out).register_forward_pre_hook(z)


def nnsight(setting: Setting, given: Donated) -> Arm:
    """A loop of nnsight traces."""
    from nnsight import NNsight

    batch = collate(setting.prompts)
    wrapped: Any = NNsight(copy.deepcopy(setting.vlm.model))
    layers = wrapped.model.language_model.layers

    def run(sites: Sequence[Site]) -> Tensor:
        found = []
        for site in sites:
            value, columns = given[_name(site)], _columns(site)
            with wrapped.trace(**batch.inputs, use_cache=False):
                if site.head is None:
                    layers[site.layer].input[:, columns] = value[:, columns]
                else:
                    head = slice(site.head * D_HEAD, (site.head + 1) * D_HEAD)
                    layers[site.layer].self_attn.o_proj.input[:, columns, head] = value[:, columns, site.head]
                logits = wrapped.lm_head.output.save()
            found.append(setting.metric(logits, batch))
        return torch.stack(found)

    return run


def transformer_lens(setting: Setting, given: Donated) -> Arm:
    """A loop of `run_with_hooks` on TransformerLens's bridge."""
    from transformer_lens.model_bridge.sources.transformers import boot

    batch = collate(setting.prompts)
    model = copy.deepcopy(setting.vlm.model)
    processor: Any = setting.vlm.processor
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        bridge: Any = boot(folder, hf_model=model, tokenizer=processor.tokenizer)
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")

    def run(sites: Sequence[Site]) -> Tensor:
        found = []
        for site in sites:
            value, columns = given[_name(site)], _columns(site)

            def write(activation: Tensor, hook: Any, site=site, value=value, columns=columns) -> Tensor:
                activation = activation.clone()
                if site.head is None:
                    activation[:, columns] = value[:, columns]
                elif activation.ndim == 4:
                    activation[:, columns, site.head] = value[:, columns, site.head]
                else:
                    head = slice(site.head * D_HEAD, (site.head + 1) * D_HEAD)
                    activation[:, columns, head] = value[:, columns, site.head]
                return activation

            name = f"blocks.{site.layer}." + ("hook_resid_pre" if site.head is None else "attn.hook_z")
            logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, write)], **inputs)
            found.append(setting.metric(logits, batch))
        return torch.stack(found)

    return run


IN_THE_DECODER = ("TransformerLens", "nnsight")
"""Arms that are written for sites in the decoder alone."""
ARMS = {"ours": ours, "plain hooks": plain, "TransformerLens": transformer_lens, "nnsight": nnsight}
