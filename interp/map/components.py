"""The components that a map patches: what one patch moves, and the hook points that carry it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hooks import FrankenlensError, HookedVLM
from hooks.errors import nearest
from interp.sweep.activations import kept_for

POINTS = (
    "resid_pre",
    "attn_out",
    "cross_attn_out",
    "mixer_out",
    "mlp_out",
    "head",
    "z",
    "vision",
    "projector",
    "expert",
)
BEFORE_THE_DECODER = ("vision", "projector")


@dataclass(frozen=True)
class Component:
    """What one patch moves: the address (or hook) that names it, the hook points that carry it, and the head or expert.

    Only the projector of a DeepStack model has several: what it adds in the decoder is as much its output.
    """

    name: str
    point: str
    hooks: tuple[str, ...]
    layer: int | None = None
    head: int | None = None

    @property
    def hook(self) -> str:
        """The hook point of a component that has one."""
        return self.hooks[0]


def components(vlm: HookedVLM, points: Sequence[str] = POINTS) -> list[Component]:
    """Every component of a model that the named points offer, dead ones left out.

    Args:
        vlm: the opened model.
        points: of `POINTS`. `head` is the head's result, through its own model's W_O; `z` stops before it. `expert`
            is what one expert of an MLP contributes, weighted by its own model's router.

    Raises:
        FrankenlensError: an unknown point.

    Example:
        >>> [one.name for one in fl.components(pair.in_, ("head",))][:2]
        ['blocks.0.attn.head.0', 'blocks.0.attn.head.1']
    """
    for point in points:
        if point not in POINTS:
            raise FrankenlensError(
                f"{point!r} is no patching point; choose of {', '.join(POINTS)}. {nearest(point, POINTS)}"
            )
    found: list[Component] = []
    for point in POINTS:
        if point in points:
            found += _components_at(vlm, point)
    return [component for component in found if component.hook in vlm.hook_points]


def lacking(vlm: HookedVLM, points: Sequence[str], images: bool = True) -> dict[str, int]:
    """Points that a map was asked for and that a model does not have, in words, to how many there would be.

    Args:
        vlm: the opened model.
        points: of `POINTS`; cross-attention and mixers are told only where nothing but them was asked for.
        images: whether a prompt has an image.
    """
    found: dict[str, int] = {}
    early = [point for point in BEFORE_THE_DECODER if point in points]
    unseen = [point for point in early if not (images and components(vlm, (point,)))]
    if unseen:
        why = f"{type(vlm.model).__name__} shows none" if images else "no prompt has an image"
        found[f"{' and '.join(unseen)}: {why}"] = len(unseen)
    usual = ("attn_out", "mlp_out", "head")
    told = [point for point in points if point not in BEFORE_THE_DECODER and point != "resid_pre"]
    for point in [one for one in told if one in usual] or told:
        layers = {component.layer for component in components(vlm, (point,))}
        without = [layer for layer in range(vlm.n_layers) if layer not in layers]
        if without:
            found[f"{point}: none in decoder blocks {', '.join(map(str, without))}"] = len(without)
    return found


def _components_at(vlm: HookedVLM, point: str) -> Iterator[Component]:
    if point == "projector":
        deepstack = (name for name in vlm.hook_points if name.endswith("hook_deepstack"))
        yield Component("projector", point, ("projector.hook_out", *deepstack))
        return
    if point == "vision":
        for layer in range(len(vlm.anatomy.vision.blocks)):
            yield Component(
                f"vision.blocks.{layer}", point, (f"vision.blocks.{layer}.hook_resid_post",), layer
            )
        return
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        name = f"blocks.{layer}"
        if point == "resid_pre":
            yield Component(f"{name}.hook_resid_pre", point, (f"{name}.hook_resid_pre",), layer)
        elif point == "expert":
            writer = block.writer("moe")
            for e in range(
                writer.experts.n_experts if writer is not None and writer.experts is not None else 0
            ):
                yield Component(f"{name}.mlp.expert.{e}", point, (f"{name}.mlp.hook_expert_out",), layer, e)
        elif point.endswith("_out"):
            yield Component(f"{name}.{point[:-4]}", point, (f"{name}.hook_{point}",), layer)
        else:
            hook = f"{name}.attn.hook_result" if point == "head" else f"{name}.attn.hook_z"
            for head in range(block.n_heads):
                label = f"{name}.attn.head.{head}" if point == "head" else f"{hook}.{head}"
                yield Component(label, point, (hook,), layer, head)


def cached_names(vlm: HookedVLM, wanted: Sequence[Component]) -> list[str]:
    """The hook points a donor run must keep; results of heads and experts are made again from smaller ones."""
    return kept_for(vlm, [name for c in wanted for name in c.hooks])
