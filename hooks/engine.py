"""Attaching hook functions to the tensors that `hooks.points` names, and taking every trace of them away again."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.anatomy.watching import first_floating
from hooks.anatomy.writers import coefficient_of
from hooks.attention import AttentionTap, tapped
from hooks.errors import FrankenlensError
from hooks.experts import PLACES, attach_to_experts
from hooks.inert import Stays
from hooks.plain import by_forward, plain_weight
from hooks.points import HookPoint
from hooks.positions import At, Clock


@dataclass
class HookContext:
    """The `hook` argument of a hook function `fn(activation, hook)`, as in TransformerLens.

    `ctx` is a dictionary of the user's own that lives as long as the hook; `calls` counts how often it has fired.
    `lead` are the sizes of the axes of its block's stream before the width, where the point is relaid.
    `positions` [pos] are those of the tokens that the function is shown, in the whole sequence: while a model
    generates, it is called at every step with one token more. None where the point has no axis of decoder tokens.
    """

    point: HookPoint
    ctx: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    seen: Sequence[int] | None = field(default=None, repr=False)
    lead: tuple[int, ...] = field(default=(), repr=False)
    clock: Clock = field(default_factory=Clock, repr=False)

    @property
    def positions(self) -> Int[Tensor, " pos"] | None:
        """Where the tokens that the function is shown stand in the whole sequence."""
        return None if self.seen is None else torch.tensor(self.seen)

    @property
    def prompt_length(self) -> int | None:
        """How many tokens the sequence began with, padding included; None before the model runs."""
        return self.clock.prompt

    @property
    def name(self) -> str:
        """The hook point's name."""
        return self.point.name

    def layer(self) -> int | None:
        """The block's index, None outside the blocks."""
        return self.point.layer


HookFunction = Callable[[Tensor, HookContext], Tensor | None]


def together(kept: Tensor | None, activation: Tensor, hook: HookContext) -> Tensor:
    """What a point held in a forward pass: of a module that is called once an image, all of them behind one another."""
    once_an_image = hook.calls > 1 and hook.point.axes[0] in ("image", "patch", "image_token")
    return torch.cat([kept, activation]) if once_an_image and kept is not None else activation


def hook_by_keyword(fn: HookFunction) -> HookFunction:
    """As TransformerLens calls it, `fn(activation, hook=hook)`, where `hook` is a parameter but not the second."""
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return fn
    by_keyword: Any = fn
    return (lambda activation, hook: by_keyword(activation, hook=hook)) if "hook" in names[2:] else fn


def always() -> bool:
    """A hook that is never asleep."""
    return True


@dataclass(frozen=True)
class Hook:
    """One hook function on one point; returns the value that takes the tensor's place, or None for no change.

    While it is not `awake` it is passed over, and nothing is computed for it. Its function is shown the tokens `at`
    certain positions alone.
    """

    fn: HookFunction
    context: HookContext
    awake: Callable[[], bool] = always
    at: At = "all"

    def __call__(self, activation: Tensor) -> Tensor | None:
        point = self.context.point
        if point.moved:
            new = self._on(activation.movedim(0, 2))
            return None if new is None else new.movedim(2, 0)
        if point.relaid:
            behind = len(point.axes) - len(self.context.lead)
            # How many tokens follows from the tensor: keys made again of a cache are more than a step's queries.
            lead = (*self.context.lead[:-1], -1)
            new = self._on(activation.reshape(*lead, *activation.shape[activation.ndim - behind :]))
            return None if new is None else new.reshape(activation.shape)
        return self._on(activation)

    def _on(self, activation: Tensor) -> Tensor | None:
        """Show the function the tokens that it is meant for."""
        axis, context = self.context.point.token_axis, self.context
        if axis is None:
            return self._run(activation)
        n = activation.shape[axis]
        context.seen = everywhere = context.clock.positions(n)
        if self.at == "all":
            return self._run(activation)
        context.seen = context.clock.chosen(n, self.at)
        if not context.seen:
            return None
        index = torch.tensor([p - everywhere.start for p in context.seen], device=activation.device)
        new = self._run(activation.index_select(axis, index))
        return None if new is None else activation.index_copy(axis, index, new)

    def _run(self, activation: Tensor) -> Tensor | None:
        point = self.context.point
        self.context.calls += 1
        version = None if activation.is_inference() else activation._version
        new = self.fn(activation, self.context)
        if new is None:
            # Written back as well where gradients are on, so that what a hook read lies on the path to the logits.
            changed = version is None or activation._version != version or activation.requires_grad
            return activation if changed else None
        if not isinstance(new, Tensor) or new.shape != activation.shape or new.device != activation.device:
            got = f"{tuple(new.shape)} on {new.device}" if isinstance(new, Tensor) else type(new).__name__
            raise FrankenlensError(
                f"hook on {point.name} returned {got}; expected {tuple(activation.shape)} "
                f"({' '.join(point.axes)}) on {activation.device}, or None to change nothing."
            )
        return new.to(activation.dtype)


