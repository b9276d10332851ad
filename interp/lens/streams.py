"""Residual streams of one model at some tokens: what every lens reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import batched
from hooks.engine import HookContext
from hooks.uninterrupted import registered
from hooks.vlm import FwdHooks
from interp.lens.head import OutputHead, head_of, verify
from interp.lens.tokens import Tokens
from interp.prompts import PromptBatch, collate

CHUNK = 2**26
"""Logits that exist at one time, 256 MB in float32."""


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
    for index, batch, rows, columns in batches(tokens, batch_size, "lens", progress):
        names = {stream_name(layer, n): layer for layer in wanted}
        kept, head = run_at(vlm, batch.to(vlm.device), rows, columns, list(names))
        for name, layer in names.items():
            part = kept[name].to(vlm.device)
            if layer not in values:
                values[layer] = part.new_empty(len(tokens), part.shape[-1])
            values[layer][index.to(vlm.device)] = part
    assert head is not None
    return Streams(head, tokens, values, n)


def batches(
    tokens: Tokens, batch_size: int, label: str, progress: bool
) -> Iterator[tuple[Int[Tensor, " some"], PromptBatch, Int[Tensor, " some"], Int[Tensor, " some"]]]:
    """Prompts of like length together: (which tokens, batch, their rows, their columns)."""
    order = sorted(range(len(tokens.prompts)), key=lambda row: len(tokens.prompts[row]))
    for chosen in tqdm(batched(order, batch_size), desc=label, disable=not progress, delay=1):
        place = torch.full((len(order),), -1)
        place[chosen] = torch.arange(len(chosen))
        index = (place[tokens.row] >= 0).nonzero().flatten()
        batch = collate([tokens.prompts[row] for row in chosen])  # right padding: a column is a position
        yield index, batch, place[tokens.row[index]], tokens.position[index]


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
