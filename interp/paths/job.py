"""What is asked of paths: checked before anything runs, started batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.address import Address
from hooks.batches import fitting, forward_bytes, logits_bytes
from hooks.memory import point_bytes
from interp.map.component_map import batches_of
from interp.metrics import Metric
from interp.paths.path import (
    Between,
    Path,
    Receiver,
    all_senders,
    parse_sender,
    receivers_of,
    require_paths,
    senders_of,
)
from interp.paths.run import KEPT, PathRun, kept_for_paths
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.pairing import PatchBatch, beside, image_shapes, partners
from interp.sweep.batch import stored_bytes
from interp.sweep.places import Where, where_label, where_mask


class Job:
    """What is asked, checked; and how one batch of it is started."""

    def __init__(
        self,
        recipient: HookedVLM,
        prompts: Sequence[Prompt],
        metric: Metric,
        paths: Sequence[Path],
        donor: HookedVLM | None,
        donor_prompts: Sequence[Prompt] | None,
        where: Where,
        between: Between,
    ) -> None:
        if donor is None and donor_prompts is None:
            raise FrankenlensError(
                "paths need a donor: another model (donor=) or other prompts (donor_prompts=)."
            )
        if not prompts:
            raise FrankenlensError("no prompt is given, so there is nothing to patch.")
        self.recipient, self.donor = recipient, recipient if donor is None else donor
        self.prompts, self.given = prompts, prompts if donor_prompts is None else donor_prompts
        self.metric, self.paths, self.where = metric, paths, where
        self.between: Between = between
        _require_aligned(self.prompts, self.given)
        _require_tokens(self.prompts, where)

    @cached_property
    def _partner(self) -> Int[Tensor, " prompt"]:
        """Worked out for the control alone."""
        return partners(self.prompts)

    def batches(self, batch_size: int, in_order: bool = False, others: bool = False) -> Iterator[list[int]]:
        """Row numbers of the prompts that run together: as many as there is memory for.

        Raises:
            FrankenlensError: there is no memory for one prompt.
        """
        width = max(map(len, (*self.prompts, *self.given)))
        tokens = {"input_ids": torch.empty(1, width, device="meta")}
        kept = kept_for_paths(self.recipient, self.paths, self.between, in_order)
        owners = (self.donor, self.recipient)
        of_row = (1 + others) * sum(
            point_bytes(vlm, vlm.point(name), tokens)
            for vlm, names in zip(owners, kept, strict=True)
            for name in dict.fromkeys(names)
        )
        changes = 4 * (KEPT + len(self.paths)) * width * self.recipient.d_model
        of_row += changes + stored_bytes(self.recipient, width) + 2 * forward_bytes(self.recipient, width)
        size = fitting(self.recipient, batch_size, of_row, "a path", logits_bytes(self.recipient, width))
        return batches_of(self.prompts, size)

    def start(self, rows: Sequence[int], in_order: bool = False, others: bool = False) -> PathRun:
        """The clean runs of some prompts, with the donor's on their partners if asked."""
        select = self.metric.select(rows)
        batch = collate([self.prompts[row] for row in rows]).to(self.recipient.device)
        given = collate([self.given[row] for row in rows]).to(self.donor.device)
        partner = self._partner[list(rows)].to(self.recipient.device) if others else None
        ready = PatchBatch(batch, select.reads(batch), partner)
        partnered = [
            beside(some, rows, self._partner) if others else [] for some in (self.given, self.prompts)
        ]
        here = changed_tokens(self.where, batch, ready.reads)
        return PathRun(
            self.recipient,
            self.donor,
            ready,
            given,
            here,
            select,
            self.paths,
            self.between,
            in_order,
            *(collate(some) if some else None for some in partnered),
        )


def paths_between(
    vlm: HookedVLM,
    senders: Sequence[str | Address] | None = None,
    receivers: Sequence[str | Receiver] | None = None,
    between: Between = "frozen",
) -> list[Path]:
    """The paths of `path_map`.

    Raises:
        FrankenlensError: an address that the model does not have, or no sender that lies before a receiver.
    """
    given = None if senders is None else [one for name in senders for one in Address.parse(name).expand()]
    for sender in given or ():
        require_paths(vlm, [Path(parse_sender(sender), Receiver())])
    ends = None if receivers is None else [Receiver.parse(name) for name in receivers]
    if ends is None:
        froms = all_senders(vlm) if given is None else given
        found = [Path(s, r) for s in froms for r in receivers_of(vlm, s, between)]
    else:
        for end in ends:
            require_paths(vlm, [Path(Address.parse("embed"), end)], between)
        after = {end: senders_of(vlm, end) if given is None else given for end in ends}
        ordered = dict.fromkeys(s for some in after.values() for s in some)
        downstream = {sender: set(receivers_of(vlm, sender, between)) for sender in ordered}
        found = [Path(s, r) for s in ordered for r in ends if r in downstream[s]]
    if not found:
        raise FrankenlensError(
            f"none of the senders {', '.join(map(str, given or ()))} lies before any of the receivers "
            f"{', '.join(map(str, ends or ()))}; a path goes up the layers."
        )
    return found


def complete_senders(
    vlm: HookedVLM, paths: Sequence[Path], senders: Sequence[Address], between: Between
) -> list[bool]:
    """Which senders have all their direct paths given, and no chain."""
    given: dict[Address, set[Receiver]] = {sender: set() for sender in senders}
    chained = {path.sender for path in paths if path.through}
    for path in paths:
        given[path.sender].add(path.receiver)
    return [s not in chained and given[s] >= set(receivers_of(vlm, s, between)) for s in senders]


def changed_tokens(
    where: Where, batch: PromptBatch, reads: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """The tokens at which senders are changed; "decision": those that are read."""
    return (reads if where == "decision" else where_mask(where, batch)) & batch.mask("all")


def _require_aligned(prompts: Sequence[Prompt], given: Sequence[Prompt]) -> None:
    if len(prompts) != len(given):
        raise FrankenlensError(f"{len(prompts)} prompts and {len(given)} of the donor; they go in pairs.")
    for row, (own, other) in enumerate(zip(prompts, given, strict=True)):
        if own.roles != other.roles or image_shapes(own) != image_shapes(other):
            raise FrankenlensError(
                f"row {row} ({own.example.id} / {other.example.id}): {len(own)} and {len(other)} tokens, other roles, "
                "or images of other sizes; recipient's and donor's prompts must line up token by token."
            )


def _require_tokens(prompts: Sequence[Prompt], where: Where) -> None:
    if where in ("all", "decision"):
        return
    for row, prompt in enumerate(prompts):
        if not where_mask(where, collate([prompt])).any():
            raise FrankenlensError(
                f"row {row} ({prompt.example.id}) has no token where={where_label(where)}, so nothing can be changed "
                f"in it: leave it out, or choose another place (it has {', '.join(dict.fromkeys(prompt.roles))})."
            )
