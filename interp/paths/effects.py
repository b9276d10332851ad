"""Path patching: what of a component's effect goes to which later component, by its queries, keys, values or input.

Sender s has the value a in the recipient's clean run and a' in the donor's (another model on the same prompts, the
same model on other prompts, or both). A receiver r is a head's q, a kv_head's k or v, an MLP's input, or the logits.

*Direct effect* of s -> r (Goldowsky-Dill et al. 2304.05969; Wang et al. 2211.00593): r's input is the clean residual
stream with a' - a added, at the tokens `where`; the receiver's pre-norm is computed again on that stream, scale
included; everything else between s and r stays at its clean value. r's output is computed again, and for the logits
read, for others put into a run in which all that follows is computed again. Between s and r nothing passes the change
on but the residual stream (`between="frozen"`); with "mlps", as in Wang et al., the MLPs on the way are computed again
as well, and are no receivers.

*Whole effect* of s: an ordinary patch, all computed again. *Interaction*: whole - sum of the direct effects of all of
s's paths. It is not small in general: norms, softmax and gates are not linear. In order, the paths add up to the whole
exactly: see `paths_in_order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import HookedVLM
from hooks.address import Address
from hooks.batches import in_parts
from interp.metrics.reading import Metric, Reading
from interp.paths.job import Job, complete_senders, paths_between
from interp.paths.path import Between, Path, Receiver, require_paths
from interp.paths.run import PathRun
from interp.prompts import Prompt
from interp.questions.examples import cluster_of
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit
from interp.sweep.places import Where, where_label


@torch.no_grad()
def path_effects(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    paths: Sequence[str | Path],
    *,
    donor: HookedVLM | None = None,
    donor_prompts: Sequence[Prompt] | None = None,
    where: Where = "all",
    between: Between = "frozen",
    control: bool = True,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Direct effects of paths, whole effects of their senders, and what they do not add up to.

    Args:
        recipient: the opened model that is patched.
        prompts: what it reads.
        metric: one number per prompt; see `interp.metrics`.
        paths: as `Path.parse` reads them, each once.
        donor: where senders' values come from; by default the recipient (then give `donor_prompts`).
        donor_prompts: what the donor reads, row by row with the same roles and image sizes; by default `prompts`.
        where: tokens at which senders are changed: a role, "decision" (the tokens that the metric reads), "all", a
            token's number, or a function of the batch.
        between: "frozen", or "mlps": see the module.
        control: also take the donor's change (value minus the recipient's) on another example with the same roles.
        batch_size: prompts a forward.
        progress: show a bar.

    Returns:
        Variables, in the metric's units: direct [path example], whole [sender example] (patched - clean), interaction
        [sender example] (whole - sum of direct effects; NaN for a sender not all of whose paths are given, or one
        that has chains among them), direct_other and whole_other (the control; NaN for an example without another
        like it), recipient and donor [example] (clean). Coordinates path_sender, receiver, via, layer on path,
        complete on sender.

    Raises:
        FrankenlensError: a path that the model does not have, a prompt that has no such token or does not line up
            with the donor's; names the row, before anything runs.
    """
    wanted = [Path.parse(path) for path in paths]
    require_paths(recipient, wanted, between)
    job = Job(recipient, prompts, metric, wanted, donor, donor_prompts, where, between)
    senders = list(dict.fromkeys(path.sender for path in wanted))
    kinds = ("", "_other") if control else ("",)
    found = {
        name + kind: np.full((len(things), len(prompts)), np.nan)
        for kind in kinds
        for name, things in (("direct", wanted), ("whole", senders))
    }
    ends = np.full((2, len(prompts)), np.nan)
    parts = list(job.batches(batch_size, others=control))
    total = len(parts) * len(kinds) * (len(wanted) + len(senders))
    with tqdm(total=total, desc="paths", unit="run", disable=not progress, delay=1) as bar:

        def measure(rows: Sequence[int]) -> None:
            """Fills in these rows."""
            run, select = job.start(rows, others="_other" in kinds), metric.select(rows)
            run.check(wanted)
            cells = _cells(run, wanted, senders, kinds)
            sweep = BatchSweep(
                recipient, run.rows.batch, Reading([select], run.rows.batch), [(cell.edit,) for cell in cells]
            )
            clean = sweep.clean[0].double()
            with recipient.exclusive("paths"):  # one use, however many runs
                for at, values in sweep.run(range(len(cells))):
                    cell = cells[at]
                    change = (values[0].double() - clean).masked_fill(~cell.rows.to(clean.device), torch.nan)
                    found[cell.variable][cell.index, rows] = change.cpu().numpy()
                    bar.update()
            ends[0, rows], ends[1, rows] = clean.cpu().numpy(), run.donor.metric

        for part in parts:
            list(in_parts(part, len(part), measure))
        bar.total = bar.n  # without a control in a batch whose examples are all unlike
    return _dataset(recipient, wanted, senders, found, ends, prompts, metric, where_label(where), between)


