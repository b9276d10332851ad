"""Grafts: weights of some addresses taken from a donor, whole or in part, for a while or saved as a checkpoint.

With w the recipient's weights and d = donor - recipient, a graft writes w + c f(d) at its addresses: f is d itself
(c = 1: the donor's weights bit for bit; 0 < c < 1: linear interpolation; other c: the update scaled), its best
approximation of low rank, or a random update with the norm of either in every tensor (the control). It is worked out in
float32 and rounded once; what weights in half precision do not hold is measured, and refused (`interp.updates`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import Address, FrankenlensError, HookedVLM, WeightSlice, weight_slices
from hooks.errors import shown
from hooks.resident import here
from hooks.swapped import like, swapped
from hooks.weights import buffer_slices, require_unpacked, saved_buffers, wholes
from interp import updates
from interp.results.files import is_occupied, publishing
from interp.updates import Realized, as_large, random_update, wide_type

LARGEST = 1e30
"""Of a coefficient: what it makes of weights is no number."""
FORMS = ("delta", "low_rank", "random")
_EXACT = 2048  # up to this many rows or columns, the low-rank form is an exact SVD


@dataclass(frozen=True)
class Graft:
    """What is taken from the donor.

    Attributes:
        addresses: components (ranges too), e.g. `("blocks.0-9", "projector")`.
        coefficient: c above.
        form: f above: "delta", "low_rank" or "random".
        rank: of "low_rank", or of the update that a "random" one has the norm of (None: the whole); of a tensor of
            experts, that of each expert's matrix. Vectors (biases, norms) are taken whole.
        seed: of "random".

    Raises:
        FrankenlensError: no addresses, an unknown form, or a rank where none is meant or none where one is.

    Example:
        >>> fl.Graft(("blocks.0-9", "projector")).name
        'blocks.0-9, projector'
        >>> fl.Graft(("blocks.3",), coefficient=0.5, form="low_rank", rank=4).name
        '0.5 x rank 4 of blocks.3'
    """

    addresses: tuple[str, ...]
    coefficient: float = 1.0
    form: str = "delta"
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.addresses, (tuple, list)) or not self.addresses:
            raise FrankenlensError("a graft needs a tuple of addresses, such as ('blocks.0-9', 'projector')")
        object.__setattr__(self, "addresses", tuple(str(Address.parse(one)) for one in self.addresses))
        if self.form not in FORMS:
            raise FrankenlensError(
                f"there is no form {shown(self.form)} of a graft; choose {', '.join(FORMS)}"
            )
        c = self.coefficient
        if isinstance(c, bool) or not isinstance(c, Real) or not abs(c) < LARGEST:  # type: ignore[operator]
            raise FrankenlensError(f"coefficient={shown(c)} of a graft: give a finite number")
        for name, value in (("rank", self.rank), ("seed", self.seed)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise FrankenlensError(f"{name}={shown(value)} of a graft: give a whole number")
        if self.seed is None or not 0 <= self.seed < 2**62:
            raise FrankenlensError(f"seed={shown(self.seed)} of a graft: give a whole number from 0 on")
        if self.form == ("low_rank" if self.rank is None else "delta"):
            raise FrankenlensError(
                "rank= goes with form='low_rank' (or 'random', its control), and only with it"
            )
        if self.rank is not None and self.rank < 1:
            raise FrankenlensError(f"rank={self.rank} of form={self.form!r}: give at least 1")

    @property
    def name(self) -> str:
        """E.g. `blocks.0-9, projector`, `0.5 x blocks.3`, `rank 4 of blocks.3`, `random like blocks.3`."""
        form = "random like " if self.form == "random" else ""
        form += f"rank {self.rank} of " if self.rank is not None else ""
        factor = "" if self.coefficient == 1 else f"{self.coefficient:g} x "
        return factor + form + ", ".join(self.addresses)

    @property
    def is_copy(self) -> bool:
        """Whether the donor's weights are taken as they are."""
        return self.form == "delta" and self.coefficient == 1


def everything(vlm: HookedVLM) -> tuple[str, ...]:
    """Addresses that together name every weight of a model exactly once.

    The unembedding is left out where it is tied to the embedding.
    """
    weights = wholes(vlm.model, vlm.anatomy)
    buffers = "rest" not in weights and buffer_slices(vlm.model, vlm.anatomy, "rest")
    return (*weights, "rest") if buffers else weights


