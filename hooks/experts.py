"""Hook functions on the experts of an MLP: the router's logits, its weights, and what each expert contributes.

Experts run on tokens in a row, [token ...]; hook functions see them laid out as the stream is, [batch pos ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.anatomy import Experts
from hooks.anatomy.experts import LinearMap, called
from hooks.anatomy.watching import first_floating
from hooks.errors import FrankenlensError
from hooks.inert import Stays


@runtime_checkable
class Acting(Protocol):
    """A hook of `hooks.engine`."""

    @property
    def context(self) -> Any:
        """What is handed to its function."""
        ...

    @property
    def awake(self) -> Callable[[], bool]:
        """Whether it acts now."""
        ...

    def __call__(self, activation: Tensor) -> Tensor | None:
        """The new value, or None."""
        ...


PLACES = ("router_logits", "router_weights", "expert_in", "expert_out")


def attach_to_experts(model: nn.Module, hooks: Sequence[Acting], stack: ExitStack) -> None:
    """Attach hooks of one place, of `PLACES`, until the stack is closed."""
    point = hooks[0].context.point
    experts, module = point.experts, model.get_submodule(point.module)
    tokens = _Tokens(hooks, experts, point.name)
    block = model.get_submodule(point.stream)
    stack.callback(block.register_forward_pre_hook(Stays(tokens.arrive), with_kwargs=True).remove)
    match point.place:
        case "router_logits" if experts.router_weight:
            _inside(module, experts.router_weight, tokens, stack)
        case "router_weights" | "expert_in" if experts.chosen is not None:
            act = tokens.choose if point.place == "router_weights" else tokens.enter
            stack.callback(module.register_forward_pre_hook(Stays(act), with_kwargs=True).remove)
        case "expert_out":
            act = tokens.contribute if experts.chosen is not None else tokens.contribute_each
            stack.callback(module.register_forward_hook(Stays(act), with_kwargs=True, prepend=True).remove)
        case _:
            stack.callback(module.register_forward_hook(Stays(tokens.leave), prepend=True).remove)


def _inside(module: nn.Module, weight: str, tokens: _Tokens, stack: ExitStack) -> None:
    """Hooks on a linear map inside a module's forward: the mode is on while that runs, and at no other time."""
    running: list[LinearMap] = []

    def begin(module: nn.Module, args: tuple) -> None:
        if tokens.awake:
            mode = LinearMap(module, weight, tokens.shown)
            mode.__enter__()
            running.append(mode)

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        while running:
            running.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(Stays(begin)).remove)
    stack.callback(module.register_forward_hook(Stays(end), always_call=True).remove)


