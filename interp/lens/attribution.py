"""Direct logit attribution: what each component of the decoder writes of a logit, exact in its sum.

The final norm's scale is held at what it was on the clean run, and its gain is folded into the token's direction:
a component c adds scale * head_scale * <c, gain * W_U[token]>. (Layer norms: c less its mean. Gemma: gain = 1 + weight.
head_scale: of heads that multiply or divide the logits. A soft-capped head is attributed before the cap.)
The norm's bias, if it has one, is a component of its own, like the output bias of each attention, what DeepStack adds
to image tokens between blocks, the bias of the unembedding, and the rounding of the model's own additions.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; `logit_attrs` of TransformerLens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import in_shared_parts
from hooks.engine import HookContext, head_results
from hooks.errors import nearest
from hooks.plain import matrix, own_parameter
from hooks.points import writer_points
from hooks.selfcheck import tolerance
from hooks.vlm import FwdHooks
from interp.lens.head import OutputHead, freeze
from interp.lens.logit_lens import along
from interp.lens.streams import CHUNK, Some, in_order, rows_fitting, run_at, stream_name
from interp.lens.tokens import Tokens, Where, tokens_of, words
from interp.pair.pair import Pair
from interp.prompts import Prompt, PromptBatch

TokenIds = int | Sequence[int] | Int[Tensor, " n"]


def direct_logit_attribution(
    model: HookedVLM | Pair,
    prompts: Sequence[Prompt],
    tokens: TokenIds | None = None,
    minus: TokenIds | None = None,
    *,
    where: Where = "decision",
    components: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """What every component adds to a logit, or to a difference of two.

    Args:
        model: one model, or a pair: then both, along an axis `model`.
        prompts: what is read.
        tokens: the token whose logit it is: one for all prompts or one each; None: the model's own next token.
        minus: a token whose logit is subtracted.
        where: as in `logit_lens`.
        components: addresses that are kept, e.g. "blocks.3.attn.head.1"; None: all, which add up to the logit.
        batch_size: prompts a forward.
        progress: show bars.

    Returns:
        contribution [model, component, token] in logits; logit [model, token], what the model computed (before
        soft-capping, where there is one); token_id, minus_id (-1: none). Components are addresses, with coordinates
        kind (embed, head, attn_bias, mlp, deepstack, norm_bias, unembed_bias, rounding), sublayer, layer (-1: outside
        the blocks) and head (-1: none). `grouped` adds them up.

    Raises:
        FrankenlensError: as in `logit_lens`; a component that does not exist; a token outside the vocabulary; a pair
            without `tokens`; or the components do not add up to the logit (an architecture with other parts).
    """
    places = tokens_of(prompts, where)
    models = model.models if isinstance(model, Pair) else {"": model}
    models = {name: vlm for name, vlm in models.items() if name != "base"}
    if tokens is None and (isinstance(model, Pair) or minus is not None):
        raise FrankenlensError("give `tokens`: two models, or a difference, need a token that is named.")
    vlm = next(iter(models.values()))
    for opened in models.values():
        opened.require("positions", "direct logit attribution")
        opened.require("additive blocks", "direct logit attribution")
    known = [row["component"] for row in _labels(vlm)]
    for component in components or ():
        if component not in known:
            raise FrankenlensError(f"there is no component {component!r}. {_choices(vlm, component)}")
    ids = None if tokens is None else _ids(vlm, tokens, places, "tokens")
    less = None if minus is None else _ids(vlm, minus, places, "minus")
    found = [_attribute(vlm, places, ids, less, batch_size, progress) for vlm in models.values()]
    joined = along("model", dict(zip(models, found, strict=True))) if isinstance(model, Pair) else found[0]
    return joined if components is None else joined.sel(component=list(components))


def _choices(vlm: HookedVLM, component: str) -> str:
    heads = f"heads 0-{vlm.n_heads - 1}"
    hint = nearest(component, [row["component"] for row in _labels(vlm)])
    return f"The model has blocks 0-{vlm.n_layers - 1} with {heads}. {hint}".strip()


def grouped(attribution: xr.Dataset, per: str = "sublayer") -> xr.Dataset:
    """The contributions added up: "sublayer" (embed, blocks.l.attn, blocks.l.mlp, ...), "layer" (embed, blocks.l, ...).

    Raises:
        FrankenlensError: another grouping.
    """
    if per not in ("sublayer", "layer"):
        raise FrankenlensError(f"no grouping {per!r}; choose sublayer or layer.")
    names = attribution["sublayer"].to_numpy()
    names = names if per == "sublayer" else np.array([".".join(str(n).split(".")[:2]) for n in names])
    labels = list(dict.fromkeys(names.tolist()))
    parts = [attribution["contribution"].isel(component=names == label).sum("component") for label in labels]
    return attribution.drop_dims("component").assign(
        contribution=xr.concat(parts, xr.Variable("component", labels))
    )


@torch.no_grad()
def _attribute(
    vlm: HookedVLM,
    places: Tokens,
    ids: Int[Tensor, " token"] | None,
    less: Int[Tensor, " token"] | None,
    batch_size: int,
    progress: bool,
) -> xr.Dataset:
    labels = _labels(vlm)
    contribution = np.zeros((len(labels), len(places)))
    logit, after = np.zeros(len(places)), ""
    chosen = np.zeros(len(places), dtype=np.int64) if ids is None else ids.clone().numpy()
    size = max(1, CHUNK // max(_vocabulary(vlm), vlm.n_heads * vlm.d_model))

    def run(rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
        """Of the tokens of some prompts: which they are, what is asked of them, contributions, logits; and the head."""
        given = Some.of(places, rows)
        batch, added = given.batch.to(vlm.device), {}
        deepstack = _deepstack_hooks(vlm, batch, given.rows, given.columns, added)
        kept, head = run_at(vlm, batch, given.rows, given.columns, _names(vlm), deepstack)
        asked = torch.zeros(len(given.index), dtype=torch.long) if ids is None else ids[given.index]
        written, logits = np.zeros((len(labels), len(asked))), np.zeros(len(asked))
        for some in torch.arange(len(given.index)).split(size):
            part = {name: value[some.to(value.device)] for name, value in (kept | added).items()}
            if ids is None:
                last = part[stream_name(vlm.n_layers, vlm.n_layers)].to(vlm.device)
                asked[some] = head(last).argmax(-1).cpu()
            own = asked[some], None if less is None else less[given.index[some]]
            at = some.numpy()  # NumPy takes a tensor of one element for a number
            parts, logits[at] = _one_chunk(vlm, head, part, *own)
            written[:, at] = parts.T
        return given.index.numpy(), asked.numpy(), written, logits, str(head.after)

    fits, order = rows_fitting(vlm, places, len(_names(vlm)), batch_size), in_order(places.prompts)
    with tqdm(total=len(order), desc="attribution", unit="prompt", disable=not progress, delay=1) as bar:
        for rows, (index, asked, written, logits, after) in in_shared_parts("attribution", order, fits, run):  # noqa: B007
            chosen[index], contribution[:, index], logit[index] = asked, written, logits
            bar.update(len(rows))
    coords = {name: ("component", [row[name] for row in labels]) for name in labels[0]}
    minus = np.full(len(places), -1) if less is None else less.numpy()
    return xr.Dataset(
        {
            "contribution": (("component", "token"), contribution),
            "logit": ("token", logit),
            "token_id": ("token", chosen),
            "minus_id": ("token", minus),
            "word": ("token", words(places.prompts[0], chosen)),
        },
        coords=coords | places.coordinates(),
        attrs={
            "logits": after,
            "folding": "gain of the final norm folded into W_U, scale of the clean run",
        },
    )


def _one_chunk(
    vlm: HookedVLM,
    head: OutputHead,
    kept: dict[str, Tensor],
    ids: Int[Tensor, " some"],
    less: Int[Tensor, " some"] | None,
) -> tuple[Float[np.ndarray, "some component"], Float[np.ndarray, " some"]]:
    """The components' parts of the logit in float64, in the order of `_labels`, and the logit."""
    last = kept[stream_name(vlm.n_layers, vlm.n_layers)].to(vlm.device)
    norm = freeze(head.norm, last)
    rows = _unembedding_rows(head, ids, less).to(last.device) * head.after.scale
    directions, bias = norm.directions(rows[:, :-1]), rows[:, -1]

    def part(value: Tensor) -> Tensor:
        value = value.to(device=directions.device, dtype=torch.float64)
        return torch.einsum("nd,n...d->n...", directions, value).reshape(len(directions), -1)

    columns = [part(kept["blocks.0.hook_resid_pre"])]
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        for name, heads in _written(vlm, layer):
            if heads:
                z, out = kept[f"blocks.{layer}.attn.hook_z"], vlm.module(block.out)
                columns.append(part(head_results(out, z)))
                columns.append(part(out.forward(torch.zeros_like(z[:1]).flatten(1)).expand(len(z), -1)))
            else:
                columns.append(part(kept[name]))
        if layer in _deepstack_layers(vlm):
            columns.append(part(kept.get(f"blocks.{layer}.hook_deepstack", torch.zeros_like(last))))
    summed = torch.cat(columns, 1).sum(1)
    rounding = part(last)[:, 0] - summed
    logits = head.after.scaled(head.unembed(head.norm(last))).double()
    logit = logits.gather(1, ids.to(logits.device)[:, None])[:, 0]
    logit = logit if less is None else logit - logits.gather(1, less.to(logits.device)[:, None])[:, 0]
    columns += [(rows[:, :-1] @ norm.bias)[:, None], bias[:, None], rounding[:, None]]
    parts = torch.cat(columns, 1)
    _require_whole(vlm, parts, rounding, logit, last.dtype)
    return parts.cpu().numpy(), logit.cpu().numpy()


