"""What a model is made of: towers of blocks, blocks of writers, attention sites, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooks.errors import FrankenlensError

Role = Literal["attn", "cross_attn", "mixer", "mlp", "moe", "rest"]


class Absent(FrankenlensError):
    """The model has no such part, or it could not be proved."""


@dataclass(frozen=True)
class Slice:
    """Which entries of a tensor's last axis are the heads of one of q, k, v, and how they are laid out.

    The axis is `groups` groups of equal width; of each group the entries `start` to `start + length` belong to it, head
    after head. One group: [q | k | v] behind one another; as many groups as key heads: interleaved.

    Attributes:
        module: path of the layer whose output (for z: whose input) it is.
        heads: number of heads.
        groups, start, length, width: see above; a length of 0 is the whole axis.
    """

    module: str
    heads: int
    groups: int = 1
    start: int = 0
    length: int = 0
    width: int = 0

    @property
    def whole(self) -> bool:
        """Whether the whole axis belongs to it."""
        return self.length == self.width

    def of(self, tensor: Shaped[Tensor, "*lead width"]) -> Shaped[Tensor, "*lead head d_head"]:
        """The heads."""
        if self.whole:
            return tensor.unflatten(-1, (self.heads, -1))
        part = tensor.unflatten(-1, (self.groups, -1)).narrow(-1, self.start, self.length)
        return part.flatten(-2).unflatten(-1, (self.heads, -1))

    def into(
        self, tensor: Shaped[Tensor, "*lead width"], new: Shaped[Tensor, "*lead head d_head"]
    ) -> Shaped[Tensor, "*lead width"]:
        """The tensor with its heads replaced."""
        flat = new.flatten(-2)
        if self.whole:
            return flat
        grouped = tensor.unflatten(-1, (self.groups, -1))
        end = self.start + self.length
        parts = (grouped[..., : self.start], flat.unflatten(-1, (self.groups, -1)), grouped[..., end:])
        return torch.cat(parts, dim=-1).flatten(-2)

    def rows(self, head: int, width: int = 0) -> tuple[int, int]:
        """First entry and number of entries of one head, on an axis of `width` entries."""
        if self.whole:
            d_head = width // self.heads
            return head * d_head, d_head
        d_head = self.groups * self.length // self.heads
        group, inside = divmod(head * d_head, self.length)
        return group * self.width + self.start + inside, d_head


@dataclass(frozen=True)
class Site:
    """One attention call inside a block.

    Attributes:
        module: path of the module that calls the attention interface.
        n_heads, n_kv_heads, d_head, d_value: as the call shows them.
        q, k, v: the projections that were seen to make them; None where none makes exactly them.
        out: the linear layer whose input is the call's output (W_O); None where something lies between.
        rotary: whether q and k are changed (rotated, normed) between projection and call.
        cross: whether keys come from elsewhere than queries.
    """

    module: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    q: Slice | None = None
    k: Slice | None = None
    v: Slice | None = None
    out: str | None = None
    rotary: bool = False
    cross: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of an MLP, all in one module that is called with tokens, the chosen experts and their weights.

    Attributes:
        module: path of that module.
        n_experts: how many there are.
        hidden, chosen, weights: position or keyword, in its call, of the tokens [token d], of the experts chosen for
            each [token k], and of their weights [token k]. `chosen` and `weights` are None where every expert is given
            every token, weighted already (Llama 4).
        router: path of the module that makes the logits of the experts; "" if it was not found.
        router_weight: the router's parameter by which it makes them inside its forward; "" where they are its output.
        scores: path of the module whose output is the weights [token expert], where every expert is given every token.
        added: whether what they give out is added as it is to what the MLP gives out (no scale or norm between).
    """

    module: str
    n_experts: int
    hidden: int | str
    chosen: int | str | None = None
    weights: int | str | None = None
    router: str = ""
    router_weight: str = ""
    scores: str = ""
    added: bool = False