@contextmanager
def attached(
    model: nn.Module, wanted: Sequence[Hook], packed: frozenset[str], clock: Clock
) -> Iterator[None]:
    """Attach hooks, in the order given, for the length of the context.

    Args:
        model: the model; modules are looked up now, so what was put in their place since opening is hooked.
        wanted: the hooks.
        packed: paths of attention modules that see [patch, d] without a batch axis.
        clock: is told which tokens each forward pass works on.
    """
    places: dict[tuple[str, str], list[Hook]] = defaultdict(list)
    for hook in wanted:
        hook.context.clock = clock
        places[hook.context.point.module, hook.context.point.place].append(hook)
    with ExitStack() as stack:
        if wanted:
            clock.attach(model, stack)
        for hook in wanted:
            if hook.context.point.relaid:
                block = model.get_submodule(hook.context.point.stream)
                lead = Stays(partial(_note_lead, hook.context))
                handle = block.register_forward_pre_hook(lead, with_kwargs=True)
                stack.callback(handle.remove)
        # Of the hooks on one module's output, those registered last run first: a rest must come before the whole.
        for (path, place), hooks in sorted(places.items(), key=lambda item: item[0][1] == "rest"):
            module = model.get_submodule(path)
            if place == "rest":
                _attach_rest(model, module, hooks, stack)
                continue
            if place in PLACES:
                attach_to_experts(model, hooks, stack)
            elif place == "attention":
                tap = AttentionTap(partial(_leaves, hooks), partial(_run_leaf, hooks), path in packed)
                stack.enter_context(tapped(module, tap))
            elif place == "input":
                handle = module.register_forward_pre_hook(Stays(partial(_on_input, hooks)), with_kwargs=True)
                stack.callback(handle.remove)
            else:
                # First in line: transformers records hidden states with hooks of its own, and must record our value.
                act = _on_output if place == "output" else _on_result
                handle = module.register_forward_hook(Stays(partial(act, hooks, model)), prepend=True)
                stack.callback(handle.remove)
        yield


def _note_lead(context: HookContext, block: nn.Module, args: tuple, kwargs: dict) -> None:
    """How the tokens of a block's stream are laid out."""
    _, stream = first_floating(args, kwargs)
    lead = () if stream is None else tuple(stream.shape[:-1])
    context.lead = tuple(size for axis, size in enumerate(lead) if axis != context.point.aside)