def _require_whole(
    vlm: HookedVLM, parts: Tensor, rounding: Tensor, logit: Tensor, dtype: torch.dtype
) -> None:
    """The rounding of n additions is small beside what is added, and the sum is the logit."""
    scale = parts.abs().amax().to(dtype if dtype.is_floating_point else torch.float32)
    allowed = 10 * tolerance(scale)
    for error in (rounding, parts.sum(1) - logit):
        if not error.abs().max().item() <= allowed:
            raise FrankenlensError(
                f"{type(vlm.model).__name__}: embedding, attention, MLPs and DeepStack leave {error.abs().max():.1e} "
                f"of the logit unexplained (rounding allows {allowed:.1e}), so something else writes to the residual "
                "stream; this architecture is not supported by direct logit attribution."
            )


def _unembedding_rows(
    head: OutputHead, ids: Int[Tensor, " some"], less: Int[Tensor, " some"] | None
) -> Float[Tensor, "some d_model_and_bias"]:
    """W_U of the tokens (less that of the others) in float64, the unembedding's bias as the last column."""
    weight = matrix(head.unembed, "direct logit attribution")
    bias = own_parameter(head.unembed, "bias")

    def of(chosen: Tensor) -> Tensor:
        chosen = chosen.to(weight.device)
        last = torch.zeros(len(chosen), device=weight.device) if bias is None else bias.detach()[chosen]
        return torch.cat([weight[chosen].double(), last.double()[:, None]], 1)

    return of(ids) if less is None else of(ids) - of(less)