@dataclass(frozen=True)
class Writer:
    """What a block adds to its stream, in order.

    Attributes:
        role: what the part that makes it does.
        module: path of the module whose output is added.
        body: path of the part that makes it: `module` itself, or what a post-norm normalizes.
        coefficient: what the output is multiplied with before it is added: a number, or an expression of a parameter,
            `path` or `tanh(path)`, one per channel or one in all.
        state: which state of the stream it reads: 0 is resid_pre, 1 that after the first writer, ...; None if unknown.
        reader: path of the module (a norm) whose input is that state.
        site: the attention call inside.
        last: of an MLP, path of the linear layer whose output is the body's output.
        rest: no module's output is what is added: it is the difference between the block's output (`module` is the
            block) and the state that `reader` is given. The role is "rest" where more than one part makes it, or where
            the stream itself is changed (a norm of BERT's).
        experts: of an MLP of experts, where they are one module; `why` says why they are not known.
        parts: the outermost modules with matrices that make it together, where that is not the body alone (Gemma 4: an
            MLP beside experts; OPT: two layers of the block itself), and norms behind them.
        alone: whether `body` makes it of what `reader` gives out (or of the state itself, with `reader` inside it).
    """

    role: Role
    module: str
    body: str
    coefficient: float | str = 1.0
    state: int | None = None
    reader: str | None = None
    site: Site | None = None
    last: str | None = None
    rest: bool = False
    experts: Experts | None = None
    why: str = ""
    parts: tuple[str, ...] = ()
    alone: bool = True

    @property
    def norm(self) -> str | None:
        """What stands between the stream and the part; None where the part reads the stream as it is (OLMo 2)."""
        if self.reader is None or f"{self.reader}.".startswith(f"{self.body}.") or self.reader in self.parts:
            return None
        return self.reader