def _attach_rest(model: nn.Module, block: nn.Module, hooks: list[Hook], stack: ExitStack) -> None:
    """What a block adds behind a stream that one of its modules is given."""
    inside: list[Tensor] = []
    reader = model.get_submodule(str(hooks[0].context.point.key))

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inside[:] = [args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))]

    def act(module: nn.Module, args: tuple, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        for hook in hooks:
            if hook.awake():
                seen = whole - inside[0]
                new = hook(seen.clone())
                whole = whole if new is None else whole + (new - seen)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    for handle in (
        reader.register_forward_pre_hook(Stays(see), with_kwargs=True),
        block.register_forward_hook(Stays(act), prepend=True),
    ):
        stack.callback(handle.remove)


def _leaves(hooks: list[Hook]) -> frozenset[str]:
    return frozenset(hook.context.point.leaf for hook in hooks if hook.awake())


def _run_leaf(hooks: list[Hook], leaf: str, value: Tensor) -> Tensor:
    for hook in hooks:
        if hook.context.point.leaf == leaf and hook.awake():
            # softmax keeps its output for the backward pass: a function that edits in place gets its own copy.
            new = hook(value.clone() if value.requires_grad else value)
            value = value if new is None else new
    return value


def _on_input(hooks: list[Hook], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    for hook in hooks:
        point = hook.context.point
        by_keyword = point.key is not None and point.key in kwargs
        tensor = kwargs[point.key] if by_keyword else next(iter(args), None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            _refuse_unless_asleep(hook)
            continue
        new = _new_value(hook, tensor)
        if new is None:
            continue
        if point.inplace:
            tensor.copy_(new)
        elif by_keyword:
            kwargs = {**kwargs, point.key: new}
        else:
            args = (new, *args[1:])
    return args, kwargs


def _refuse_unless_asleep(hook: Hook) -> None:
    """While some models generate, what comes after the prompt is handed on as ids: there is no tensor to show."""
    context, clock = hook.context, hook.context.clock
    if hook.awake() and clock.chosen(clock.stop - clock.start, hook.at):
        raise FrankenlensError(
            f"{context.name}: {context.point.module} is given token ids here, as models do that generate, and embeds "
            'them itself. Narrow the hook to the prompt (generate(..., at="prompt")), or hook blocks.0.hook_resid_pre.'
        )


def _on_output(hooks: list[Hook], model: nn.Module, module: nn.Module, args: tuple, output: Any) -> Any:
    for hook in hooks:
        key = hook.context.point.key
        if hook.context.point.coefficient != 1.0:
            output = _scaled(hook, model, output)
        elif key is not None:
            field = getattr(output, key)
            one = field[0] if isinstance(field, tuple | list) else field
            new = _new_value(hook, one)
            if new is not None:
                setattr(output, key, new if one is field else type(field)((new, *field[1:])))
        elif isinstance(output, tuple | list):
            new = _new_value(hook, output[0])
            output = output if new is None else type(output)((new, *output[1:]))
        else:
            new = _new_value(hook, output)
            output = output if new is None else new
    return output


def _scaled(hook: Hook, model: nn.Module, output: Any) -> Any:
    """A multiple of the output is what is added to the stream: the hook sees that; its change is divided back."""
    own = output[0] if isinstance(output, tuple) else output
    if not hook.awake():
        return output
    factor = _factor(model, hook.context.point, own)
    seen = as_added(model, hook.context.point, own)
    new = hook(seen.clone())
    if new is None:
        return output
    # What a hook leaves alone stays bit for bit what it was, what it sets to zero is zero, and a gradient goes through
    # either; a channel that counts for nothing cannot be changed.
    shut = torch.as_tensor(factor == 0, device=own.device)
    divided = torch.where(shut, 1.0, factor)
    changed = torch.where(new == seen, own + (new - seen) / divided, new / divided)
    whole = torch.where(shut, own, changed).to(own.dtype)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def as_added(model: nn.Module, point: HookPoint, made: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What is added to the stream when a point's part gives this out: times the point's coefficient."""
    return made if point.coefficient == 1.0 else (made * _factor(model, point, made)).to(made.dtype)


def _before_factor(model: nn.Module, point: HookPoint, change: Tensor) -> Tensor:
    """The change of an output that changes the stream by this; a channel that counts for nothing cannot be changed."""
    if point.coefficient == 1.0:
        return change
    factor = _factor(model, point, change)
    shut = torch.as_tensor(factor == 0, device=change.device)
    return torch.where(shut, 0.0, change / torch.where(shut, 1.0, factor))


def _factor(model: nn.Module, point: HookPoint, like: Tensor) -> Tensor | float:
    factor = coefficient_of(model, point.coefficient)
    return factor.to(like.device) if isinstance(factor, Tensor) else factor


def _new_value(hook: Hook, tensor: Tensor) -> Tensor | None:
    """Show the hook its part of `tensor`; return the whole tensor with that part replaced, None for no change."""
    if not hook.awake():
        return None
    point = hook.context.point
    seen = tensor if point.split is None else point.split.of(tensor)
    # A copy where an edit in place would reach the wrong tensor, or one that autograd has views of.
    partial = point.split is not None and not point.split.whole
    others = point.place == "input" and not getattr(hook.fn, "only_looks", False)  # the caller's own tensor
    new = hook(seen.clone() if others or point.inplace or partial or seen.requires_grad else seen)
    if new is None or point.split is None:
        return new
    return point.split.into(tensor, new)


def _on_result(hooks: list[Hook], model: nn.Module, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Per-head results; a change of one is added to the output, so an unchanged head changes nothing, bit for bit."""
    awake = [hook for hook in hooks if hook.awake()]
    if not awake:
        return output
    point = awake[0].context.point
    assert point.split is not None
    own = as_added(model, point, head_results(module, point.split.of(args[0])))
    result = own
    for hook in awake:
        new = hook(result.clone())
        result = result if new is None else new
    if result is own:
        return output
    return output + _before_factor(model, point, (result - own).sum(-2)).to(output.dtype)


def head_results(
    out: nn.Module, z: Float[Tensor, "*lead head d_head"]
) -> Float[Tensor, "*lead head d_model"]:
    """What each head gives out: z_h · W_O of head h; the bias belongs to no head. `as_added` is what it writes.

    In float32 for half-precision models too: the difference between two models' heads is far below their rounding.
    """
    if (weight := plain_weight(out)) is not None:
        split = weight.to(z.device).unflatten(1, (z.shape[-2], -1))
        wide = torch.promote_types(z.dtype, torch.float32)
        return torch.einsum("...hd,mhd->...hm", z.to(wide), split.to(wide))
    eye = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    return torch.stack([by_forward(out, (z * row[:, None]).flatten(-2)) for row in eye], dim=-2)
