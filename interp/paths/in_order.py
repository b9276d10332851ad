"""All paths of a component together, receivers recomputed in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.address import Address
from hooks.batches import in_parts
from hooks.engine import HookContext
from interp.metrics.reading import Metric, Reading
from interp.paths.job import Job, complete_senders
from interp.paths.path import Path, Receiver, require_paths
from interp.paths.run import PathRun
from interp.prompts import Prompt
from interp.sweep.places import Where, where_label


@torch.no_grad()
def paths_in_order(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    paths: Sequence[str | Path],
    *,
    donor: HookedVLM | None = None,
    donor_prompts: Sequence[Prompt] | None = None,
    where: Where = "all",
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """All paths of each sender together: their receivers recomputed in order, all else at its clean value.

    Each receiver's input is the clean stream plus the sender's change plus what the receivers before it made of it;
    the logits see the sender's change only where "-> logits" is among the paths. With every path of a sender
    (`paths_between`) this is the sender's whole effect, to rounding.

    Args:
        recipient, prompts, metric, donor, donor_prompts, where, batch_size, progress: as in `path_effects`.
        paths: direct ones; grouped by sender.

    Returns:
        Variable in_order [sender example] (patched - clean, in the metric's units); coordinate complete.

    Raises:
        FrankenlensError: as `path_effects`; a chain.
    """
    wanted = [Path.parse(path) for path in paths]
    require_paths(recipient, wanted)
    for row, path in enumerate(wanted):
        if path.through:
            raise FrankenlensError(f"path {row} ({path}) is a chain; in order go direct paths only.")
    job = Job(recipient, prompts, metric, wanted, donor, donor_prompts, where, "frozen")
    senders = list(dict.fromkeys(path.sender for path in wanted))
    found = np.full((len(senders), len(prompts)), np.nan)
    parts = list(job.batches(batch_size, in_order=True))
    with tqdm(total=len(parts) * len(senders), desc="in order", disable=not progress, delay=1) as bar:

        def measure(rows: Sequence[int]) -> None:
            """Fills in these rows."""
            run = job.start(rows, in_order=True)
            read = Reading([metric.select(rows)], run.rows.batch)
            clean = read(run.clean.logits)[0].double()
            for at, sender in enumerate(senders):
                receivers = [path.receiver for path in wanted if path.sender == sender]
                values = read(run.clean.rerun(_InOrder(run, sender, receivers).hooks()))[0]
                found[at, rows] = (values.double() - clean).cpu().numpy()
                bar.update()

        for part in parts:
            list(in_parts(part, len(part), measure))
    return xr.Dataset(
        {"in_order": (("sender", "example"), found, {"units": metric.units})},
        coords={
            "sender": list(map(str, senders)),
            "example": [prompt.example.id for prompt in prompts],
            "complete": ("sender", complete_senders(recipient, wanted, senders, "frozen")),
        },
        attrs={"metric": metric.name, "units": metric.units, "where": where_label(where)},
    )


class _InOrder:
    """Hooks that recompute a set of receivers, in order, and hold everything else at its clean value."""

    def __init__(self, run: PathRun, sender: Address, receivers: Sequence[Receiver]) -> None:
        self._run, self._receivers = run, receivers
        self._change = run.sent(sender)
        self._sent = self._change if Receiver() in receivers else torch.zeros_like(self._change)
        self._made = torch.zeros_like(self._change)

    def hooks(self) -> list[tuple[str, Any]]:
        vlm, found = self._run.vlm, []
        layers = sorted({r.layer for r in self._receivers if r.layer is not None})
        for layer in layers:
            here = [r for r in self._receivers if r.layer == layer]
            block = f"blocks.{layer}"
            if any(r.via != "in" for r in here):
                for letter in "qkv":
                    chosen = [r.index for r in here if r.via == letter]
                    found.append((f"{block}.attn.hook_{letter}", self._write(layer, letter, chosen)))
                found.append((f"{block}.hook_attn_out", self._note(f"{block}.hook_attn_out")))
            if any(r.via == "in" for r in here):
                found.append((f"{block}.hook_mlp_out", self._mlp(layer)))
        found.append((f"blocks.{vlm.n_layers - 1}.hook_resid_post", self._end()))
        return found

    def _write(self, layer: int, letter: str, chosen: Sequence[int | None]) -> Any:
        def write(activation: Tensor, hook: HookContext) -> Tensor:
            run = self._run
            change = self._change + self._made
            new = run.project(layer, letter, run.stream(layer, "pre", torch.zeros_like(change)))
            if chosen:
                changed = run.project(layer, letter, run.stream(layer, "pre", change))
                new[:, :, chosen] = changed[:, :, chosen]
            return new.to(activation)

        return write

    def _note(self, name: str) -> Any:
        def note(activation: Tensor, hook: HookContext) -> None:
            clean = self._run.clean.cache[name].to(self._made.dtype)
            self._made = self._made + (activation.to(self._made.dtype) - clean).to(self._made.device)

        return note

    def _mlp(self, layer: int) -> Any:
        def write(activation: Tensor, hook: HookContext) -> Tensor:
            run, change = self._run, self._change + self._made
            new = run.mlp(layer, run.stream(layer, "mid", change))
            clean = run.clean.cache[f"blocks.{layer}.hook_mlp_out"].to(change.dtype)
            self._made = self._made + (new.to(change.dtype) - clean).to(change.device)
            return new.to(activation)

        return write

    def _end(self) -> Any:
        def write(activation: Tensor, hook: HookContext) -> Tensor:
            clean = self._run.clean.cache[hook.name]
            return (clean.to(self._made.dtype) + self._made + self._sent).to(activation)

        return write
