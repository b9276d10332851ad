"""Residual streams of one model at some tokens: what every lens reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import budget, fitting, forward_bytes, in_parts, item_bytes, require_batch_size
from hooks.engine import HookContext
from hooks.memory import NOT_WORTH_ASKING, limit
from hooks.uninterrupted import registered
from hooks.vlm import FwdHooks
from interp.lens.head import OutputHead, head_of, verify
from interp.lens.tokens import Tokens
from interp.prompts import Prompt, PromptBatch, collate

BATCHES = 4
"""Of prompts whose streams exist at once, at most."""
CHUNK = 2**26
"""Logits that exist at one time, 256 MB in float32."""
Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Streams:
    """The residual stream before each block, and after the last one, at some tokens.

    They take layers x tokens x d_model numbers; logits are made of a few tokens at a time.

    Attributes:
        head: the model's own way to logits, proved on these runs.
        tokens: which tokens.
        values: layer → stream; layer l < n_layers is what block l reads (DeepStack additions included), layer n_layers
            what the final norm reads.
        n_layers: decoder blocks of the model.
    """

    head: OutputHead
    tokens: Tokens
    values: dict[int, Float[Tensor, "token d_model"]]
    n_layers: int

    @property
    def final(self) -> Float[Tensor, "token d_model"]:
        """After the last block."""
        return self.values[self.n_layers]

    def chunks(self) -> Iterator[slice]:
        """Runs of tokens whose logits exist together."""
        vocab: Any = self.head.unembed.weight
        size = max(1, CHUNK // vocab.shape[0])
        return (slice(first, first + size) for first in range(0, len(self.tokens), size))


def resolve_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """Layers 0 to n_layers, ascending; None is all, negative counts from the last.

    Raises:
        FrankenlensError: there is no such layer, or none is given.
    """
    wanted = range(n_layers + 1) if layers is None else [int(layer) for layer in layers]
    for layer in wanted:
        if not -n_layers - 1 <= layer <= n_layers:
            raise FrankenlensError(
                f"there is no layer {layer}: 0 is the stream before the first block, {n_layers} the one after the last "
                f"of the {n_layers} blocks."
            )
    if not wanted:
        raise FrankenlensError(f"layers is empty; give some of 0 to {n_layers}, or None for all.")
    return sorted({layer % (n_layers + 1) for layer in wanted})


def stream_name(layer: int, n_layers: int) -> str:
    """The hook point of a layer's residual stream."""
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{layer - 1}.hook_resid_post"


def groups(tokens: Tokens, vlm: HookedVLM, n_kept: int, batch_size: int) -> list[tuple[int, int]]:
    """Prompts in a row, from the first up to the last, whose streams exist at once: in half of the memory there is.

    They are no more than `BATCHES`, so that several processes find something to do; prompts of like length among them
    run together.

    Args:
        tokens: of all prompts, in their order.
        vlm: whose memory counts.
        n_kept: streams of each token, of all models that are read together.
        batch_size: prompts a forward.

    Raises:
        FrankenlensError: `batch_size` is below 1.
    """
    require_batch_size(batch_size)
    most = BATCHES * batch_size
    each = torch.bincount(tokens.row, minlength=len(tokens.prompts)) * n_kept * vlm.d_model * item_bytes(vlm)
    total = int(each.sum())
    free = None if total < NOT_WORTH_ASKING and limit() is None else budget(vlm)
    room = total if free is None else free // 2
    ends, taken = [0], 0
    for row, size in enumerate(each.tolist()):
        if row - ends[-1] == most or (taken and taken + size > room):
            ends.append(row)
            taken = 0
        taken += size
    return list(pairwise([*ends, len(tokens.prompts)]))


