"""The hooks that read the donor and write the recipient, while both read the same tokens in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks import HookContext, HookedVLM
from hooks.engine import HookFunction, as_added, head_results
from hooks.plain import plain_weight
from hooks.vlm import FwdHooks
from interp.lockstep.intervention import Intervention
from interp.lockstep.moved import Moved, Site, moves_logits, sites
from interp.lockstep.places import Places

Writer = Callable[[Float[Tensor, "*lead head d_head"]], Float[Tensor, "*lead d_model"]]


class Transplant(Intervention):
    """What `moved` says, as hooks of two models that may be one and the same.

    The hooks act only inside `reading` and `writing`, so that one model can be both parents.

    Args:
        donor, recipient: opened models.
        moved: what is moved.
        places: at which tokens, kept up to date by whoever runs the models.
    """

    def __init__(
        self, donor: HookedVLM, recipient: HookedVLM, moved: Sequence[Moved], places: Places
    ) -> None:
        self._moved, self._places = moved, places
        self._logits = moves_logits(moved)
        self.waits = any(one.from_divergence for one in moved)
        self._phase = ""
        self._values: dict[Site, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        reads: list[tuple[str, HookFunction]] = []
        writes: list[tuple[str, HookFunction]] = []
        z_reads: list[tuple[str, HookFunction]] = []
        for site in sites(recipient, moved):
            if site.heads:
                theirs, ours = (_written_by(vlm, site) for vlm in (donor, recipient))
                reads.append((site.z, partial(self._read, site, theirs)))
                z_reads.append((site.z, self._read_own))
                writes.append((site.hook, partial(self._write_heads, site, ours)))
            else:
                reads.append((site.hook, partial(self._read, site, None)))
                writes.append((site.hook, partial(self._write, site)))
        # a head is read as it leaves its own attention, after whatever else is written there
        self.recipient_hooks: FwdHooks = [*writes, *z_reads]
        self.donor_hooks: FwdHooks = reads

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The donor runs."""
        self._phase = "read"
        yield
        self._phase = ""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The recipient runs."""
        self._phase = "write"
        yield
        self._phase = ""

    def logits(
        self, donor: Float[Tensor, "row vocab"], recipient: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """The recipient's logits, or the donor's where the unembedding is moved."""
        for spec in self._logits:
            here = self._places.masks[spec][:, -1:].to(recipient.device)
            recipient = torch.where(here, donor.to(recipient), recipient)
        return recipient

    def keep(self) -> None:
        """Forget the values of rows that are about to leave."""
        self._values.clear()
        self._own.clear()

    def _acts(self, site: Site) -> bool:
        return not site.tokens or self._places.somewhere[site.spec]

    def _read(self, site: Site, writer: Writer | None, activation: Tensor, hook: HookContext) -> None:
        if self._phase != "read":
            return
        late = self._moved[site.spec].from_divergence  # whether it acts is known only after both have run
        if late or self._acts(site):
            seen = activation[:, -1:] if late else activation
            self._values[site] = seen.detach().clone() if writer is None else writer(seen)

    def _read_own(self, activation: Tensor, hook: HookContext) -> None:
        if self._phase == "write":
            self._own[hook.name] = activation

    def _write(self, site: Site, activation: Tensor, hook: HookContext) -> Tensor | None:
        if self._phase != "write" or not self._acts(site):
            return None
        value = self._value(site, activation)
        if site.units:
            axis = -1 if hook.point.axes[-1] == "d_mlp" else -2
            chosen = torch.zeros(activation.shape[axis], dtype=torch.bool, device=activation.device)
            chosen[list(site.units)] = True
            chosen = chosen if axis == -1 else chosen[:, None]
            value = torch.where(chosen, value, activation)
        return value if not site.tokens else self._where(site, value, activation)

    def _write_heads(
        self, site: Site, writer: Writer, activation: Tensor, hook: HookContext
    ) -> Tensor | None:
        if self._phase != "write" or not self._acts(site):
            return None
        own = writer(self._own[site.z])
        change = self._value(site, own) - own
        new = activation + change.to(activation)
        return new if not site.tokens else self._where(site, new, activation)

    def _value(self, site: Site, like: Tensor) -> Tensor:
        """The donor's value; of the last token alone where that is all that is read again."""
        value = self._values[site]
        value = value[:, -like.shape[1] :] if site.tokens else value
        return value.to(like)

    def _where(self, site: Site, new: Tensor, own: Tensor) -> Tensor:
        if self._places.everywhere[site.spec]:
            return new
        mask: Bool[Tensor, "row column"] = self._places.masks[site.spec]
        return torch.where(mask.to(own.device).reshape(*mask.shape, *[1] * (own.ndim - 2)), new, own)


def _written_by(vlm: HookedVLM, site: Site) -> Writer:
    """From z to what the site's heads together add at `hook_attn_out`, through this model's own W_O."""
    point, result = vlm.hook_points[site.z], vlm.hook_points[site.z.replace("hook_z", "hook_result")]
    out, heads = vlm.module(point.module), list(site.heads)
    own = plain_weight(out)
    if own is None:
        return lambda z: as_added(vlm.model, result, head_results(out, z)[..., heads, :].sum(-2))
    assert point.split is not None
    chosen = point.split.of(own)[:, heads].flatten(1)
    weight = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    return lambda z: as_added(
        vlm.model, result, nn.functional.linear(z[..., heads, :].flatten(-2).to(weight.dtype), weight)
    )
