"""Logit lens: what the model would say if each layer were its last.

The residual stream at any layer and token goes through the model's own final norm and unembedding (nostalgebraist,
"interpreting GPT: the logit lens", 2020; on visual tokens: 2410.07149), or, with a tuned lens, through an affine map of
that layer first (Belrose et al., 2303.08112).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.shared import shared
from interp.lens.streams import Streams, groups, joined, read_streams, resolve_layers
from interp.lens.tokens import Where, tokens_of, words
from interp.lens.tuned_lens import TunedLens
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.statistics import distributions

MODELS = ("in", "rl")


def logit_lens(
    model: HookedVLM | Pair,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    where: Where = "decision",
    top_k: int = 5,
    targets: Sequence[int] | None = None,
    tuned: TunedLens | Mapping[str, TunedLens] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """The next-token distribution that each layer's residual stream spells, at the chosen tokens.

    Args:
        model: one model, or a pair: then both, on the same prompts, along an axis `model`.
        prompts: what is read; a trace is part of its prompt.
        layers: 0 is the stream before the first block, l the one that block l reads (DeepStack additions included),
            n_layers the one after the last block, whose lens is the model's own output; None: all.
        where: a role, "decision" or "all"; positions in every prompt; or one list of positions for each.
        top_k: likeliest tokens that are kept.
        targets: a token for each prompt whose log-probability and rank are kept.
        tuned: a tuned lens; for a pair one for each, {"in": ..., "rl": ...}.
        batch_size: prompts a forward.
        progress: show bars.

    Returns:
        Along [model] layer, token (coordinates row, example, task, position, role, text): token_id, word, logit and
        probability of the likeliest tokens (axis rank); entropy (nats); kl, KL(output || lens) in nats; final_id, the
        model's own next token. With targets: target_logp (nats) and target_rank (0: the likeliest).

    Raises:
        FrankenlensError: no prompts, an empty role, no such layer or position, a tuned lens of another model; before
            anything runs. Or the lens of the last layer is not, bit for bit, the model's output.

    Example:
        >>> prompt = pair.builder.build(fl.tasks.sample("sum", 1, seed=0, split="map")[0])
        >>> lens = fl.logit_lens(pair, [prompt], where="decision", top_k=1, progress=False)
        >>> dict(lens["word"].sizes)
        {'model': 2, 'layer': 10, 'token': 1, 'rank': 1}
    """
    tokens = tokens_of(prompts, where)
    models = model.models if isinstance(model, Pair) else {"": model}
    models = {name: vlm for name, vlm in models.items() if name != "base"}
    for name, vlm in models.items():
        vlm.require("positions", "the logit lens")
        vlm.require("lens", "the logit lens")
        wanted = resolve_layers(layers, vlm.n_layers)
        require_top_k(top_k, vlm)
        if (lens := _lens_of(tuned, name)) is not None:
            lens.require(vlm, wanted)
    if targets is not None and len(targets) != len(prompts):
        raise FrankenlensError(
            f"{len(targets)} targets for {len(prompts)} prompts; give one token id for each prompt."
        )
    found = []
    for name, vlm in models.items():
        wanted, own = resolve_layers(layers, vlm.n_layers), _lens_of(tuned, name)

        def spelt(
            rows: tuple[int, int],
            vlm: HookedVLM = vlm,
            own: TunedLens | None = own,
            wanted: list[int] = wanted,
        ) -> xr.Dataset:
            some = tokens.of_prompts(*rows)
            aims = None if targets is None else torch.as_tensor(targets)[rows[0] + some.row]
            return spell(
                read_streams(vlm, some, layers, batch_size, progress), wanted, top_k, aims, own, progress
            )

        parts = groups(tokens, vlm, len({*wanted, vlm.n_layers}), batch_size)
        found.append(joined(tokens, [one for _, one in shared(f"lens {name}".strip(), parts, spelt)]))
    return along("model", dict(zip(models, found, strict=True))) if isinstance(model, Pair) else found[0]


def along(axis: str, parts: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Datasets side by side along a new axis, named by their keys."""
    return cast(xr.Dataset, xr.concat(list(parts.values()), pd.Index(list(parts), name=axis)))