def _names(vlm: HookedVLM) -> list[str]:
    inside = [
        f"blocks.{layer}.attn.hook_z" if heads else name
        for layer in range(vlm.n_layers)
        for name, heads in _written(vlm, layer)
    ]
    return ["blocks.0.hook_resid_pre", *inside, stream_name(vlm.n_layers, vlm.n_layers)]


def _labels(vlm: HookedVLM) -> list[dict[str, Any]]:
    def label(component: str, kind: str, sublayer: str, layer: int = -1, head: int = -1) -> dict[str, Any]:
        return {"component": component, "kind": kind, "sublayer": sublayer, "layer": layer, "head": head}

    found = [label("embed", "embed", "embed")]
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        name = f"blocks.{layer}"
        for hook, heads in _written(vlm, layer):
            if heads:
                found += [
                    label(f"{name}.attn.head.{h}", "head", f"{name}.attn", layer, h)
                    for h in range(block.n_heads)
                ]
                found.append(label(f"{name}.attn.bias", "attn_bias", f"{name}.attn", layer))
            else:
                kind = hook.rpartition("hook_")[2].replace("_out", "")
                found.append(label(f"{name}.{kind}", kind, f"{name}.{kind}", layer))
        if layer in _deepstack_layers(vlm):
            found.append(label(f"{name}.deepstack", "deepstack", f"{name}.deepstack", layer))
    ends = (("ln_final.bias", "norm_bias"), ("unembed.bias", "unembed_bias"), ("rounding", "rounding"))
    return [*found, *(label(name, kind, name) for name, kind in ends)]


