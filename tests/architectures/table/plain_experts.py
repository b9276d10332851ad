"""Points of experts with plain PyTorch: their module's arguments and output, and the router's own weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hooks import HookedVLM
from hooks.points import HookPoint
from tests.architectures.table.plain import Seen, first, given, logits_of

PLACES = ("router_logits", "router_weights", "expert_in", "expert_out")


def read(vlm: HookedVLM, point: HookPoint, seen: Seen) -> Tensor | None:
    """The value of a point, tokens in a row; of `expert_out` the sum over experts where they are not apart."""
    experts: Any = point.experts
    if point.place == "router_logits":
        router: Any = vlm.model.get_submodule(point.module)
        if not experts.router_weight:
            return first(seen.outs[point.module]).flatten(0, -2)
        weight, bias = _weights(router, experts.router_weight)
        hidden = given(seen, point.module, None).flatten(0, -2)
        return nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    if point.place == "expert_out":
        out = seen.outs[point.module]
        return (
            out if experts.chosen is not None else out.unflatten(0, (experts.n_experts, -1)).transpose(0, 1)
        )
    if experts.chosen is None:
        return first(seen.outs[point.module])
    args, kwargs = seen.args[point.module]
    hidden, chosen, weights = (
        _at(args, kwargs, p) for p in (experts.hidden, experts.chosen, experts.weights)
    )
    if point.place == "expert_in":
        return hidden
    dense = torch.zeros(len(weights), experts.n_experts, dtype=weights.dtype)
    return dense.scatter_add(1, chosen.long(), weights)


def _at(args: tuple, kwargs: Mapping[str, Any], place: int | str) -> Tensor:
    return args[place] if isinstance(place, int) else kwargs[place]


def _weights(router: Any, name: str) -> tuple[Tensor, Tensor | None]:
    own = dict(router.named_parameters(recurse=False))
    bias = own.get("bias")
    return own[name].detach(), None if bias is None else bias.detach()


@torch.no_grad()
def written(vlm: HookedVLM, point: HookPoint, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits with the point's value negated: by the sign of the router's weight, of an argument, or of the output."""
    experts: Any = point.experts
    module = vlm.model.get_submodule(point.module)
    if point.place == "router_logits" and experts.router_weight:
        with _negated(module, experts.router_weight):
            return logits_of(vlm.model, inputs)
    inward = experts.chosen is not None and point.place in ("router_weights", "expert_in")
    if inward:
        place = experts.weights if point.place == "router_weights" else experts.hidden
        handle = module.register_forward_pre_hook(_argument(place), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_output, prepend=True)
    try:
        return logits_of(vlm.model, inputs)
    finally:
        handle.remove()


def _argument(place: int | str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if isinstance(place, str):
            return args, {**kwargs, place: -kwargs[place]}
        return (*args[:place], -args[place], *args[place + 1 :]), kwargs

    return hook


def _output(module: nn.Module, args: tuple, out: Any) -> Any:
    return type(out)((-out[0], *out[1:])) if isinstance(out, (tuple, list)) else -out


@contextmanager
def _negated(router: Any, name: str) -> Iterator[None]:
    parts = [p for n, p in router.named_parameters(recurse=False) if n in (name, "bias")]
    for part in parts:
        part.data.neg_()
    try:
        yield
    finally:
        for part in parts:
            part.data.neg_()
