"""The hook-point table: every named tensor of a forward pass, where it lives, and how it is shaped.

Patches of a vision block stand in the order in which the tower itself has them: Qwen2.5-VL keeps them sorted by window
inside its blocks; `projector.hook_out` is in the order of the image tokens again.

`hook_result` is what each head adds to the stream, the factor of its attention included; where a norm stands between,
what it gives to that norm.

Of a mixture of experts `mlp.hook_router_logits` and `mlp.hook_router_weights` [batch pos expert] say who is chosen (a
write moves the routing; a weight is 0 where an expert is not chosen), `mlp.hook_expert_in` what the experts are given,
and `mlp.hook_expert_out` [batch pos expert d_model] what each of them contributes, weighted by the router, to what the
experts give out together. Behind that may stand a scale, a norm or a shared expert, which is no expert's: what they
give out sums to `hook_mlp_out` only where there is none, and a change of one passes through them as the model has it.
It holds as many streams as there are experts; `mlp.hook_expert_out.5` is one of them alone.

This one table drives our own engine (`hooks.engine`) and whatever else must find the same tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hooks.anatomy import Anatomy, Block, Experts, Site, Slice, Tower, Writer

Place = Literal[
    "input",
    "output",
    "attention",
    "result",
    "rest",
    "router_logits",
    "router_weights",
    "expert_in",
    "expert_out",
]
OUT = {
    "attn": "hook_attn_out",
    "cross_attn": "hook_cross_attn_out",
    "mixer": "hook_mixer_out",
    "rest": "hook_rest_out",
} | dict.fromkeys(("mlp", "moe"), "hook_mlp_out")
"""Role of a writer to the hook point of what it adds to the stream."""
_AFTER = {
    "attn": "hook_resid_mid",
    "mixer": "hook_resid_mid",
    "cross_attn": "hook_resid_mid_cross",
} | dict.fromkeys(("mlp", "moe"), "hook_resid_mid_mlp")


@dataclass(frozen=True)
class HookPoint:
    """One tensor of a forward pass.

    Attributes:
        name: TransformerLens's name, prefixed by `vision.` in the vision tower.
        module: path of the module that holds it.
        place: the module's "input" or "output", inside its "attention", the per-head "result" of an output projection,
            the "rest" of a block's output behind a stream inside it, or one of those of experts (`hooks.experts`).
        key: keyword of the input, field of the output, or None for the first positional / the tensor itself; of a rest,
            the module that is given the stream inside.
        split: which part of the last axis it is, as heads; None for the whole tensor as it is.
        axes: names of the axes that a hook function sees.
        inplace: a new value is copied into the tensor itself, because the residual branch holds the same tensor.
        coefficient: what the module's output is multiplied with before it is added to the stream; a hook function sees
            the product.
        relaid: its tensor has other axes before the last ones (tokens in a row, an axis of one); a hook function sees
            those of its block's stream.
        aside: the axis of parallel streams in the block's stream, of a point that is relaid and has none.
        moved: parallel streams are the tensor's first axis; a hook function sees them behind the tokens.
        experts: of a point of experts: how they are called.
        stream: of a point of experts, and of one that is relaid, path of the block whose stream says how tokens lie.
        expert: the one expert that is meant, of the name `....hook_expert_out.3`.
    """

    name: str
    module: str
    place: Place
    axes: tuple[str, ...]
    key: str | None = None
    split: Slice | None = None
    inplace: bool = False
    coefficient: float | str = 1.0
    relaid: bool = False
    aside: int | None = None
    moved: bool = False
    experts: Experts | None = None
    stream: str = ""
    expert: int | None = None

    @property
    def across(self) -> bool:
        """Whether it is of attention to another tower."""
        return ".cross_attn." in self.name

    @property
    def leaf(self) -> str:
        """The last part of the name, e.g. "hook_pattern"."""
        return self.name.removesuffix(f".{self.expert}").rpartition(".")[2]

    def of_expert(self, expert: int) -> "HookPoint":
        """The same of one expert alone: a hook function sees [batch pos d_model], and no other is computed."""
        axes = tuple(axis for axis in self.axes if axis != "expert")
        return replace(self, name=f"{self.name}.{expert}", axes=axes, expert=expert)

    @property
    def tower(self) -> str:
        """Prefix of the tower: "" in the decoder and outside the blocks."""
        return self.name.partition("blocks.")[0] if "blocks." in self.name else ""

    @property
    def token_axis(self) -> int | None:
        """The axis that runs over the decoder's tokens (over keys, where there is no other); None where none does."""
        names = ("pos", "query") if "cross_attn" in self.name else ("pos", "query", "key")
        return None if self.tower else next((self.axes.index(n) for n in names if n in self.axes), None)

    @property
    def layer(self) -> int | None:
        """Index of the block, None outside the blocks."""
        _, blocks, rest = self.name.rpartition("blocks.")
        return int(rest.split(".")[0]) if blocks else None