def path_map(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    *,
    senders: Sequence[str | Address] | None = None,
    receivers: Sequence[str | Receiver] | None = None,
    between: Between = "frozen",
    **settings,
) -> xr.Dataset:
    """`path_effects` of all paths from some senders, to some receivers, or both.

    Args:
        recipient, prompts, metric: as in `path_effects`.
        senders: addresses, ranges included; None: the embedding and every head and MLP before a receiver.
        receivers: None: every head's q, kv_head's k and v, MLP and the logits downstream of a sender.
        between: as in `path_effects`.
        settings: the others of `path_effects`.

    Raises:
        FrankenlensError: as `path_effects`; or no sender lies before a receiver.
    """
    paths = paths_between(recipient, senders, receivers, between)
    return path_effects(recipient, prompts, metric, paths, between=between, **settings)


@dataclass(frozen=True)
class _Cell:
    """One run: where its value goes, what is edited, and the examples that it means something for."""

    variable: str
    index: int
    edit: Edit
    rows: Bool[Tensor, " batch"]


def _cells(
    run: PathRun, paths: Sequence[Path], senders: Sequence[Address], kinds: Sequence[str]
) -> list[_Cell]:
    cells = []
    for kind in kinds:
        other = kind == "_other"
        usable = run.rows.partnered if other else torch.ones_like(run.rows.partnered)
        if not usable.any():
            continue
        cells += [_Cell("whole" + kind, i, run.whole(s, other), usable) for i, s in enumerate(senders)]
        cells += [_Cell("direct" + kind, i, run.edit(p, other), usable) for i, p in enumerate(paths)]
    return cells


def _dataset(
    vlm: HookedVLM,
    paths: Sequence[Path],
    senders: Sequence[Address],
    found: dict[str, Float[np.ndarray, "thing example"]],
    ends: Float[np.ndarray, "2 example"],
    prompts: Sequence[Prompt],
    metric: Metric,
    where: str,
    between: str,
) -> xr.Dataset:
    complete = np.array(complete_senders(vlm, paths, senders, between))  # type: ignore[arg-type]
    of = np.array([senders.index(path.sender) for path in paths])
    sums = np.stack([found["direct"][of == i].sum(0) for i in range(len(senders))])
    variables = found | {"interaction": np.where(complete[:, None], found["whole"] - sums, np.nan)}
    units = {"units": metric.units}
    last = [path.receiver for path in paths]
    return xr.Dataset(
        {
            **{
                name: (("path" if name.startswith("direct") else "sender", "example"), values, units)
                for name, values in variables.items()
            },
            "recipient": ("example", ends[0], units),
            "donor": ("example", ends[1], units),
        },
        coords={
            "path": list(map(str, paths)),
            "sender": list(map(str, senders)),
            "example": [prompt.example.id for prompt in prompts],
            "cluster": ("example", [cluster_of(prompt.example) for prompt in prompts]),
            "path_sender": ("path", [str(path.sender) for path in paths]),
            "receiver": ("path", list(map(str, last))),
            "via": ("path", [r.via if r.address is not None else "logits" for r in last]),
            "layer": ("path", [vlm.n_layers if r.layer is None else r.layer for r in last]),
            "complete": ("sender", complete),
        },
        attrs={
            "metric": metric.name, "units": metric.units, "where": where, "between": between,
            "n_layers": vlm.n_layers,
        },
    )  # fmt: skip
