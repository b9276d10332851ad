"""IN and RL through the same lens: how far apart each layer's prediction is, and where the answer appears and stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.shared import shared
from interp.decision import Change, changed_weights
from interp.lens.logit_lens import along, log_probabilities, require_top_k
from interp.lens.streams import Streams, groups, joined, read_streams, resolve_layers
from interp.lens.tokens import Tokens, Where, tokens_of
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.statistics import distributions

Nulls = Mapping[str, tuple[HookedVLM, Change]]


def compare_lenses(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    where: Where = "all",
    top_k: int = 10,
    nulls: Nulls | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Per token and layer, how far RL's prediction lies from IN's on the same tokens, each by its own unembedding.

    Args:
        pair: IN and RL.
        prompts: what both read.
        layers, where: as in `logit_lens`.
        top_k: size of the sets that overlap.
        nulls: models that learnt nothing, as `interp.decision.null_changes` returns them; each is compared with what
            the model was before its change.
        batch_size: prompts a forward.
        progress: show bars.

    Returns:
        Along comparison ("rl", and one per null), layer, token: kl, KL(after || before), and kl_reverse,
        KL(before || after), in nats; overlap, the share of the top k that both have; same_top, whether the likeliest
        token is one.

    Raises:
        FrankenlensError: as in `logit_lens`.
    """
    tokens = tokens_of(prompts, where)
    wanted = resolve_layers(layers, pair.in_.n_layers)
    require_top_k(top_k, pair.in_)
    reading = (wanted, batch_size, progress)
    own: dict[tuple[tuple[int, int], str], Streams] = {}  # of the prompts that are compared

    def streams(rows: tuple[int, int], model: str) -> Streams:
        if (rows, model) not in own:
            for other in [key for key in own if key[0] != rows]:
                del own[other]
            own[rows, model] = read_streams(pair.models[model], tokens.of_prompts(*rows), *reading)
        return own[rows, model]

    def compared(one: tuple[tuple[int, int], str]) -> xr.Dataset:
        rows, name = one
        if name == "rl":
            return _apart(streams(rows, "in"), streams(rows, "rl"), wanted, top_k, progress)
        vlm, change = (nulls or {})[name]
        before = streams(rows, "rl" if vlm is pair.rl else "in")
        after = changed_streams(vlm, change, tokens.of_prompts(*rows), *reading)
        return _apart(before, after, wanted, top_k, progress)

    n_kept = (3 if nulls else 2) * len({*wanted, pair.in_.n_layers})
    parts = groups(tokens, pair.in_, n_kept, batch_size)
    names = ["rl", *(nulls or {})]
    units = [(rows, name) for rows in parts for name in names]
    found = dict(shared("apart", units, compared, near=lambda unit: unit[0]))
    own.clear()
    each = (along("comparison", {name: found[rows, name] for name in names}) for rows in parts)
    whole = joined(tokens, list(each))
    whole.attrs = {"top_k": top_k, "units": "nats", "n_layers": pair.in_.n_layers}
    return whole


def changed_streams(
    vlm: HookedVLM, change: Change, tokens: Tokens, layers: Sequence[int], batch_size: int, progress: bool
) -> Streams:
    """The streams of a model under changed weights, with a copy of its head as it was then."""
    with changed_weights(vlm.model, change):
        streams = read_streams(vlm, tokens, layers, batch_size, progress)
        return Streams(streams.head.snapshot(), tokens, streams.values, streams.n_layers)


@torch.no_grad()
def _apart(before: Streams, after: Streams, layers: Sequence[int], top_k: int, progress: bool) -> xr.Dataset:
    shape = (len(layers), len(before.tokens))
    kl, reverse, overlap = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    same = np.zeros(shape, dtype=bool)
    for some in tqdm(list(before.chunks()), desc="compare", disable=not progress, delay=1):
        for at, layer in enumerate(layers):
            old, new = (log_probabilities(side, layer, some)[1] for side in (before, after))
            new = new.to(old.device)
            kl[at, some], reverse[at, some] = (
                distributions.kl(new, old).cpu(),
                distributions.kl(old, new).cpu(),
            )
            best = [side.topk(top_k, dim=-1).indices for side in (old, new)]
            both = (best[0][:, :, None] == best[1][:, None, :]).any(-1)
            overlap[at, some] = both.double().mean(-1).cpu()
            same[at, some] = (old.argmax(-1) == new.argmax(-1)).cpu()
    cells = ("layer", "token")
    variables = {"kl": kl, "kl_reverse": reverse, "overlap": overlap, "same_top": same}
    coords = {"layer": list(layers)} | before.tokens.coordinates()
    return xr.Dataset({name: (cells, values) for name, values in variables.items()}, coords=coords)


def answer_layers(lens: xr.Dataset) -> xr.Dataset:
    """The layer at which the model's own next token is first the likeliest, and from which on it stays so.

    Args:
        lens: what `logit_lens` returns, its last layer included; one model or both.

    Returns:
        appears and stays [model, token], in layers of the lens (n_layers: in the output alone); the coordinates of
        the lens, and the answer as `word`.

    Raises:
        FrankenlensError: the lens lacks the last layer, so that nothing shows whether the answer stays.
    """
    layers = lens["layer"].to_numpy()
    if lens.attrs["n_layers"] not in layers:
        raise FrankenlensError(
            f"answer_layers needs the last layer, {lens.attrs['n_layers']}; the lens holds {layers.tolist()}. Call "
            "logit_lens(..., layers=None)."
        )
    top = (lens["token_id"].isel(rank=0) == lens["final_id"]).transpose("layer", ...)
    appears, stays = first_and_lasting(top.to_numpy())
    rest = top.dims[1:]
    return xr.Dataset(
        {
            "appears": (rest, layers[appears]),
            "stays": (rest, layers[stays]),
            "word": lens["final_word"],
        },
        attrs={"units": "layer", "n_layers": lens.attrs["n_layers"]},
    )


def first_and_lasting(top: Bool[np.ndarray, "layer *rest"]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first layer that is True, and of the first from which all are; True in the last layer."""
    lasting = np.flip(np.cumprod(np.flip(top, 0), axis=0), 0).astype(bool)
    return top.argmax(0), lasting.argmax(0)