def hook_point_table(anatomy: Anatomy) -> dict[str, HookPoint]:
    """Every hook point of a model in the order of the forward pass, by name."""
    points = [*_others(anatomy), *_vision(anatomy), *_text(anatomy)]
    return {point.name: point for point in points}


def _others(anatomy: Anatomy) -> Iterator[HookPoint]:
    for tower in anatomy.others:
        for layer, block in enumerate(tower.blocks):
            yield from _block(f"{tower.name}.blocks.{layer}", block, _lead(tower, "image"), "d_tower")


def _vision(anatomy: Anatomy) -> Iterator[HookPoint]:
    for layer, block in enumerate(anatomy.vision.blocks):
        yield from _block(f"vision.blocks.{layer}", block, _lead(anatomy.vision, "image"), "d_vision")
    if anatomy.projector:
        axes = ("image_token", "d_model") if anatomy.projector_key else ("image", "image_token", "d_model")
        yield HookPoint("projector.hook_out", anatomy.projector, "output", axes, key=anatomy.projector_key)
    for layer, path in anatomy.deepstack.items():
        # Qwen3-VL adds these to resid_post[layer] at image tokens: resid_pre[layer + 1] is the sum.
        yield HookPoint(f"blocks.{layer}.hook_deepstack", path, "output", ("image_token", "d_model"))


def _text(anatomy: Anatomy) -> Iterator[HookPoint]:
    lead = _lead(anatomy.text, "batch")
    if anatomy.entry and anatomy.entry_key == "":
        yield HookPoint("hook_embed", anatomy.entry, "output", ("batch", "pos", "d_model"))
    elif anatomy.entry:
        given = anatomy.entry_key or "inputs_embeds"
        yield HookPoint("hook_embed", anatomy.entry, "input", ("batch", "pos", "d_model"), key=given)
    for layer, block in enumerate(anatomy.text.blocks):
        for point in _block(f"blocks.{layer}", block, lead, "d_model"):
            yield replace(point, moved=anatomy.text.streams == 0 and "stream" in point.axes)
    if anatomy.final_norm:
        yield HookPoint("ln_final.hook_normalized", anatomy.final_norm, "output", ("batch", "pos", "d_model"))


def _lead(tower: Tower, batch: str) -> tuple[str, ...]:
    """The axes of a stream before its width."""
    if tower.packed:
        return ("patch",)
    if batch == "batch":
        return ("batch", "pos") if tower.streams is None else ("batch", "pos", "stream")
    return {3: ("image", "patch"), 4: ("image", "row", "column")}.get(tower.ndim, ("image", "patch"))


def _block(name: str, block: Block, lead: tuple[str, ...], width: str) -> Iterator[HookPoint]:
    resid = (*lead, width)
    key = block.key or "hidden_states"
    yield HookPoint(f"{name}.hook_resid_pre", block.path, "input", resid, key=key)
    shown: set[Site] = set()
    for index, writer in enumerate(block.writers):
        if writer.site is not None:
            shown.add(writer.site)
            as_made = writer.module == writer.body and not writer.rest
            coefficient = writer.coefficient if as_made else 1.0
            yield from _site(f"{name}.{writer.role}", writer.site, lead, width, coefficient)
        if writer.role == "mlp" and writer.last is not None and not _earlier(block, index, "mlp"):
            yield HookPoint(f"{name}.mlp.hook_post", writer.last, "input", (*lead, "d_mlp"))
        if writer.experts is not None and not _earlier(block, index, "moe"):
            yield from _experts(f"{name}.mlp", block, writer.experts, lead, width)
        yield _written(name, block, index, writer, resid)
        if index + 1 < len(block.writers):
            yield from _between(name, block, index, resid)
    for site in block.sites:
        if site not in shown:
            yield from _site(f"{name}.{'cross_attn' if site.cross else 'attn'}", site, lead, width)
    yield HookPoint(f"{name}.hook_resid_post", block.path, "output", resid)