class _Tokens:
    """The hooks of one place, and how the tokens in a row are laid out in the stream."""

    def __init__(self, hooks: Sequence[Acting], experts: Experts, name: str) -> None:
        self._hooks, self._experts, self._name = hooks, experts, name
        self._lead: tuple[int, ...] = ()

    @property
    def awake(self) -> bool:
        """Whether any hook is to act."""
        return any(hook.awake() for hook in self._hooks)

    def arrive(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """The block is given its stream."""
        _, stream = first_floating(args, kwargs)
        self._lead = () if stream is None else tuple(stream.shape[:-1])

    def shown(self, flat: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"] | None:
        """What the hooks make of a tensor of tokens in a row; None for no change."""
        value, changed = self._laid_out(flat.reshape(-1, flat.shape[-1])), False
        for hook in self._hooks:
            if hook.awake():
                new = hook(value.clone() if value.requires_grad else value)
                value, changed = (value, changed) if new is None else (new, True)
        return value.reshape(flat.shape) if changed else None

    def _laid_out(self, flat: Float[Tensor, "token ..."]) -> Float[Tensor, "..."]:
        if torch.Size(self._lead).numel() != len(flat):
            raise FrankenlensError(
                f"{self._name}: the experts are given {len(flat)} tokens, the stream has {self._lead}."
            )
        return flat.unflatten(0, self._lead)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Logits or weights that are a module's output."""
        parted = isinstance(output, tuple | list)
        new = self.shown(output[0] if parted else output) if self.awake else None
        if new is None:
            return output
        return type(output)((new, *output[1:])) if parted else new

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The tokens that the experts are given."""
        if not self.awake:
            return None
        hidden, chosen, weights = _given(self._experts, args, kwargs)
        new = self.shown(hidden.clone())
        return None if new is None else called(self._experts, new, chosen, weights)

    def choose(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The weights that the experts are given, and with them who is chosen."""
        if not self.awake:
            return None
        hidden, chosen, weights = _given(self._experts, args, kwargs)
        new = self.shown(dense_weights(chosen, weights, self._experts.n_experts))
        return None if new is None else called(self._experts, hidden, *_sparse(new, chosen))

    def contribute(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """What each expert adds; a change of it is added to the output, so that what is left alone stays as it is."""
        awake = [hook for hook in self._hooks if hook.awake()]
        if not awake:
            return output
        given = _given(self._experts, args, kwargs)
        change = self._change(awake, lambda expert: self._contribution(module, given, expert))
        return output if change is None else output + change.reshape(output.shape).to(output.dtype)

    def contribute_each(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """The same where what each gives out is a part of the output."""
        awake = [hook for hook in self._hooks if hook.awake()]
        each = output.unflatten(0, (self._experts.n_experts, -1))
        new = each.transpose(0, 1)
        for hook in awake:
            expert = hook.context.point.expert
            seen = self._laid_out(new if expert is None else new[:, expert])
            value = hook(seen.clone())
            if value is None:
                continue
            flat = value.flatten(0, len(self._lead) - 1)
            new = flat if expert is None else new.index_copy(1, _one(expert, new), flat[:, None])
        return output if not awake else new.transpose(0, 1).reshape(output.shape)

    def _contribution(
        self, module: nn.Module, given: tuple[Tensor, Tensor, Tensor], expert: int | None
    ) -> Float[Tensor, "..."]:
        hidden, chosen, weights = given
        dense = dense_weights(chosen, weights, self._experts.n_experts)
        return self._laid_out(expert_contribution(module, self._experts, hidden, dense, expert))

    def _change(
        self, awake: Sequence[Acting], own_of: Callable[[int | None], Tensor]
    ) -> Float[Tensor, "*lead d"] | None:
        """The sum over experts of what hooks changed; only those are computed that some hook is on."""
        every = any(hook.context.point.expert is None for hook in awake)
        own: dict[int | None, Tensor] = {None: own_of(None)} if every else {}
        now: dict[int | None, Tensor] = dict(own)
        touched: set[int | None] = set()
        for hook in awake:
            expert = hook.context.point.expert
            key = None if every else expert
            if key not in now:
                own[key] = now[key] = own_of(expert)
            seen = now[key] if key == expert else now[None][..., expert, :]
            new = hook(seen.clone())
            if new is None:
                continue
            touched.add(key)
            if key != expert:
                new = now[None].index_copy(-2, _one(expert, new), new[..., None, :])
            now[key] = new
        if not touched:
            return None
        if every:
            return (now[None] - own[None]).sum(-2)
        return torch.stack([now[key] - own[key] for key in touched]).sum(0)


def _one(index: int, like: Tensor) -> Int[Tensor, " 1"]:
    return torch.tensor([index], device=like.device)


def _given(experts: Experts, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the chosen experts and their weights, as a call has them."""
    places: Any = (experts.hidden, experts.chosen, experts.weights)
    hidden, chosen, weights = (args[p] if isinstance(p, int) else kwargs[p] for p in places)
    return hidden, chosen, weights


def dense_weights(
    chosen: Int[Tensor, "token k"], weights: Float[Tensor, "token k"], n_experts: int
) -> Float[Tensor, "token expert"]:
    """The weights over all experts, 0 for those that were not chosen."""
    return weights.new_zeros(len(weights), n_experts).scatter_add(1, chosen.long(), weights)


def _sparse(
    dense: Float[Tensor, "token expert"], chosen: Int[Tensor, "token k"]
) -> tuple[Int[Tensor, "token m"], Float[Tensor, "token m"]]:
    """The chosen and their weights; beside them, as many more as some token has weights outside of its chosen."""
    index = chosen.long()
    outside = (dense != 0).scatter(1, index, False)
    extra = int(outside.sum(1).max()) if len(dense) else 0
    weights = dense.gather(1, index)
    if not extra:
        return chosen, weights
    more = outside.float().topk(extra, dim=1).indices
    further = torch.where(outside.gather(1, more), dense.gather(1, more), 0.0)
    return torch.cat([chosen, more.to(chosen.dtype)], 1), torch.cat([weights, further], 1)


def expert_contribution(
    module: nn.Module,
    experts: Experts,
    hidden: Float[Tensor, "token d"],
    dense: Float[Tensor, "token expert"],
    expert: int | None = None,
) -> Float[Tensor, "token d"] | Float[Tensor, "token expert d"]:
    """What one expert, or each, adds to what the experts give out: its own output, weighted by the router.

    Each runs on the tokens that have a weight for it alone, through the module's own forward, past hooks.

    Args:
        module: the experts.
        experts: how they are called.
        hidden: what they are given.
        dense: the router's weights, 0 where an expert is not chosen.
        expert: the one that is meant; None for all of them, which takes the memory of as many streams.
    """
    forward: Any = module.forward
    if expert is not None:
        rows = dense[:, expert].nonzero()[:, 0]
        own = hidden.new_zeros(hidden.shape)
        if not len(rows):
            return own
        chosen = torch.full((len(rows), 1), expert, device=hidden.device)
        args, kwargs = called(experts, hidden[rows], chosen, dense[rows, expert][:, None])
        return own.index_copy(0, rows, forward(*args, **kwargs).to(own.dtype))
    rows, chosen = dense.nonzero(as_tuple=True)
    own = hidden.new_zeros(*dense.shape, hidden.shape[-1])
    if not len(rows):
        return own
    args, kwargs = called(experts, hidden[rows], chosen[:, None], dense[rows, chosen][:, None])
    return own.index_put((rows, chosen), forward(*args, **kwargs).to(own.dtype))
