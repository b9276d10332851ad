"""Lenses as tables: means over a prompt's tokens of a role, then over prompts, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Shaped

from hooks import FrankenlensError
from interp.prompts import Prompt
from interp.prompts.roles import ROLES
from interp.questions.examples import clusters_of
from interp.statistics import Interval, adjust, difference_interval, mean_interval, mean_test

BEFORE_ANSWER = "before answer"
"""The tokens whose next one is the first of an answer."""


def per_prompt(
    values: xr.DataArray, role: str, rows: Sequence[int] | None = None
) -> Float[np.ndarray, "*rest prompt"]:
    """Mean over each prompt's tokens of a role (or `BEFORE_ANSWER`, or "all"); NaN where it has none.

    Args:
        values: with an axis `token` and coordinates row, position, role; tokens of a prompt in order.
        role: which tokens.
        rows: the prompts; None: those that `values` has tokens of.
    """
    values = values.transpose(..., "token")
    row = values["row"].to_numpy()
    prompts = np.unique(row).tolist() if rows is None else list(rows)
    chosen = _chosen(values, role)
    data = values.to_numpy().astype(np.float64)
    out = np.full((*data.shape[:-1], len(prompts)), np.nan)
    for at, one in enumerate(prompts):
        mine = chosen & (row == one)
        if mine.any():
            out[..., at] = data[..., mine].mean(-1)
    return out


def prompt_clusters(values: xr.Dataset) -> Shaped[np.ndarray, " prompt"] | None:
    """The cluster of every prompt of `per_prompt`; None where the result names none: each stands alone."""
    of = clusters_of(values, "token")
    return None if of is None else of[np.unique(values["row"].to_numpy(), return_index=True)[1]]


def _chosen(values: xr.DataArray | xr.Dataset, role: str) -> Bool[np.ndarray, " token"]:
    roles = values["role"].to_numpy()
    if role != BEFORE_ANSWER:
        return np.ones(len(roles), bool) if role == "all" else roles == role
    row, position = values["row"].to_numpy(), values["position"].to_numpy()
    begins = (roles[1:] == "answer") & (roles[:-1] != "answer")
    follows = (row[1:] == row[:-1]) & (position[1:] == position[:-1] + 1)
    return np.append(begins & follows, False)


def roles_of(lens: xr.Dataset) -> list[str]:
    """The roles that some token has, in the order of `ROLES`, and `BEFORE_ANSWER`."""
    held = set(lens["role"].to_numpy().tolist())
    found = [role for role in ROLES if role in held]
    return [*found, BEFORE_ANSWER] if _chosen(lens, BEFORE_ANSWER).any() else found


def own_table(lens: xr.Dataset, tuned: xr.Dataset | None = None) -> pd.DataFrame:
    """How far each layer's prediction is from the model's own output, per model and role.

    Args:
        lens: what `logit_lens(pair, ..., where="all")` returns.
        tuned: the same through tuned lenses, on prompts that they were not trained on.

    Returns:
        Columns model, role, layer, kl (nats; with _low and _high), agrees (share of tokens whose likeliest one is the
        output's), entropy, n (prompts); with `tuned` tuned_kl and tuned_n.
    """
    agrees = (lens["token_id"].isel(rank=0) == lens["final_id"]).transpose(*lens["kl"].dims)
    measures = {"kl": lens["kl"], "agrees": agrees, "entropy": lens["entropy"]}
    if tuned is not None:
        measures["tuned_kl"] = tuned["kl"]
    parts = []
    for role in roles_of(lens):
        columns = _keys(lens, "model", role)
        for name, values in measures.items():
            of = prompt_clusters(lens if tuned is None or name != "tuned_kl" else tuned)
            found = mean_interval(per_prompt(values, role), clusters=of)
            columns |= _columns(name, found)
            columns["tuned_n" if name == "tuned_kl" else "n"] = found.n.ravel()
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def apart_table(apart: xr.Dataset) -> pd.DataFrame:
    """What `compare_lenses` returns, per comparison, role and layer.

    Returns:
        Columns comparison, role, layer, kl, kl_reverse, overlap, same_top (each with _low and _high), excess (kl less
        that of the null it exceeds least, with _low, _high; NaN for nulls and without nulls), p, p_corrected (of
        that excess, `mean_test`, Holm over the layers of a role), n (prompts), top_k.
    """
    parts = []
    names = apart["comparison"].to_numpy().tolist()
    for role in roles_of(apart):
        columns = _keys(apart, "comparison", role)
        for name in ("kl", "kl_reverse", "overlap", "same_top"):
            found = mean_interval(per_prompt(apart[name], role), clusters=prompt_clusters(apart))
            columns |= _columns(name, found)
        columns["n"] = found.n.ravel()
        columns |= _excess(per_prompt(apart["kl"], role), names, prompt_clusters(apart))
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True).assign(top_k=apart.attrs["top_k"])


def _excess(
    kl: Float[np.ndarray, "comparison layer prompt"], names: list[str], of: np.ndarray | None
) -> dict:
    shape = kl.shape[:2]
    out = {
        name: np.full(shape, np.nan) for name in ("excess", "excess_low", "excess_high", "p", "p_corrected")
    }
    own, nulls = names.index("rl"), [at for at, name in enumerate(names) if name != "rl"]
    if nulls:
        means = np.array([[np.nanmean(kl[at, layer]) for layer in range(shape[1])] for at in nulls])
        nearest = kl[np.array(nulls)[means.argmax(0)], np.arange(shape[1])]
        found = difference_interval(kl[own], nearest, clusters=of)
        p = mean_test(kl[own] - nearest, clusters=of)
        values = (found.value, found.low, found.high, p, adjust(p))
        for name, one in zip(out, values, strict=True):
            out[name][own] = one
    return {name: values.ravel() for name, values in out.items()}


def answer_table(
    answers: xr.Dataset, nulls: Mapping[str, tuple[str, xr.Dataset]] | None = None
) -> pd.DataFrame:
    """Where the answer appears and stays, IN against RL, paired by prompt.

    Args:
        answers: what `answer_layers` returns of a pair, one token a prompt.
        nulls: by name, the model that a model which learnt nothing is to be compared with, and its answers.

    Returns:
        Columns event, in, in_low, in_high, rl, ..., difference, low, high (in layers), p, p_corrected (Holm), n,
        same_answer (share of prompts on which both models' answer is one), and each null's difference.
    """
    rows, of_all = [], clusters_of(answers, "token")
    same = float((answers["word"].sel(model="in") == answers["word"].sel(model="rl")).mean())
    for event in ("appears", "stays"):
        sides = {name: answers[event].sel(model=name).to_numpy().astype(float) for name in ("in", "rl")}
        row: dict = {"event": event}
        for name, values in sides.items():
            row |= _columns(name, mean_interval(values, clusters=of_all))
        row |= _difference("", sides["rl"], sides["in"], of_all)
        for name, (of, null) in (nulls or {}).items():
            row |= _difference(f"{name}_", null[event].to_numpy().astype(float), sides[of], of_all)
        n = {"n": len(sides["rl"]), "same_answer": same}
        rows.append(row | n | {"p": float(mean_test(sides["rl"] - sides["in"], clusters=of_all))})
    table = pd.DataFrame(
        [{k: v.item() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]
    )
    return table.assign(p_corrected=adjust(table["p"].to_numpy()))


def attribution_table(
    attribution: xr.Dataset, nulls: Mapping[str, tuple[str, xr.Dataset]] | None = None
) -> pd.DataFrame:
    """Contributions of every component in IN and RL, paired by token.

    Args:
        attribution: what `direct_logit_attribution(pair, ...)` returns, one token a prompt.
        nulls: by name, the model that a model which learnt nothing is to be compared with, and its attribution.

    Returns:
        Columns component, kind, sublayer, layer, head, in, in_low, in_high, rl, ..., difference, low, high (logits),
        p (of a mean difference of 0; `mean_test`), p_corrected (Holm over components), n, and each null's difference;
        the last row, `logit`, is the sum of the components.
    """
    values, of_all = _with_sum(attribution), clusters_of(attribution, "token")
    columns: dict = {"component": [*attribution["component"].to_numpy().tolist(), "logit"]}
    ends = {"kind": "logit", "sublayer": "logit", "layer": -1, "head": -1}
    columns |= {name: [*attribution[name].to_numpy().tolist(), end] for name, end in ends.items()}
    sides = {name: values.sel(model=name).to_numpy() for name in ("in", "rl")}
    for name, side in sides.items():
        columns |= _columns(name, mean_interval(side, clusters=of_all))
    columns |= _difference("", sides["rl"], sides["in"], of_all)
    p = mean_test(sides["rl"] - sides["in"], clusters=of_all)
    of_components = np.arange(len(p)) < len(p) - 1  # the last row is their sum
    columns |= {"p": p, "p_corrected": adjust(np.where(of_components, p, np.nan)), "n": values.sizes["token"]}
    for name, (of, null) in (nulls or {}).items():
        columns |= _difference(f"{name}_", _with_sum(null).to_numpy(), sides[of], of_all)
    return pd.DataFrame(columns)


def _with_sum(attribution: xr.Dataset) -> xr.DataArray:
    """Contributions [..., component, token], and the logit that they add up to."""
    parts = attribution["contribution"].reset_coords(drop=True)
    total = attribution["logit"].reset_coords(drop=True).expand_dims(component=["logit"])
    return xr.concat([parts, total], "component").transpose(..., "component", "token")


def with_answers(traces: Sequence[Prompt]) -> list[Prompt]:
    """The traces in which an answer begins."""
    return [trace for trace in traces if "answer" in trace.roles]


def answer_position(trace: Prompt) -> int:
    """The position whose next token is the first of the trace's last answer.

    Raises:
        FrankenlensError: the trace holds no answer.
    """
    starts = [
        at
        for at, role in enumerate(trace.roles)
        if role == "answer" and at and trace.roles[at - 1] != "answer"
    ]
    if not starts:
        raise FrankenlensError(f"the trace of prompt {trace.example.id!r} holds no answer.")
    return starts[-1] - 1


def _keys(dataset: xr.Dataset, first: str, role: str) -> dict:
    names, layers = dataset[first].to_numpy(), dataset["layer"].to_numpy()
    return {
        first: np.repeat(names, len(layers)),
        "role": role,
        "layer": np.tile(layers, len(names)),
    }


def _columns(name: str, found: Interval) -> dict[str, np.ndarray]:
    ends = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: np.asarray(value).ravel() for key, value in ends.items()}


def _difference(
    prefix: str,
    after: Float[np.ndarray, "*cells example"],
    before: Float[np.ndarray, "*cells example"],
    of: Shaped[np.ndarray, " example"] | None,
) -> dict[str, np.ndarray]:
    found = difference_interval(after, before, clusters=of)
    ends = {"difference": found.value, "low": found.low, "high": found.high}
    return {f"{prefix}{key}": np.asarray(value) for key, value in ends.items()}