def slices_of(vlm: HookedVLM, grafts: Sequence[Graft]) -> list[tuple[Graft, list[WeightSlice]]]:
    """The weights that each graft writes.

    Raises:
        FrankenlensError: an address names nothing, or two name the same weights.
    """
    seen: dict[str, list[tuple[str, WeightSlice]]] = {}
    found = []
    for one in grafts:
        pieces = []
        for address in one.addresses:
            own = weight_slices(vlm.model, vlm.anatomy, address)
            for piece in (*own, *buffer_slices(vlm.model, vlm.anatomy, address)):
                for other, taken in seen.setdefault(piece.parameter, []):
                    if _overlap(piece, taken):
                        raise FrankenlensError(
                            f"{other!r} and {address!r} both name weights of {piece.parameter}; name each once"
                        )
                seen[piece.parameter].append((address, piece))
                pieces.append(piece)
        found.append((one, pieces))
    return found


def require_graftable(
    recipient: HookedVLM, donor: HookedVLM, grafts: Sequence[Graft]
) -> list[tuple[Graft, list[WeightSlice]]]:
    """What `slices_of` returns, once both models are known to hold every weight in the same shape, in memory.

    Raises:
        FrankenlensError: as `grafted`.
    """
    work = slices_of(recipient, grafts)
    own, theirs = _tensors(recipient), _tensors(donor)
    for graft, pieces in work:
        for vlm in (recipient, donor):
            require_unpacked(vlm.model, pieces, f"a graft of {graft.name}")
        for piece in pieces:
            _require_alike(piece.parameter, own, theirs)
    return work


def _tensors(vlm: HookedVLM) -> dict[str, Tensor]:
    return dict(vlm.model.named_parameters(remove_duplicate=False)) | saved_buffers(vlm.model)


def _overlap(a: WeightSlice, b: WeightSlice) -> bool:
    if a.dim is None or b.dim is None or a.dim != b.dim:
        return True
    return a.start < b.start + b.length and b.start < a.start + a.length


@contextmanager
def grafted(
    recipient: HookedVLM, donor: HookedVLM, grafts: Graft | Sequence[Graft], *, rounded: bool = False
) -> Iterator[HookedVLM]:
    """The recipient with grafts inside the context; its own weights, bit for bit, after it.

    No third model is made: a parameter that is taken whole has the donor's memory until somebody writes to either (copy
    on write), where PyTorch can; of the others a copy is made. Whatever is written to them inside, by a graft within
    this one too, reaches neither the donor nor what comes after. Grafts nest, and are left in the reverse order.

    Args:
        recipient, donor, grafts: whose weights go where.
        rounded: take grafts too that the recipient's type does not hold; `measured_graft` says how far.

    Raises:
        FrankenlensError: as `slices_of`; parameters of different shape; weights that are not in memory (offloaded); in
            half precision, what would be stored is not the update asked for (`interp.updates`); another thread or task
            uses the recipient. After the weights were put back: grafts that are left in another order, or in another
            thread, than they were entered.

    Example:
        >>> inputs = pair.builder.build(fl.tasks.sample("sum", 1, seed=0, split="map")[0]).inputs
        >>> before = pair.in_(inputs).logits
        >>> with fl.grafted(pair.in_, pair.rl, fl.Graft(("blocks.0-2.attn",))) as vlm:
        ...     torch.equal(vlm(inputs).logits, before)
        False
        >>> torch.equal(pair.in_(inputs).logits, before)
        True
    """
    wanted = [grafts] if isinstance(grafts, Graft) else list(grafts)
    with measured_graft(recipient, donor, wanted) as (vlm, held):
        if not rounded:
            name = "; ".join(graft.name for graft in wanted)
            held.require(f"graft {name}", vlm.model.dtype, "rounded=True")
        yield vlm


@contextmanager
def measured_graft(
    recipient: HookedVLM, donor: HookedVLM, grafts: Sequence[Graft]
) -> Iterator[tuple[HookedVLM, Realized]]:
    """As `grafted`, and what the weights hold of what was asked for, all tensors together; nothing is refused for it.

    Weights that are copied within one type are exact, and not counted.

    Raises:
        FrankenlensError: as `require_graftable`; another thread or task uses the recipient, or the context is left as
            no nested block is (`grafted`).
    """
    work, held = require_graftable(recipient, donor, grafts), [Realized()]
    with swapped(recipient.model, lambda: _values(recipient, donor, work, held), "a graft"):
        yield recipient, sum(held, Realized())


