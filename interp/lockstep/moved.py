"""What is moved from the donor to the recipient, and at which tokens; said in addresses and roles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hooks import Address, FrankenlensError, HookedVLM
from hooks.errors import nearest
from hooks.weights import n_units
from interp.prompts import Prompt
from interp.prompts.roles import ROLES

WHEN = ("prefill", "generated", *ROLES)
"""Tokens that can be named: all that were given, all that are written, or those of a role."""
EVERYWHERE = ("prefill", "generated")
_SEES_IMAGES = {"prefill", "image"}
_IN_THE_PROMPT = ("image", "question")


@dataclass(frozen=True)
class Moved:
    """Components of the recipient that take the donor's activations, and at which tokens.

    What a component writes at a token decides the *next* one: the first token of an answer is decided at the delimiter
    before it, which is `template`.

    Attributes:
        components: addresses, ranges too, or names of hook points with a token axis. A block takes the donor's
            `hook_resid_post`; its attention and MLP `hook_attn_out` and `hook_mlp_out`; a head what it writes through
            its own model's W_O; an expert what it contributes, weighted by its own model's router; a neuron
            `mlp.hook_post`; a kv_head `attn.hook_k` and `hook_v`, which the cache then holds; `embed` `hook_embed` (at
            image tokens: what the projector wrote); `projector` its output and Qwen3-VL's DeepStack states; `ln_final`
            `ln_final.hook_normalized`; `unembed` the donor's logits, so that moved alone it makes the recipient write
            what the donor would.
        when: of `WHEN`; any of them counts. Components of the vision side act while the prompt is read.
        from_divergence: only from the first token on at which the two models choose different next ones.

    Raises:
        FrankenlensError: no component, or tokens that do not exist.
    """

    components: str | tuple[str, ...]
    when: tuple[str, ...] = EVERYWHERE
    from_divergence: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.components, str):
            object.__setattr__(self, "components", (self.components,))
        if not self.components or not self.when:
            raise FrankenlensError(
                f"{self}: give at least one component and when it is moved ({', '.join(WHEN)})"
            )
        for name in self.when:
            if name not in WHEN:
                raise FrankenlensError(
                    f"when={name!r} is none of {', '.join(WHEN)}. {nearest(name, WHEN)}".strip()
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The components, always as a tuple."""
        return (self.components,) if isinstance(self.components, str) else self.components


@dataclass(frozen=True)
class Site:
    """One tensor that is written: all of it, some units of it, or what some heads add to it.

    Attributes:
        spec: which `Moved` it belongs to.
        hook: where it is written.
        heads: heads whose contribution to `hook` (an attention's output) is exchanged; read at `hook_z`.
        units: neurons or kv heads of `hook` that are exchanged.
        tokens: whether it has a token axis; the vision side has none and is written whole.
    """

    spec: int
    hook: str
    heads: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    tokens: bool = True

    @property
    def z(self) -> str:
        """Where the heads are read."""
        return self.hook.replace("hook_attn_out", "attn.hook_z")


def sites(vlm: HookedVLM, moved: Sequence[Moved]) -> list[Site]:
    """Every tensor to be written; heads of one attention together, and before the whole of it.

    Raises:
        FrankenlensError: a component that the model does not have, or that has no activation; the message names it.
    """
    found: dict[tuple[int, str, str], Site] = {}
    for spec, one in enumerate(moved):
        for name in one.names:
            for site, kind in _sites(vlm, spec, name):
                key = (spec, site.hook, kind)
                old = found.get(key)
                heads = tuple(sorted({*site.heads, *(old.heads if old else ())}))
                units = tuple(sorted({*site.units, *(old.units if old else ())}))
                found[key] = Site(spec, site.hook, heads, units, site.tokens)
    for site in found.values():
        _require_sees_images(moved[site.spec], site)
    return sorted(found.values(), key=lambda site: not (site.heads or site.units))


def moves_logits(moved: Sequence[Moved]) -> list[int]:
    """Which of `moved` hold the unembedding."""
    return [spec for spec, one in enumerate(moved) if "unembed" in one.names]