def _written(vlm: HookedVLM, layer: int) -> list[tuple[str, bool]]:
    """The hook points of what a block adds to the stream, in order, and whether it is the plain sum of its heads."""
    block, name = vlm.anatomy.text.blocks[layer], f"blocks.{layer}"
    found: list[tuple[str, bool]] = []
    for hook, writer in zip(writer_points(name, block), block.writers, strict=True):
        plain = writer.role == "attn" and writer.module == writer.body and writer.coefficient == 1.0
        found.append((hook, plain and f"{name}.attn.hook_result" in vlm.hook_points))
    return found


def _deepstack_layers(vlm: HookedVLM) -> list[int]:
    return list(vlm.anatomy.deepstack)


def _deepstack_hooks(
    vlm: HookedVLM,
    batch: PromptBatch,
    rows: Int[Tensor, " some"],
    columns: Int[Tensor, " some"],
    added: dict[str, Tensor],
) -> FwdHooks:
    """Hooks that put what DeepStack adds at these tokens into `added`, by hook name: features, 0 at other tokens."""
    mask = batch.inputs["input_ids"] == batch.prompts[0].builder.image_token_id

    def keep(features: Tensor, hook: HookContext) -> None:
        whole = features.new_zeros(*mask.shape, features.shape[-1])
        whole[mask.to(features.device)] = features.flatten(0, -2)
        added[hook.name] = whole[rows.to(whole.device), columns.to(whole.device)]

    layers = _deepstack_layers(vlm) if bool(mask.any()) else ()
    return [(f"blocks.{layer}.hook_deepstack", keep) for layer in layers]


def _ids(vlm: HookedVLM, given: TokenIds, places: Tokens, name: str) -> Int[Tensor, " token"]:
    """One token id for each chosen token."""
    prompts = len(places.prompts)
    each = torch.as_tensor([given] * prompts if isinstance(given, int) else given)
    vocab = _vocabulary(vlm)
    if len(each) != prompts:
        raise FrankenlensError(
            f"`{name}` holds {len(each)} token ids for {prompts} prompts; give one for each, or one for all."
        )
    for row, token in enumerate(each.tolist()):
        if not 0 <= token < vocab:
            raise FrankenlensError(
                f"prompt {row} ({places.prompts[row].example.id!r}): `{name}` is {token}; the vocabulary is 0 to "
                f"{vocab - 1}."
            )
    return each[places.row].long()


def _vocabulary(vlm: HookedVLM) -> int:
    return vlm.model.get_parameter(f"{vlm.anatomy.unembed}.weight").shape[0]