@dataclass(frozen=True)
class Block:
    """One block of a tower: its stream, its writers in order, its attention.

    The stream comes in as the first floating tensor of the call (`key` None) or by the keyword `key`, and goes out as
    the output, or its first tensor: resid_post = gain · (resid_pre + Σ coefficient · output). `writers` is empty where
    what it adds could not be taken apart; `why` says so.
    """

    path: str
    key: str | None = None
    writers: tuple[Writer, ...] = ()
    sites: tuple[Site, ...] = ()
    why: str = ""
    gain: float | str = 1.0

    def writer(self, *roles: Role) -> Writer | None:
        """The first writer of these roles."""
        return next((one for one in self.writers if one.role in roles), None)

    @property
    def site(self) -> Site | None:
        """The attention of the block to itself."""
        return next((one for one in self.sites if not one.cross), None)

    @property
    def plain(self) -> bool:
        """A pre-norm block: attention, then an MLP that reads what it wrote, nothing between them and the stream."""
        attn, mlp = (*self.writers, None, None)[:2]
        return (
            len(self.writers) == 2
            and self.gain == 1.0
            and attn is not None
            and mlp is not None
            and attn.role == "attn"
            and mlp.role in ("mlp", "moe")
            and attn.module == attn.body
            and mlp.module == mlp.body
            and (attn.coefficient, mlp.coefficient) == (1.0, 1.0)
            and (attn.state, mlp.state) == (0, 1)
            and None not in (attn.reader, mlp.reader)
            and mlp.alone
            and self.site is not None
        )

    # What analyses ask for by name; each raises `Absent` where the block has no such part.

    @property
    def attention(self) -> str:
        """The module that attends."""
        return self._require(self.site, "attention").module

    @property
    def out(self) -> str:
        """W_O's module."""
        return self._some(self._require(self.site, "attention").out, "output projection behind its attention")

    @property
    def mlp(self) -> str:
        """The MLP (dense, or of experts)."""
        return self._require(self.writer("mlp", "moe"), "MLP").body

    @property
    def mlp_out(self) -> str:
        """The linear layer that writes the MLP's output."""
        return self._some(self._require(self.writer("mlp"), "dense MLP").last, "last linear layer of its MLP")

    @property
    def pre_norm(self) -> str:
        """The norm that the first writer reads through."""
        first = self.writers[0] if self.writers else None
        return self._some(first and first.norm, "norm before its first part")

    @property
    def mid_norm(self) -> str:
        """The norm between attention and MLP."""
        return self._some((w := self.writer("mlp", "moe")) and w.norm, "norm before its MLP")

    @property
    def qkv(self) -> tuple[str, ...]:
        """Modules of q, k and v: three, or one that makes all of them."""
        site = self._require(self.site, "attention")
        paths = [
            self._require(s, f"projection of {n}").module
            for n, s in zip("qkv", (site.q, site.k, site.v), strict=True)
        ]
        return tuple(dict.fromkeys(paths))

    @property
    def n_heads(self) -> int:
        """Query heads; 0 where the block does not attend."""
        return self.site.n_heads if self.site else 0

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads; 0 where the block does not attend."""
        return self.site.n_kv_heads if self.site else 0

    @property
    def d_head(self) -> int:
        """Size of a head's output."""
        return self.site.d_value if self.site else 0

    @property
    def rotary(self) -> bool:
        """Whether q and k are rotated."""
        return bool(self.site and self.site.rotary)

    def _require(self, part: Any, what: str) -> Any:
        if part is None:
            raise Absent(f"{self.path} has no {what}." + (f" {self.why}" if self.why else ""))
        return part

    def _some(self, path: str | None, what: str) -> str:
        return self._require(path, what)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks. `packed` towers run on [patch, d] without a batch axis.

    Attributes:
        path: the module that holds the stack, for weights.
        blocks: in the order in which they run.
        packed: whether the stream has no batch axis.
        name: prefix of its addresses where it is neither the decoder nor the vision tower.
        width: of the stream.
        ndim: axes of the stream.
        streams: of a decoder, the axis of its parallel streams; None where there is one stream.
    """

    path: str
    blocks: tuple[Block, ...]
    packed: bool = False
    name: str = ""
    width: int = 0
    ndim: int = 3
    streams: int | None = None


@dataclass(frozen=True)
class Anatomy:
    """Where everything is; "" stands for what a model does not have, or what could not be proved (`absent` says why).

    Attributes:
        text, vision: the decoder, and the tower whose output reaches it as the image (no blocks where there is none).
        others: further towers: an encoder, a second vision tower, a resampler.
        embed, final_norm, unembed: module paths.
        entry, entry_key: the module, and the keyword of its input, where the decoder is handed its embeddings.
        projector, projector_key, projector_weights: where image rows, or what cross-attention reads, come
            from, the field of that module's output (None
            for a plain tensor), and the module that holds the weights.
        deepstack: layer to the module whose output is added to the stream at image tokens behind that layer's block.
        softcap, scale: logits = softcap * tanh(scale * unembedding / softcap); None and 1 where there is no such thing.
        absent: part to the reason why it is not there.
    """

    text: Tower
    vision: Tower
    embed: str
    final_norm: str
    unembed: str
    projector: str = ""
    projector_key: str | None = None
    projector_weights: str = ""
    deepstack: Mapping[int, str] = field(default_factory=dict)
    entry: str = ""
    entry_key: str | None = None
    others: tuple[Tower, ...] = ()
    softcap: float | None = None
    scale: float = 1.0
    absent: Mapping[str, str] = field(default_factory=dict)

    def after_unembedding(self, raw: Shaped[Tensor, "*lead vocab"]) -> Shaped[Tensor, "*lead vocab"]:
        """Logits of the unembedding's output."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def towers(self) -> dict[str, Tower]:
        """Every tower by the prefix of its addresses and hook names ("" is the decoder)."""
        found = {"": self.text}
        if self.vision.blocks:
            found["vision."] = self.vision
        return found | {f"{tower.name}.": tower for tower in self.others}