def require_roles(moved: Sequence[Moved], prompts: Sequence[Prompt]) -> None:
    """Refuse a role that a prompt does not have, or that no trace of its format can have.

    Raises:
        FrankenlensError: names the row.
    """
    wanted = {role for one in moved for role in one.when}
    early = {role for one in moved for role in one.when if _EARLY.intersection(_kinds(one))}
    for row, prompt in enumerate(prompts):
        for role in _IN_THE_PROMPT:
            if role not in prompt.roles and (role in wanted or (role == "image" and early)):
                raise FrankenlensError(
                    f"row {row} ({prompt.example.id}) has no token of the role {role!r}, so nothing can be moved "
                    "there: leave the row out, or name other tokens in when="
                )
        trace_format = prompt.builder.trace_format
        if "reasoning" in wanted and trace_format.reasoning is None and trace_format.answer is None:
            raise FrankenlensError(
                f"row {row} ({prompt.example.id}): its trace format has no reasoning, all that is written is answer; "
                'name "answer" or "generated" in when=, or give the format delimiters'
            )


_EARLY = {"vision", "projector"}


def _kinds(one: Moved) -> set[str]:
    return {name.split(".")[0] for name in one.names}


def _sites(vlm: HookedVLM, spec: int, name: str) -> Iterator[tuple[Site, str]]:
    if "hook_" in name:
        yield _hook_site(vlm, spec, name), "whole"
        return
    for address in Address.parse(name).expand():
        _require_there(vlm, address)
        if address.kind == "unembed":
            continue  # no hook point: the logits themselves
        if address.kind == "projector":
            deepstack = (hook for hook in vlm.hook_points if hook.endswith("hook_deepstack"))
            for hook in ("projector.hook_out", *deepstack):
                yield Site(spec, _live(vlm, hook), tokens=False), "whole"
            continue
        block = f"{'vision.' if address.tower == 'vision' else ''}blocks.{address.layer}"
        tokens = address.tower == "text"
        index = () if address.index is None else (address.index,)
        if address.unit == "head":
            _live(vlm, f"{block}.attn.hook_z")
            yield Site(spec, _live(vlm, f"{block}.hook_attn_out"), heads=index, tokens=tokens), "heads"
        elif address.unit == "expert":
            yield Site(spec, _live(vlm, f"{address.hook_name}.{address.index}"), tokens=tokens), "whole"
        elif address.unit == "kv_head":
            for letter in "kv":
                hook = _live(vlm, f"{block}.attn.hook_{letter}")
                yield Site(spec, hook, units=index, tokens=tokens), "units"
        else:
            kind = "units" if index else "whole"
            yield Site(spec, _live(vlm, address.hook_name), units=index, tokens=tokens), kind


def _hook_site(vlm: HookedVLM, spec: int, name: str) -> Site:
    axes = vlm.point(_live(vlm, name)).axes
    if axes[:2] != ("batch", "pos"):
        raise FrankenlensError(
            f"{name} [{' '.join(axes)}] has no axis of the decoder's tokens, so it cannot be moved token by token; "
            "give an address, or a hook point such as blocks.3.hook_resid_pre"
        )
    return Site(spec, name)


def _live(vlm: HookedVLM, hook: str) -> str:
    return vlm.names(hook)[0]


def _require_there(vlm: HookedVLM, address: Address) -> None:
    if address.layer is None:
        return
    tower = vlm.anatomy.vision if address.tower == "vision" else vlm.anatomy.text
    if address.layer >= len(tower.blocks):
        raise FrankenlensError(f"{address}: the model has blocks 0-{len(tower.blocks) - 1} there")
    if address.index is None:
        return
    block = tower.blocks[address.layer]
    size = n_units(vlm.model, block, address)
    if address.index >= size:
        raise FrankenlensError(f"{address}: the block has {address.unit}s 0-{size - 1}")


def _require_sees_images(one: Moved, site: Site) -> None:
    if not site.tokens and (one.from_divergence or not _SEES_IMAGES.intersection(one.when)):
        raise FrankenlensError(
            f"{site.hook} is computed once, while the prompt is read, for all of an image: move it with "
            'when=("image",) or ("prefill",) and without from_divergence'
        )