def _experts(
    name: str, block: Block, experts: Experts, lead: tuple[str, ...], width: str
) -> Iterator[HookPoint]:
    each = (*lead, "expert")
    if experts.router:
        yield HookPoint(
            f"{name}.hook_router_logits",
            experts.router,
            "router_logits",
            each,
            experts=experts,
            stream=block.path,
        )
    for leaf, module, axes in (
        ("router_weights", experts.scores or experts.module, each),
        ("expert_in", "" if experts.scores else experts.module, (*lead, width)),
        ("expert_out", experts.module, (*each, width)),
    ):
        if module:
            place: Place = leaf  # type: ignore[assignment]
            yield HookPoint(f"{name}.hook_{leaf}", module, place, axes, experts=experts, stream=block.path)


def unknown_points(anatomy: Anatomy) -> dict[str, str]:
    """Points that the anatomy does not know the place of, with the reason: of the embedding, of experts."""
    found: dict[str, str] = {}
    if not anatomy.entry:
        found["hook_embed"] = "no module was seen that hands the decoder its embeddings."
    for prefix, tower in anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            writer = block.writer("moe")
            leaves = {"router_logits", "router_weights", "expert_in", "expert_out"}
            if writer is None:
                continue
            name = f"{prefix}blocks.{layer}.mlp.hook"
            if writer.experts is None:
                found |= {f"{name}_{leaf}": writer.why for leaf in sorted(leaves)}
                continue
            if not writer.experts.router:
                found[f"{name}_router_logits"] = (
                    "no linear map to one number an expert was seen before its experts."
                )
            if writer.experts.scores:
                found[f"{name}_expert_in"] = "every expert is given every token, times its own weight."
    return found


def _earlier(block: Block, index: int, *roles: str) -> int:
    """How many writers of these roles stand before one."""
    return sum(writer.role in roles for writer in block.writers[:index])


def writer_points(name: str, block: Block) -> list[str]:
    """The hook points of what a block adds to its stream, in the order of its writers."""
    return [_written(name, block, index, writer, ()).name for index, writer in enumerate(block.writers)]


def _written(name: str, block: Block, index: int, writer: Writer, resid: tuple[str, ...]) -> HookPoint:
    leaf = OUT[writer.role]
    before = sum(OUT[other.role] == leaf for other in block.writers[:index])
    leaf = leaf if not before else f"{leaf}_{before + 1}"
    if writer.rest:
        return HookPoint(f"{name}.{leaf}", writer.module, "rest", resid, key=writer.reader)
    return HookPoint(f"{name}.{leaf}", writer.module, "output", resid, coefficient=writer.coefficient)


def _between(name: str, block: Block, index: int, resid: tuple[str, ...]) -> Iterator[HookPoint]:
    """The stream between one writer and the next, where the next reads it."""
    following = block.writers[index + 1]
    if following.state == index + 1 and following.reader is not None:
        leaf = _AFTER[block.writers[index].role]
        yield HookPoint(f"{name}.{leaf}", following.reader, "input", resid, inplace=True)


def interface_point(name: str, site: Site, lead: tuple[str, ...]) -> HookPoint:
    """Keys (a name that ends in `hook_rot_k`) or values (`hook_v`) as the attention call is given them."""
    return HookPoint(name, site.module, "attention", (*lead[:-1], "key", "kv_head", "d_head"))


def _site(
    name: str, site: Site, stream: tuple[str, ...], width: str, coefficient: float | str = 1.0
) -> Iterator[HookPoint]:
    lead = tuple(axis for axis in stream if axis != "stream")
    batch = lead[:-1]
    for letter, own in zip("qkv", (site.q, site.k, site.v), strict=True):
        if own is not None:
            tokens = (*batch, "key") if site.cross and letter != "q" else lead
            axes = (*tokens, "head" if letter == "q" else "kv_head", "d_head")
            yield HookPoint(f"{name}.hook_{letter}", own.module, "output", axes, split=own)
    if site.v is None:  # assembled (latent attention): as the call is given them
        yield interface_point(f"{name}.hook_v", site, lead)
    if site.rotary:
        yield HookPoint(f"{name}.hook_rot_q", site.module, "attention", (*lead, "head", "d_head"))
        yield interface_point(f"{name}.hook_rot_k", site, lead)
    square = (*batch, "head", "query", "key")
    yield HookPoint(f"{name}.hook_attn_scores", site.module, "attention", square)
    yield HookPoint(f"{name}.hook_pattern", site.module, "attention", square)
    z = (*lead, "head", "d_head")
    if site.out is None:
        yield HookPoint(f"{name}.hook_z", site.module, "attention", z)
        return
    heads = Slice(site.out, site.n_heads)
    yield HookPoint(f"{name}.hook_z", site.out, "input", z, split=heads)
    result = (*lead, "head", width)
    yield HookPoint(f"{name}.hook_result", site.out, "result", result, split=heads, coefficient=coefficient)