def joined(tokens: Tokens, parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """What was found of each of the `groups`, along all tokens."""
    if len(parts) == 1:
        return parts[0]
    whole = xr.concat(list(parts), "token", coords="minimal", compat="override", join="override")
    return whole.assign_coords(tokens.coordinates())


@torch.no_grad()
def read_streams(
    vlm: HookedVLM,
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Streams:
    """Run the model and keep its residual streams at the tokens; the last one always.

    Raises:
        FrankenlensError: no such layer; or the lens of the last stream is not, bit for bit, the model's own logits.
    """
    n = vlm.n_layers
    wanted = sorted({*resolve_layers(layers, n), n})
    values: dict[int, Tensor] = {}
    head = None
    names = {stream_name(layer, n): layer for layer in wanted}

    def run(some: Some) -> tuple[dict[str, Tensor], OutputHead]:
        return run_at(vlm, some.batch.to(vlm.device), some.rows, some.columns, list(names))

    held = len(tokens) * len(names) * vlm.d_model * item_bytes(vlm)
    size = rows_fitting(vlm, tokens, len(names), batch_size, held)
    for index, (kept, own) in in_batches(tokens, size, "lens", progress, run):
        head = own
        for name, layer in names.items():
            part = kept[name].to(vlm.device)
            if layer not in values:
                values[layer] = part.new_empty(len(tokens), part.shape[-1])
            values[layer][index.to(vlm.device)] = part
    assert head is not None
    return Streams(head, tokens, values, n)


@dataclass(frozen=True, eq=False)
class Some:
    """Prompts that run together, and tokens of them.

    Attributes:
        index: which of all tokens these are.
        batch: the prompts, on the CPU.
        rows, columns: where each of the tokens stands in the batch.
    """

    index: Int[Tensor, " some"]
    batch: PromptBatch
    rows: Int[Tensor, " some"]
    columns: Int[Tensor, " some"]

    @classmethod
    def of(cls, tokens: Tokens, chosen: Sequence[int]) -> Some:
        """Some of the prompts, by number."""
        place = torch.full((len(tokens.prompts),), -1)
        place[list(chosen)] = torch.arange(len(chosen))
        index = (place[tokens.row] >= 0).nonzero().flatten()
        batch = collate([tokens.prompts[row] for row in chosen])  # right padding: a column is a position
        return cls(index, batch, place[tokens.row[index]], tokens.position[index])


def in_batches(
    tokens: Tokens, size: int, label: str, progress: bool, run: Callable[[Some], Found]
) -> Iterator[tuple[Int[Tensor, " some"], Found]]:
    """(Which tokens, what `run` gives for them), prompts of like length together; fewer where memory runs out."""

    def measure(chosen: Sequence[int]) -> tuple[Int[Tensor, " some"], Found]:
        some = Some.of(tokens, chosen)
        return some.index, run(some)

    with tqdm(total=len(tokens.prompts), desc=label, unit="prompt", disable=not progress, delay=1) as bar:
        for chosen, found in in_parts(in_order(tokens.prompts), size, measure):
            yield found
            bar.update(len(chosen))


def rows_fitting(vlm: HookedVLM, tokens: Tokens, n_kept: int, batch_size: int, held: int = 0) -> int:
    """Prompts that run together: a forward of each, and so many streams of its tokens, beside what is held.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    width = max(map(len, tokens.prompts))
    of_row = forward_bytes(vlm, width) + (n_kept + 2) * width * vlm.d_model * item_bytes(vlm)
    whole = 3 * 4 * min(CHUNK, width * vlm.n_logits) + held
    return fitting(vlm, batch_size, of_row, "a lens", whole)


def in_order(prompts: Sequence[Prompt]) -> list[int]:
    """Rows of the prompts, such of like length together."""
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]))


def run_at(
    vlm: HookedVLM,
    batch: PromptBatch,
    rows: Int[Tensor, " some"],
    columns: Int[Tensor, " some"],
    names: Sequence[str],
    further: FwdHooks = (),
) -> tuple[dict[str, Tensor], OutputHead]:
    """One forward; the named activations at (row, column), and the head, proved on the last of these columns.

    `further` hooks run in the same forward.
    """
    vlm.require("positions", "a lens")
    vlm.require("lens", "a lens")
    kept: dict[str, Tensor] = {}
    last, whole, raw = stream_name(vlm.n_layers, vlm.n_layers), [], []

    def keep(activation: Tensor, hook: HookContext) -> None:
        device = activation.device
        kept[hook.name] = activation[rows.to(device), columns.to(device)]

    unembed = vlm.module(vlm.anatomy.unembed)
    vocab: Any = unembed.weight
    probe = columns.unique()[-max(1, CHUNK // (len(batch) * vocab.shape[0])) :].to(vlm.device)
    some = "logits_to_keep" in inspect.signature(vlm.model.forward).parameters
    see = partial(unembed.register_forward_hook, lambda module, args, output: raw.append(output.clone()))
    hooks: list[Any] = [*further, *((name, keep) for name in names)]
    hooks.append((last, lambda activation, hook: whole.append(activation.clone())))
    extra = {"logits_to_keep": probe} if some else {}
    with vlm.exclusive("a lens"), registered(see):
        output = vlm.run_with_hooks(batch.inputs, hooks, use_cache=False, **extra)
    if len(raw) != 1:
        raise FrankenlensError(
            f"{type(vlm.model).__name__} runs its unembedding {len(raw)} times in one forward pass."
        )
    head = head_of(vlm, raw[0], output.logits)
    verify(head, whole[0], probe if some else slice(None), output.logits)
    return kept, head
