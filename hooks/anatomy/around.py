"""What stands around the towers: embeddings and their entry, projector, DeepStack, final norm and unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks.anatomy.beside import Beside
from hooks.anatomy.towers import Stack, is_linear
from hooks.anatomy.watching import Call


@dataclass(frozen=True)
class Readout:
    """From the last stream to the logits: logits = softcap * tanh(scale * unembed(norm(stream)) / softcap)."""

    final_norm: str
    unembed: str
    softcap: float | None
    scale: float


def readout(
    model: nn.Module,
    logits: Float[Tensor, "batch pos vocab"],
    last: Float[Tensor, "..."],
    calls: Sequence[Call],
) -> Readout | None:
    """The linear layer whose output are the logits, up to soft-capping and a factor, and the norm that it reads.

    Args:
        model: the model.
        logits: of the run.
        last: the stream behind the last block.
        calls: of the modules outside the towers, with copies.
    """
    for call in reversed(calls):
        out = call.out
        if out is None or not is_linear(model.get_submodule(call.path)) or out.shape[-1] < logits.shape[-1]:
            continue
        if out.numel() // out.shape[-1] != logits.numel() // logits.shape[-1]:
            continue
        out = out.reshape(*logits.shape[:-1], out.shape[-1])[..., : logits.shape[-1]]
        after = _after(out, logits)
        if after is None or call.given is None:
            continue
        norm = _norm(calls, call.given, last)
        return Readout(norm or "", call.path, *after)
    return None


def _norm(calls: Sequence[Call], given: Tensor, last: Tensor) -> str | None:
    """The module between the last stream and the unembedding."""
    for call in reversed(calls):
        if call.out is None or call.given is None or call.out.shape != call.given.shape:
            continue
        if _same(call.out, given) and _same(call.given, last):
            return call.path
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and bool(torch.equal(a.reshape(b.shape), b.to(a.dtype)))


def _after(out: Tensor, logits: Tensor) -> tuple[float | None, float] | None:
    """(softcap, scale) that make logits of the unembedding's output; None where neither does."""
    said = (
        logits > torch.finfo(logits.dtype).min
    )  # words that a model never says are set to the lowest number
    if torch.equal(out.to(logits.dtype)[said], logits[said]):
        return None, 1.0
    out, logits = out.double(), logits.double()
    eps = 16 * torch.finfo(torch.float32).eps
    scale = float((out * logits).sum() / (out * out).sum())
    if float((out * scale - logits).abs().max()) <= eps * float(logits.abs().max()):
        return None, scale
    return _capped(out, logits)


def _capped(out: Tensor, logits: Tensor) -> tuple[float, float] | None:
    """(softcap, scale): at the right cap, what undoes it is the same multiple of a large and of a small output."""
    top = float(logits.abs().max())
    large, small = ((logits.abs() - share * top).abs().argmin() for share in (0.9, 0.2))

    def multiple(cap: float, place: Tensor) -> float:
        return float(cap * torch.atanh(logits.flatten()[place] / cap) / out.flatten()[place])

    low, high = top * (1 + 1e-9), 1e4 * top
    for _ in range(200):
        cap = (low * high) ** 0.5
        low, high = (cap, high) if multiple(cap, large) > multiple(cap, small) else (low, cap)
    for digits in (2, 3, 4):  # as someone wrote it in a configuration
        cap = float(f"{(low * high) ** 0.5:.{digits}g}")
        scale = multiple(cap if cap > top else top * (1 + 1e-9), small)
        for factor in (1.0, float(f"{scale:.4g}"), float(f"{scale:.6g}"), scale):
            error = float((cap * torch.tanh(out * factor / cap) - logits).abs().max())
            if error <= 64 * torch.finfo(torch.float32).eps * max(top, 1e-30) * 4:
                return cap, factor
    return None


def entry(stack: Stack, first: Float[Tensor, "..."], calls: Sequence[Call]) -> Call | None:
    """Where a tower is handed its embeddings: the outermost module around its blocks that takes them as an input."""
    for call in calls:
        if (
            call.path
            and stack.within(call.path)
            and call.given is not None
            and call.given.shape == first.shape
        ):
            return call
    return None


@dataclass(frozen=True)
class Projector:
    """Where image rows come from: module, field of its output, and the module that holds the weights."""

    module: str
    key: str | None
    weights: str