@torch.no_grad()
def _values(
    recipient: HookedVLM,
    donor: HookedVLM,
    work: Sequence[tuple[Graft, list[WeightSlice]]],
    held: list[Realized],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tensor that is written, once, and what it is to hold; what that holds of each update goes to `held`."""
    own, theirs = _tensors(recipient), _tensors(donor)
    by_tensor: dict[int, list[tuple[Graft, WeightSlice]]] = {}
    for one, pieces in work:
        for piece in pieces:
            by_tensor.setdefault(id(own[piece.parameter]), []).append((one, piece))
    for some in by_tensor.values():
        (first, piece), target = some[0], own[some[0][1].parameter]
        sources = {part.parameter: here(theirs[part.parameter]) for _, part in some}
        source = sources[piece.parameter]
        if len(some) == 1 and first.is_copy and piece.dim is None and _same_place(target, source):
            yield target, like(source)
            continue
        new = target.detach().clone()
        for one, piece in some:
            before = piece.of(target.detach())
            after, found = new_weights(before, piece.of(sources[piece.parameter]), one, _label(piece))
            piece.of(new).copy_(after)
            held.append(found)
        yield target, new


def new_weights(
    own: Float[Tensor, "*shape"], theirs: Float[Tensor, "*shape"], graft: Graft, name: str = ""
) -> tuple[Float[Tensor, "*shape"], Realized]:
    """w + c f(d) of one tensor, in its own type, and what that holds of c f(d).

    Args:
        own, theirs: the recipient's and the donor's weights.
        graft: c and f.
        name: makes random updates differ between tensors.
    """
    if graft.is_copy and theirs.dtype == own.dtype:
        return theirs, Realized()
    wide = wide_type(own, theirs)
    delta = theirs.to(own.device, wide) - own.to(wide)
    if graft.is_copy:
        new = theirs.to(own)
        return new, Realized.of(own, new, delta)
    if graft.rank is not None and delta.ndim == 2:
        delta = _low_rank(delta, graft.rank)
    elif graft.rank is not None and delta.ndim == 3:
        delta = torch.stack([_low_rank(matrix, graft.rank) for matrix in delta])
    seed = graft.seed + zlib.crc32(name.encode())
    if graft.form == "random":
        delta = random_update(delta, own.dtype, seed)
    update = graft.coefficient * delta
    random = graft.form == "random"
    new = as_large(own, update, seed) if random else updates.rounded(own, update)
    return new, Realized.of(own, new, update, directed=not random)


def save_grafted(
    recipient: HookedVLM,
    donor: HookedVLM,
    grafts: Graft | Sequence[Graft],
    folder: Path | str,
    *,
    rounded: bool = False,
) -> None:
    """Write the grafted model, with the recipient's processor, as an ordinary checkpoint: all of it, or nothing.

    `rounded` as in `grafted`.

    Raises:
        FrankenlensError: as `grafted`; the folder is not empty, another run writes to it, or the disk is full.
    """
    folder = Path(folder)
    if is_occupied(folder):
        raise FrankenlensError(f"{folder} is not empty; choose another folder for the merged checkpoint")
    with publishing(folder) as staging, grafted(recipient, donor, grafts, rounded=rounded):
        recipient.model.save_pretrained(staging)
        if recipient.processor is not None:
            recipient.processor.save_pretrained(staging)


def _label(piece: WeightSlice) -> str:
    return piece.parameter if piece.dim is None else f"{piece.parameter} {piece.start}"


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _require_alike(name: str, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if name not in theirs or theirs[name].shape != own[name].shape:
        shape = tuple(theirs[name].shape) if name in theirs else "missing"
        raise FrankenlensError(f"{name} is {tuple(own[name].shape)} in the recipient, {shape} in the donor")
    if own[name].is_meta or theirs[name].is_meta:
        raise FrankenlensError(
            f"{name} is offloaded; load both models into memory (device_map=None) to graft"
        )


def _low_rank(delta: Float[Tensor, "row column"], rank: int) -> Float[Tensor, "row column"]:
    """The nearest matrix of that rank; for large matrices by a randomized SVD with eight power iterations."""
    if min(delta.shape) <= _EXACT:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]
    u, s, v = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape), niter=8)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T
