"""A model run over traces that are already written: its logits for every token of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from hooks import HookedVLM
from hooks.batches import at_once, fitting, forward_bytes, in_parts, in_shared_parts, item_bytes, logits_bytes
from hooks.plain import own_parameter, plain_weight
from hooks.spilled import Spill, Spilled
from interp.metrics.logits import Logits, chunks, run_for_logits
from interp.prompts import Prompt, collate


@dataclass(frozen=True)
class Divergence:
    """A position of a trace at which another model chooses another next token.

    Attributes:
        index: which token of the trace, from 0.
        other_token: what the other model would write there.
    """

    index: int
    other_token: int


@dataclass(frozen=True, eq=False)
class StepLogits:
    """A model's logits for each token of a trace, given those before it; made when they are asked for, in float32.

    Attributes:
        source: what they are made of [step d_model], in memory or in a file; without `unembed`, they themselves.
        n_words: of the vocabulary.
        unembed: from the source to logits.
        alone: as of `Logits`.
    """

    source: Float[Tensor, "step width"] | Spilled
    n_words: int
    unembed: Callable[[Tensor], Tensor] | None
    alone: Callable[[], AbstractContextManager[None]] = nullcontext

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, steps: slice) -> Float[Tensor, "some vocab"]:
        some = self.source[steps]
        with self.alone():
            return (some if self.unembed is None else self.unembed(some)).float()

    def chunks(self) -> Iterator[slice]:
        """Steps whose logits may exist together."""
        return chunks(len(self), at_once(self.n_words, self.source.device))

    def kept(self, head: Head | None, spill: Spill) -> StepLogits:
        """The same when the model has moved on: its stream kept there, under a head that does not change."""
        unembed = None if self.unembed is None else head
        return StepLogits(spill.keep(self.source[:]), self.n_words, unembed)


class Head:
    """A copy of a model's unembedding as it is now, in memory where it is offloaded."""

    def __init__(self, vlm: HookedVLM) -> None:
        module, self._after = vlm.module(vlm.anatomy.unembed), vlm.anatomy.after_unembedding
        weight, bias = plain_weight(module), own_parameter(module, "bias")
        if weight is None:  # wrapped or packed: its own forward alone knows
            self._linear: Callable[[Tensor], Tensor] = copy.deepcopy(module).requires_grad_(False)
            self._device = next(module.parameters()).device
        elif module._forward_hooks or module._forward_pre_hooks:
            self._linear, self._device = _with_hooks(module), weight.device
        else:
            kept = weight.clone(), None if bias is None else bias.detach().clone()
            self._linear, self._device = partial(_linear, *kept), weight.device

    def __call__(self, normed: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits of what the final norm gives out."""
        with torch.no_grad():
            return self._after(self._linear(normed.to(self._device)))

    @classmethod
    def of(cls, vlm: HookedVLM) -> Head | None:
        """None where the model's readout is not known, and logits are all there is."""
        return cls(vlm) if vlm.can("lens") else None


def _with_hooks(module: nn.Module) -> nn.Module:
    """A linear map with weights of its own, and the hooks that its owner put on it."""
    copied = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, which would run the one copied from
        vars(copied).pop(name, None)
    copied._parameters = {name: _own(module, name) for name in module._parameters}
    for name in [name for name in vars(module) if name.startswith("_forward_") and "hooks" in name]:
        vars(copied)[name] = vars(module)[name].copy()
    return copied


def _own(module: nn.Module, name: str) -> nn.Parameter | None:
    there = own_parameter(module, name)
    return None if there is None else nn.Parameter(there.detach().clone(), requires_grad=False)


def _linear(
    weight: Float[Tensor, "vocab d_model"],
    bias: Float[Tensor, " vocab"] | None,
    x: Float[Tensor, "*lead d_model"],
) -> Float[Tensor, "*lead vocab"]:
    return nn.functional.linear(x, weight, bias)


def trace_logits(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int, progress: bool = False
) -> Iterator[tuple[Prompt, StepLogits]]:
    """Each trace with the logits for each of its tokens, given those before it.

    They are of the model as it is when they are made: `StepLogits.kept` keeps those of now.
    """
    if not traces:
        return
    steps = [len(trace.trace_ids) for trace in traces]

    def run(rows: Sequence[int]) -> Logits:
        batch = collate([traces[row] for row in rows], "left").to(
            vlm.device
        )  # the last columns are the traces
        end = batch.roles.shape[1] - 1
        longest = max(1, *(steps[row] for row in rows))
        return run_for_logits(vlm, batch.inputs, torch.arange(end - longest, end))

    size = _rows_at_once(vlm, traces, batch_size)
    with tqdm(total=len(traces), desc="trace", unit="trace", disable=not progress) as bar:
        for rows, logits in in_parts(range(len(traces)), size, run):
            last = logits.source.shape[1]
            for i, row in enumerate(rows):
                own = logits.source[i, last - steps[row] : last]
                yield traces[row], StepLogits(own, logits.n_words, logits.unembed, logits.alone)
            bar.update(len(rows))


def _rows_at_once(vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int) -> int:
    width, longest = max(map(len, traces)), max(len(trace.trace_ids) for trace in traces)
    of_row = forward_bytes(vlm, width) + longest * vlm.d_model * item_bytes(vlm)
    return fitting(vlm, batch_size, of_row, "reading traces", logits_bytes(vlm, longest))


def chosen_tokens(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int, progress: bool = False
) -> list[Int[Tensor, " step"]]:
    """`next_tokens` of every trace, as the model is now."""
    if not traces:
        return []

    def read(rows: Sequence[int]) -> list[list[int]]:
        some = [traces[row] for row in rows]
        return [next_tokens(trace, of).tolist() for trace, of in trace_logits(vlm, some, len(some))]

    found: list[Int[Tensor, " step"]] = []
    size = _rows_at_once(vlm, traces, batch_size)
    with tqdm(total=len(traces), desc="trace", unit="trace", disable=not progress) as bar:
        for rows, chosen in in_shared_parts("trace", range(len(traces)), size, read):
            found += [torch.tensor(own, dtype=torch.long) for own in chosen]
            bar.update(len(rows))
    return found


def next_tokens(trace: Prompt, logits: StepLogits) -> Int[Tensor, " step"]:
    """The token that greedy generation would choose at each step."""
    found = torch.empty(len(logits), dtype=torch.long)
    for some in logits.chunks():
        allowed = logits[some].clone()
        allowed[:, list(trace.builder.suppressed_ids)] = -torch.inf
        found[some] = allowed.argmax(dim=-1).cpu()
    return found


def diverging(
    trace: Prompt, writer: Int[Tensor, " step"], other: Int[Tensor, " step"]
) -> tuple[list[Divergence], int]:
    """Where the other model would not write what the trace's writer wrote.

    Positions where the writer itself, run over its trace at once, would choose another token than it did step by step
    (a tie to rounding) are left out.

    Returns:
        The divergences in order, and the number of positions left out.
    """
    stable = writer == torch.tensor(trace.trace_ids)
    places = torch.nonzero(stable & (other != writer)).flatten().tolist()
    return [Divergence(i, int(other[i])) for i in places], int((~stable).sum())