def projector(
    first: Float[Tensor, "batch pos d_model"],
    image: Bool[Tensor, "batch pos"],
    words: Float[Tensor, "..."] | None,
    calls: Sequence[Call],
    towers: Sequence[Stack],
    started: int,
    pixels: Beside,
) -> tuple[Projector | None, str]:
    """The last module before a tower whose output rows are the image's in the tower's input, if possible in order.

    They may have been added to the embeddings of the placeholders instead of taking their places. A module that runs
    more than once (Ovis 2 looks other tokens up too) gives out no one tensor.

    Args:
        first: what the tower is handed.
        image: its rows that are others with other pixels.
        words: embeddings of the tokens, of the same shape.
        calls: of the modules outside the towers, with copies.
        towers: the towers before it.
        started: when it started.
        pixels: the same calls, with other pixels.

    Returns:
        The projector, and why there is none.
    """
    rows = first[image]
    index = {key: place for place, key in enumerate(_keys(rows))}
    depends = min((tower.started for tower in towers), default=-1)
    found: Projector | None = None
    in_order = False
    loose = why = ""
    for call in sorted(calls, key=lambda call: call.ended):
        if not depends < call.ended < started or call.given is None:
            continue
        for key, made in call.made.items():
            moved = pixels.made(call, key)
            if made.shape[-1] != first.shape[-1] or moved is None or not bool(moved.any()):
                continue
            hits = [index[key] for key in _keys(made) if key in index]
            if len(set(hits)) < len(index):
                if words is None or not _added(made, rows, words[image]):
                    continue
                hits = list(range(len(rows)))
            if not pixels.once(call):
                why = f"{call.path}, whose output they are, runs more than once in one forward pass"
                continue
            inside = any(tower.touches(call.path) for tower in towers)
            loose = loose if inside else call.path
            if hits == sorted(hits) or not in_order:
                in_order = hits == sorted(hits)
                found = Projector(call.path, key, call.path if not inside else loose or call.path)
    return found, why


def read_across(
    states: Float[Tensor, "..."], calls: Sequence[Call], towers: Sequence[str], pixels: Beside
) -> Projector | None:
    """The last module whose output rows are those that cross-attention makes its keys and values of.

    Args:
        states: what goes into a projection of keys.
        calls: of the modules outside the towers, with copies.
        towers: the modules around the towers; what lies in them, or holds one, is no projector.
        pixels: the same calls, with other pixels.
    """
    for call in sorted(calls, key=lambda call: -call.ended):
        around = any(
            f"{call.path}.".startswith(f"{t}.") or f"{t}.".startswith(f"{call.path}.") for t in towers
        )
        for key, made in call.made.items() if not around and call.path and pixels.once(call) else ():
            moved = pixels.made(call, key)
            alike = made.numel() == states.numel() and made.shape[-1] == states.shape[-1]
            if not alike or made.dtype != states.dtype or moved is None or not bool(moved.any()):
                continue
            if bool(torch.equal(made.reshape(states.shape), states)):
                return Projector(call.path, key, call.path)
    return None


def _added(made: Tensor, rows: Float[Tensor, "row d"], words: Float[Tensor, "row d"]) -> bool:
    """Whether rows are these words' embeddings plus what a module made."""
    flat = made.reshape(-1, made.shape[-1])
    return flat.shape == rows.shape and bool(torch.equal(words + flat.to(words), rows))


def _keys(rows: Float[Tensor, "... d"]) -> list[bytes]:
    flat = rows.reshape(-1, rows.shape[-1]).cpu()
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in flat]


def deepstack(
    streams: Sequence[tuple[Float[Tensor, "..."], Float[Tensor, "..."]]], calls: Sequence[Call]
) -> dict[int, str]:
    """Blocks behind which something is added to the stream, and the module whose output it is.

    Args:
        streams: (before, after) of every block of the decoder.
        calls: of the modules outside the towers, with copies.

    Returns:
        Layer to module path; "" where no module's output is what is added.
    """
    found: dict[int, str] = {}
    for layer, ((_, after), (before, _)) in enumerate(pairwise(streams)):
        if after.shape != before.shape:
            found[layer] = ""
        elif not torch.equal(after, before):
            moved = (after != before).any(-1)
            makers = [call.path for call in calls if _adds(call, after[moved], before[moved])]
            found[layer] = min(makers, key=lambda path: path.count("."), default="")
    return found


def _adds(call: Call, after: Float[Tensor, "row d"], before: Float[Tensor, "row d"]) -> bool:
    out = call.out
    if out is None or out.shape[-1] != after.shape[-1]:
        return False
    rows = out.reshape(-1, out.shape[-1])
    return len(rows) == len(after) and bool(torch.equal(after + rows.to(after), before))


def embedding(model: Any) -> str:
    """The embedding layer's path: as the model itself names it."""
    names = {module: name for name, module in model.named_modules()}
    try:
        return names.get(model.get_input_embeddings(), "")
    except NotImplementedError:  # transformers does not know where they are
        return ""
