"""Attaching hook functions to the tensors that `hooks.points` names, and taking every trace of them away again."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy.watching import first_floating
from hooks.anatomy.writers import coefficient_of
from hooks.attention import AttentionTap, tapped
from hooks.errors import FrankenlensError
from hooks.experts import PLACES, attach_to_experts
from hooks.points import HookPoint


@dataclass
class HookContext:
    """The `hook` argument of a hook function `fn(activation, hook)`, as in TransformerLens.

    `ctx` is a dictionary of the user's own that lives as long as the hook; `calls` counts how often it has fired.
    `lead` are the sizes of the axes of its block's stream before the width, where the point is relaid.
    """

    point: HookPoint
    ctx: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    lead: tuple[int, ...] = field(default=(), repr=False)

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

    While it is not `awake` it is passed over, and nothing is computed for it.
    """

    fn: HookFunction
    context: HookContext
    awake: Callable[[], bool] = always

    def __call__(self, activation: Tensor) -> Tensor | None:
        point = self.context.point
        if point.moved:
            new = self._on(activation.movedim(0, 2))
            return None if new is None else new.movedim(2, 0)
        if point.relaid:
            behind = len(point.axes) - len(self.context.lead)
            new = self._on(
                activation.reshape(*self.context.lead, *activation.shape[activation.ndim - behind :])
            )
            return None if new is None else new.reshape(activation.shape)
        return self._on(activation)

    def _on(self, activation: Tensor) -> Tensor | None:
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
def attached(model: nn.Module, wanted: Sequence[Hook], packed: frozenset[str]) -> Iterator[None]:
    """Attach hooks, in the order given, for the length of the context.

    Args:
        model: the model; modules are looked up now, so what was put in their place since opening is hooked.
        wanted: the hooks.
        packed: paths of attention modules that see [patch, d] without a batch axis.
    """
    places: dict[tuple[str, str], list[Hook]] = defaultdict(list)
    for hook in wanted:
        places[hook.context.point.module, hook.context.point.place].append(hook)
    with ExitStack() as stack:
        for hook in wanted:
            if hook.context.point.relaid:
                block = model.get_submodule(hook.context.point.stream)
                handle = block.register_forward_pre_hook(partial(_note_lead, hook.context), with_kwargs=True)
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
                handle = module.register_forward_pre_hook(partial(_on_input, hooks), with_kwargs=True)
                stack.callback(handle.remove)
            else:
                # First in line: transformers records hidden states with hooks of its own, and must record our value.
                function = (
                    partial(_on_output, hooks, model) if place == "output" else partial(_on_result, hooks)
                )
                handle = module.register_forward_hook(function, prepend=True)
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
        reader.register_forward_pre_hook(see, with_kwargs=True),
        block.register_forward_hook(act, prepend=True),
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
        tensor = kwargs[point.key] if by_keyword else args[0]
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
    factor = coefficient_of(model, hook.context.point.coefficient)
    factor = factor.to(own.device, own.dtype) if isinstance(factor, Tensor) else own.new_tensor(factor)
    seen = own * factor
    new = hook(seen.clone())
    if new is None:
        return output
    # As a difference, so that what a hook leaves alone stays bit for bit what it was; a channel that counts for nothing
    # cannot be changed.
    whole = own + torch.where(factor == 0, 0.0, (new - seen) / factor).to(own.dtype)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _new_value(hook: Hook, tensor: Tensor) -> Tensor | None:
    """Show the hook its part of `tensor`; return the whole tensor with that part replaced, None for no change."""
    if not hook.awake():
        return None
    point = hook.context.point
    seen = tensor if point.split is None else point.split.of(tensor)
    # A copy where an edit in place would reach the wrong tensor, or one that autograd has views of.
    partial = point.split is not None and not point.split.whole
    new = hook(seen.clone() if point.inplace or partial or seen.requires_grad else seen)
    if new is None or point.split is None:
        return new
    return point.split.into(tensor, new)


def _on_result(hooks: list[Hook], module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Per-head results; a change of one is added to the output, so an unchanged head changes nothing, bit for bit."""
    awake = [hook for hook in hooks if hook.awake()]
    if not awake:
        return output
    heads = awake[0].context.point.split
    assert heads is not None
    own = head_results(module, heads.of(args[0]))
    result = own
    for hook in awake:
        new = hook(result.clone())
        result = result if new is None else new
    return output if result is own else output + (result - own).sum(-2).to(output.dtype)


def head_results(
    out: nn.Module, z: Float[Tensor, "*lead head d_head"]
) -> Float[Tensor, "*lead head d_model"]:
    """What each head writes to the residual stream: z_h · W_O of head h; the bias belongs to no head.

    In float32 for half-precision models too: the difference between two models' heads is far below their rounding.
    """
    if type(out) is nn.Linear and not out.weight.is_meta:
        weight = out.weight.unflatten(1, (z.shape[-2], -1))
        wide = torch.promote_types(z.dtype, torch.float32)
        return torch.einsum("...hd,mhd->...hm", z.to(wide), weight.to(wide))
    # A wrapped projection (LoRA, quantized, offloaded): one head at a time through its own forward, past the hooks.
    zero = out.forward(torch.zeros_like(z).flatten(-2))
    eye = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    return torch.stack([out.forward((z * row[:, None]).flatten(-2)) - zero for row in eye], dim=-2)
