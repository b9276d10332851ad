"""Freezing: components, named by address, that no optimizer step of any trainer can change.

A whole tensor gets no gradient: `requires_grad` is off, and trainers leave it out of the optimizer. A head, a kv
head or a neuron shares its tensors with units that do train: its rows or columns of the gradient are set to 0 before
anything reads them (clipping, accumulation, all-reduce), and after every optimizer step their values are put back bit
for bit, which undoes weight decay and momentum. What writes outside a step, as schedule-free optimizers do, is undone
or refused by name (`interp.freezing.guard`). Source: the necessity experiment of 2602.12395 (whole layers only).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hooks import Address, FrankenlensError, HookedVLM, weight_slices
from hooks.anatomy import Anatomy
from hooks.unopened import unopened_anatomy
from interp.freezing.fingerprint import Fingerprint
from interp.freezing.guard import Guard
from interp.freezing.refusals import (
    adapter_message,
    adapter_of,
    launched_sharded,
    require_in_memory,
    require_trainable_left,
    sharded,
    sharded_message,
)
from interp.freezing.rows import AXES, Rows, rows_of, trained_part


class Frozen:
    """Components of a model that keep every bit while the rest is trained; what `freeze` returns.

    It acts until `release` is called or its `with` block ends, whoever trains: no argument of the trainer, optimizer or
    scheduler changes, and the optimizer may be made before or after. What writes frozen weights outside a step is
    undone before they are used or saved, or refused by name where a whole tensor was written (`FrankenlensError`, of
    the forward, `state_dict` or the optimizer's call).

    Attributes:
        model: the user's model.
        addresses: what is frozen.
        n_frozen, n_trained: numbers of weights.
    """

    def __init__(self, model: nn.Module, addresses: tuple[str, ...], rows: Mapping[str, Rows | None]) -> None:
        """Freeze; `rows` maps a parameter's name to its frozen rows, None for all of it. Use `freeze`."""
        self.model, self.addresses = model, addresses
        self._rows = dict(rows)
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._trainable = {name: p.requires_grad for name, p in self._parameters.items()}
        self._before = {
            name: Fingerprint.of(trained_part(p, rows.get(name)))
            for name, p in tqdm(self._parameters.items(), desc="fingerprints", unit="tensor", delay=1)
        }
        sizes = {name: self._size(name) for name in rows}
        self.n_frozen = sum(sizes.values())
        self.n_trained = sum(p.numel() for p in self._parameters.values() if p.requires_grad)
        self.n_trained -= sum(size for name, size in sizes.items() if self._trainable[name])
        self._had_gradient: dict[tuple[str, bool], Bool[Tensor, ""]] = {}  # (name, of the frozen part)
        self._stepped = False
        self._guard = Guard({name: self._parameters[name] for name in rows}, rows, self._before)
        self._handles: list[Any] = []
        try:
            self._attach()
        except BaseException:
            self.release()
            raise

    @property
    def released(self) -> bool:
        """Whether the components may be trained again."""
        return not self._handles

    def release(self) -> None:
        """Let the components be trained again: every hook is taken away and `requires_grad` is as it was."""
        if self._handles:  # rows that were written since are themselves again
            self._guard.keep([name for name, own in self._rows.items() if own is not None], "")
        while self._handles:
            self._handles.pop().remove()
        for name in self._rows:
            self._parameters[name].requires_grad_(self._trainable[name])

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.released else "on"
        return f"Frozen({', '.join(self.addresses)}; {self.n_frozen:,} weights, {state})"

    def report(self, trained: nn.Module | None = None) -> pd.DataFrame:
        """What training changed, bit for bit, since `freeze`.

        Of a model that was cast in between (`.to(torch.bfloat16)`, `.half()`, `.float()`) the weights are compared with
        what the cast makes of those at `freeze`: a change below its precision cannot be seen then.

        Args:
            trained: where the trained weights are, if not in the model itself: sharded training leaves them in a
                checkpoint, which is to be loaded for this.

        Returns:
            One row per tensor (two where only rows of it are frozen): tensor, part, weights, frozen, identical, and
            gradient: whether it had a non-zero one at any optimizer step (None where no step was seen). A frozen part
            should be identical, and any other part with a gradient should not be: one that is got an update below its
            precision, or a learning rate of 0.

        Raises:
            FrankenlensError: the model is sharded, or `trained` lacks a tensor.
        """
        now = dict((self.model if trained is None else trained).named_parameters())
        rows = []
        for name, shape in self._shapes.items():
            if name not in now or tuple(now[name].shape) != shape or sharded(now[name]):
                raise FrankenlensError(
                    f"{name} is not there in its shape {shape}: the model is sharded or wrapped. Save it, load the "
                    "checkpoint, and ask for report(trained=that model)."
                )
            own, tensor = self._rows.get(name), now[name]
            part, size, frozen = "all", tensor.numel(), name in self._rows
            if own is not None:
                same = own.are_cast_to(tensor)
                rows.append((name, str(own), own.kept.numel(), True, same, self._gradient_seen(name, True)))
                part, size, frozen = f"other {AXES[own.dim]}", size - own.kept.numel(), False
            same = self._before[name].fits(trained_part(tensor, own))
            rows.append((name, part, size, frozen, same, self._gradient_seen(name, frozen)))
        columns = ["tensor", "part", "weights", "frozen", "identical", "gradient"]
        return pd.DataFrame(rows, columns=columns)

    def _gradient_seen(self, name: str, frozen: bool) -> bool | None:
        return bool(self._had_gradient.get((name, frozen), False)) if self._stepped else None

    def _size(self, name: str) -> int:
        own = self._rows[name]
        return self._parameters[name].numel() if own is None else own.kept.numel()

    def _attach(self) -> None:
        for name, own in self._rows.items():
            parameter = self._parameters[name]
            if not parameter.is_floating_point():
                continue  # quantized: no gradient reaches it
            parameter.requires_grad_(True)  # a tensor that takes no gradient takes no hook either
            self._handles.append(parameter.register_hook(self._gradient_hook(own)))
            parameter.requires_grad_(own is not None and self._trainable[name])
            if parameter.grad is not None:
                parameter.grad = None if own is None else own.zeroed(parameter.grad)
        self._handles += self._guard.attach(self.model)
        me = weakref.ref(self)  # the parameters' own hooks keep this object for as long as they live

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (frozen := me()) is not None:
                frozen._before_step(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (frozen := me()) is not None:
                frozen._after_step(optimizer)

        for handle in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
            self._handles.append(handle)
            weakref.finalize(self, handle.remove)

    def _gradient_hook(self, own: Rows | None):
        def hook(gradient: Tensor, _keeps_alive: Frozen = self) -> Tensor:
            return torch.zeros_like(gradient) if own is None else own.zeroed(gradient)

        return hook

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        self._require_unwrapped()
        if (swaps := self._guard.watch_swaps(optimizer)) is not None:
            self._handles.append(swaps)
        held = _held_by(optimizer)
        for name, parameter in self._parameters.items():
            if id(parameter) not in held:
                continue
            self._stepped = True
            if parameter.grad is None:
                continue
            gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            own = self._rows.get(name)
            if own is not None:
                self._note(name, True, own.of(gradient).any())
            self._note(name, name in self._rows and own is None, gradient.any())
            if name in self._rows and own is None:
                parameter.grad = None  # optimizers pass by what has none, decay and momentum included

    def _note(self, name: str, frozen: bool, new: Bool[Tensor, ""]) -> None:
        seen = self._had_gradient.get((name, frozen))
        self._had_gradient[name, frozen] = new if seen is None else seen | new

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        self._guard.keep_held_by(optimizer, f"{type(optimizer).__name__}.step()")

    def _require_unwrapped(self) -> None:
        """Refuses, before anything moves, a model that was wrapped or sharded after it was frozen."""
        if adapter := adapter_of(self.model):
            raise FrankenlensError(adapter_message(adapter))
        for name, own in self._rows.items():
            if own is None:
                continue
            parameter = self._parameters[name]
            replaced = _parameter_at(self.model, name) is not parameter
            if replaced or tuple(parameter.shape) != self._shapes[name] or sharded(parameter):
                raise FrankenlensError(sharded_message(name, str(own)))


def freeze(
    model: nn.Module | HookedVLM, addresses: str | Address | Iterable[str | Address], processor: Any = None
) -> Frozen:
    """Freeze components for any training that follows, until the returned object is released.

    Whole tensors and single heads, kv heads and neurons alike stay bit-identical under every optimizer of
    `torch.optim` (and what derives from it), gradient clipping, accumulation and checkpointing, mixed precision and
    data-parallel training. Where the parameters are sharded (DeepSpeed, FSDP), whole tensors can be frozen and single
    units cannot; that is refused. `embed` is the unembedding too where the two are tied; the keys and values that
    heads share are `kv_head`.

    Args:
        model: a Hugging Face model, or one that is opened; without adapters.
        addresses: one or several, ranges too, e.g. `["blocks.0-9", "blocks.17.attn.head.3"]`; they may overlap.
        processor: of a model that is not opened, to see its vision tower by (of common families it is not needed).

    Raises:
        FrankenlensError: no address, one that names nothing, nothing left to train, an adapter, weights that are not
            in memory, or single units of a sharded model. The model is then as it was.

    Example:
        with freeze(model, "blocks.0-9") as frozen:
            GRPOTrainer(model, ...).train()
        frozen.report()
    """
    given = [addresses] if isinstance(addresses, str | Address) else list(addresses)
    rows = frozen_rows(model, given, processor)
    bare = model.model if isinstance(model, HookedVLM) else model
    return Frozen(bare, tuple(str(address) for address in given), rows)


def frozen_rows(
    model: nn.Module | HookedVLM, addresses: Sequence[str | Address], processor: Any = None
) -> dict[str, Rows | None]:
    """What `freeze` would freeze: a parameter's name to its frozen rows, None for all of it. Changes nothing.

    Raises:
        FrankenlensError: as `freeze`.
    """
    bare = model.model if isinstance(model, HookedVLM) else model
    if adapter := adapter_of(bare):
        raise FrankenlensError(adapter_message(adapter))
    if not addresses:
        raise FrankenlensError("freezing needs at least one address, such as 'blocks.0-9'")
    if not isinstance(bare, PreTrainedModel):
        raise FrankenlensError(
            f"freezing takes a Hugging Face model or a HookedVLM, not a {type(bare).__name__}; freeze before wrapping"
        )
    anatomy = model.anatomy if isinstance(model, HookedVLM) else unopened_anatomy(bare, processor)
    named = dict(bare.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in bare.named_parameters()}
    require_in_memory(named)
    rows = owned_rows(bare, anatomy, addresses)
    require_trainable_left(named, first, rows, addresses)
    partial = next((name for name, own in rows.items() if own is not None), None)
    if partial is not None and (sharded(named[partial]) or launched_sharded()):
        raise FrankenlensError(sharded_message(partial, str(rows[partial])))
    return rows


def owned_rows(
    model: nn.Module, anatomy: Anatomy, addresses: Sequence[str | Address]
) -> dict[str, Rows | None]:
    """A parameter's name to its rows that addresses own, None for all of it; a tied one by its first name.

    Raises:
        FrankenlensError: an address names nothing.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    places: dict[str, list[tuple[int | None, range]]] = defaultdict(list)
    for address in addresses:
        for piece in weight_slices(model, anatomy, address):
            name = first[id(named[piece.parameter])]
            places[name].append((piece.dim, range(piece.start, piece.start + piece.length)))
    return {name: rows_of(named[name], some) for name, some in places.items()}


def n_frozen(vlm: HookedVLM, addresses: Sequence[str | Address]) -> int:
    """How many weights `freeze` would freeze; none where there are no addresses."""
    if not addresses:
        return 0
    named = dict(vlm.model.named_parameters())
    rows = frozen_rows(vlm, addresses)
    return sum(named[name].numel() if own is None else own.kept.numel() for name, own in rows.items())


def _parameter_at(model: nn.Module, name: str) -> Any:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _held_by(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
