"""A callback of transformers' `Trainer` (and TRL's) that logs gradient, update and changed share per component."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hooks import Address, FrankenlensError, weight_slices
from hooks.anatomy import Anatomy
from hooks.unopened import unopened_anatomy
from hooks.weights import WeightSlice, part_paths, wholes
from interp.freezing.refusals import adapter_of, sharded
from interp.results.whole import told, write_whole
from interp.training.references import Copied, Reference, Sums, on_disk, squares

COPY = "copy"
"""As `reference`: keep a copy of the watched weights in main memory."""
SHOWN = 3
_PARTS = ("attn", "cross_attn", "mixer", "mlp")


class ComponentLog(TrainerCallback):
    """Logs, of each component and at every step that the trainer logs:

    - `gradient_norm`: of the gradient that the optimizer is given: accumulated, and clipped where the trainer clips;
    - `update_norm`: |W - W_start|, Frobenius, of all entries of the component together, and `relative_norm`, that over
      |W_start|;
    - `changed`: the share of its entries whose bits are not those of W_start.

    They go into the trainer's log history and, a line per component and step, into a file of JSON lines beside the
    checkpoints (`pandas.read_json(file, lines=True)`). Reporters (wandb, TensorBoard) are called before callbacks of
    one's own; `put_first(trainer)` lets them see the numbers too. Parts that are frozen, by `fl.freeze` or
    `requires_grad`, are at 0. Of several processes the first measures.

    What it costs: no second copy of the model. W_start is read from its files again at every step that is logged, one
    tensor at a time (the time of reading the watched tensors; main memory of the largest of them); with "copy", the
    watched weights are kept in main memory in their own type (`kept_bytes`), and nothing is read.

    Args:
        addresses: components, or ranges of them that count as one: `blocks.9-18.mlp`, `blocks.3.attn.head.1`,
            `blocks.5.mlp.expert.12`, `vision`; by default the parts of every block, and what is outside of blocks.
        reference: W_start: the folder of the checkpoint that training starts from, or "copy"; by default the folder
            that the model was loaded from.
        every: steps between two measurements; by default as many as between the trainer's logs (logging_steps). Those
            of steps that the trainer does not log are in the file alone.
        file: its name in the trainer's output_dir; None writes none. Where training is resumed, rows of later steps
            than that are dropped.
        processor: the model's, where the trainer has only a tokenizer; see `unopened_anatomy`.

    Raises (as training begins, before the first step):
        FrankenlensError: an address names nothing; there is no such reference, or it is not what training starts from;
            the model is sharded (FSDP, DeepSpeed), quantized or under an adapter.

    Example:
        GRPOTrainer(model, ..., callbacks=[fl.ComponentLog(["blocks.0-9", "blocks.17.attn.head.3"])])
    """

    def __init__(
        self,
        addresses: str | Address | Iterable[str | Address] | None = None,
        reference: str | Path | None = None,
        every: int | None = None,
        file: str | None = "components.jsonl",
        processor: Any = None,
    ) -> None:
        given = [addresses] if isinstance(addresses, str | Address) else addresses
        self._addresses = None if given is None else [Address.parse(one) for one in given]
        if self._addresses is not None and not self._addresses:
            raise FrankenlensError("addresses is empty: name components, or leave it out for all parts")
        if every is not None and every < 1:
            raise FrankenlensError(f"every={every}: give at least 1")
        self._given, self._asked, self._file, self._processor = reference, every, file, processor
        self._slices: dict[str, list[WeightSlice]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._reference: Reference | None = None
        self._every, self._first_too, self._scaled = 1, False, False
        self._gradients: dict[WeightSlice, float] = {}
        self._pending: dict[str, float] = {}
        self._measured = 0
        self._path: Path | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """What is watched; empty before training begins."""
        return tuple(self._slices)

    @property
    def kept_bytes(self) -> int:
        """Main memory that the reference takes."""
        return 0 if self._reference is None else self._reference.kept_bytes

    def put_first(self, trainer: Any) -> None:
        """Let this callback be called before all others of a trainer, so that reporters are given its numbers."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the components and the reference."""
        if not state.is_world_process_zero:
            return
        model = getattr(kwargs["model"], "_orig_mod", kwargs["model"])  # of torch.compile
        _require_plain(model)
        anatomy = unopened_anatomy(model, self._processor or kwargs.get("processing_class"))
        self._find(model, anatomy)
        pieces = {piece for some in self._slices.values() for piece in some}
        self._reference = self._opened(model, pieces, state.global_step)
        if state.global_step == 0:
            self._require_start()
        self._every = self._asked or _between_logs(args, state)
        self._first_too = bool(args.logging_first_step)
        self._scaled = bool(args.fp16) and not args.max_grad_norm
        if self._scaled:
            warnings.warn(
                "gradients of fp16 are scaled where the trainer does not clip them, so their norms are left out; "
                "set max_grad_norm, or train in bf16",
                stacklevel=2,
            )
        if self._file is not None:
            self._path = Path(args.output_dir) / self._file
            _drop_later(self._path, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure gradients, of a step that will be logged."""
        if self._reference is None or not self._due(state.global_step + 1) or self._scaled:
            return
        pieces = {piece for some in self._slices.values() for piece in some}
        self._gradients = {piece: _of_gradient(piece, self._parameters[piece.parameter]) for piece in pieces}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure updates, and write the lines."""
        if self._reference is None or not self._due(state.global_step):
            return
        sums = self._reference.sums(self._parameters)
        rows = [self._row(state.global_step, address, sums) for address in self._slices]
        self._gradients, self._pending, self._measured = {}, {}, state.global_step
        for row in rows:
            for name in ("gradient_norm", "update_norm", "changed"):
                if row[name] is not None:
                    self._pending[f"{name}/{row['address']}"] = row[name]
        if self._path is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            with told(self._path):
                os.makedirs(self._path.parent, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add what was measured at this step to what is logged; what an earlier step was is in the file alone."""
        if not self._pending or state.global_step != self._measured:
            return
        if logs is not None:
            logs.update(self._pending)
        if state.log_history:
            state.log_history[-1].update(self._pending)
        self._pending = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the reference."""
        self._reference = None
        self._parameters = {}

    def _due(self, step: int) -> bool:
        return step % self._every == 0 or (step == 1 and self._first_too)

    def _find(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in model.named_parameters()}
        self._parameters = {name: named[name] for name in first.values()}
        self._slices = {}
        for address in self._addresses or _every_part(model, anatomy):
            found = weight_slices(model, anatomy, address)
            own = [
                WeightSlice(first[id(named[one.parameter])], one.dim, one.start, one.length) for one in found
            ]
            self._slices[str(address)] = list(dict.fromkeys(own))
        for name in {piece.parameter for some in self._slices.values() for piece in some}:
            parameter = self._parameters[name]
            if sharded(parameter) or parameter.is_meta or not parameter.is_floating_point():
                raise FrankenlensError(
                    f"{name} is sharded (FSDP, DeepSpeed), offloaded or quantized, so that its entries are not all "
                    "here: compare the checkpoints that training saves instead (frankenlens compare), or train on one "
                    "device or data-parallel (DDP)."
                )

    def _opened(self, model: PreTrainedModel, pieces: set[WeightSlice], step: int) -> Reference:
        if self._given == COPY:
            if step:
                raise FrankenlensError(
                    f"training is resumed at step {step}, and reference={COPY!r} would copy the weights of that step; "
                    "give the folder of the checkpoint that it started from."
                )
            return Copied(self._parameters, pieces)
        return on_disk(self._given, model, pieces)

    def _require_start(self) -> None:
        assert self._reference is not None
        sums = self._reference.sums(self._parameters)
        moved = {piece.parameter: one for piece, one in sums.items() if one.changed}
        if moved:
            name, one = next(iter(moved.items()))
            raise FrankenlensError(
                f"{self._reference}: {len(moved)} watched tensors are not those that training starts from, {name} "
                f"among them ({one.changed:,} of {one.n:,} entries). Give reference= the folder of the checkpoint that "
                f"the model was made of, or reference={COPY!r}."
            )

    def _row(self, step: int, address: str, sums: Mapping[WeightSlice, Sums]) -> dict[str, Any]:
        pieces = self._slices[address]
        n = sum(sums[piece].n for piece in pieces)
        update, before = (
            math.sqrt(sum(getattr(sums[piece], what) for piece in pieces)) for what in ("update", "before")
        )
        gradient = math.sqrt(sum(self._gradients[piece] for piece in pieces)) if self._gradients else None
        return {
            "step": step,
            "address": address,
            "n": n,
            "gradient_norm": gradient if gradient is None or math.isfinite(gradient) else None,
            "update_norm": update,
            "relative_norm": update / before if before else None,
            "changed": sum(sums[piece].changed for piece in pieces) / n,
        }


def _every_part(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    found = [name for name in wholes(model, anatomy) if "blocks" not in name]
    for prefix, tower in anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            found += [f"{prefix}blocks.{layer}.{sub}" for sub in _PARTS if part_paths(block, sub)]
    return found


@torch.no_grad()
def _of_gradient(piece: WeightSlice, parameter: nn.Parameter) -> float:
    if parameter.grad is None:
        return 0.0
    gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    return squares(piece.of(gradient))


def _require_plain(model: Any) -> None:
    if adapter := adapter_of(model):
        raise FrankenlensError(
            f"{adapter} is under an adapter: its update is in the adapter's own matrices, which training saves at "
            "every checkpoint; measure those (frankenlens compare --rl ADAPTER, fl.adapter_by_address)."
        )
    if not isinstance(model, PreTrainedModel):
        raise FrankenlensError(
            f"a {type(model).__name__} is trained, wrapped or no Hugging Face model, so that its components are not "
            "known by name; compare the checkpoints that training saves instead (frankenlens compare)."
        )


def _between_logs(args: Any, state: Any) -> int:
    strategy = str(getattr(args.logging_strategy, "value", args.logging_strategy))
    if strategy != "steps":
        raise FrankenlensError(
            f"the trainer's logging_strategy is {strategy!r}, which says no number of steps: give every="
        )
    return max(1, int(state.logging_steps or 1))


def _drop_later(path: Path, step: int) -> None:
    """Rows of steps that will be made again."""
    if not os.path.isfile(path):
        return
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())