@torch.no_grad()
def spell(
    streams: Streams,
    layers: Sequence[int],
    top_k: int,
    targets: Int[Tensor, " token"] | None = None,
    tuned: TunedLens | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """`logit_lens` of residual streams that are at hand."""
    shape = (len(layers), len(streams.tokens))
    ids = np.zeros((*shape, top_k), dtype=np.int64)
    logit, probability = np.zeros((*shape, top_k)), np.zeros((*shape, top_k))
    entropy, kl = np.zeros(shape), np.zeros(shape)
    target_logp, target_rank = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    final_id = np.zeros(shape[1], dtype=np.int64)
    for some in tqdm(list(streams.chunks()), desc="unembed", disable=not progress, delay=1):
        final = log_probabilities(streams, streams.n_layers, some)[1]
        final_id[some] = final.argmax(-1).cpu()
        for at, layer in enumerate(layers):
            logits, logp = log_probabilities(streams, layer, some, tuned)
            best = logits.topk(top_k, dim=-1)
            ids[at, some], logit[at, some] = best.indices.cpu(), best.values.cpu()
            probability[at, some] = logp.gather(-1, best.indices).exp().cpu()
            entropy[at, some] = distributions.entropy(logp).cpu()
            kl[at, some] = distributions.kl(final, logp).cpu()
            if targets is not None:
                own = logp.gather(-1, targets[some].to(logp.device)[:, None])
                target_logp[at, some] = own[:, 0].cpu()
                target_rank[at, some] = (logp > own).sum(-1).cpu()
    cells, kept = ("layer", "token"), ("layer", "token", "rank")
    variables: dict = {
        "token_id": (kept, ids),
        "word": (kept, words(streams.tokens.prompts[0], ids)),
        "logit": (kept, logit),
        "probability": (kept, probability),
        "entropy": (cells, entropy),
        "kl": (cells, kl),
        "final_id": ("token", final_id),
        "final_word": ("token", words(streams.tokens.prompts[0], final_id)),
    }
    if targets is not None:
        variables |= {"target_logp": (cells, target_logp), "target_rank": (cells, target_rank)}
    coords = {"layer": list(layers), "rank": range(top_k)} | streams.tokens.coordinates()
    lens = "logit lens" if tuned is None else "tuned lens"
    attrs = {"lens": lens, "logits": str(streams.head.after), "n_layers": streams.n_layers}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def log_probabilities(
    streams: Streams, layer: int, some: slice, tuned: TunedLens | None = None
) -> tuple[Float[Tensor, "token vocab"], Float[Tensor, "token vocab"]]:
    """Logits (float32 or wider) and log-probabilities (float64) of a layer at some tokens."""
    stream = streams.values[layer][some]
    logits = streams.head(stream if tuned is None else tuned(layer, stream))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, distributions.log_probabilities(logits)


def _lens_of(tuned: TunedLens | Mapping[str, TunedLens] | None, name: str) -> TunedLens | None:
    if tuned is None or (isinstance(tuned, TunedLens) and not name):
        return tuned if isinstance(tuned, TunedLens) else None
    if isinstance(tuned, TunedLens) or set(tuned) != set(MODELS):
        raise FrankenlensError(
            'a tuned lens belongs to one model; for a pair give tuned={"in": ..., "rl": ...}.'
        )
    return tuned[name]


def require_top_k(top_k: int, vlm: HookedVLM) -> None:
    """Refuse a number of tokens that the vocabulary does not have."""
    vocab = vlm.model.get_parameter(f"{vlm.anatomy.unembed}.weight").shape[0]
    if not 1 <= top_k <= vocab:
        raise FrankenlensError(f"top_k is {top_k}; give 1 to {vocab}, the size of the vocabulary.")
