"""Paths: from what a component writes to one input of a later component, by address.

Grammar, with the addresses of `hooks.address`::

    path     := sender " -> " [ receiver " -> " ]* receiver
    sender   := "embed" | "blocks.N.attn" | "blocks.N.attn.head.H" | "blocks.N.mlp"
    receiver := "blocks.N.attn.head.H.q" | "blocks.N.attn.kv_head.G.k" | "blocks.N.attn.kv_head.G.v"
              | "blocks.N.mlp" | "logits"

Keys and values belong to kv_heads, which grouped query heads share, so a path by k or v reaches the whole group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hooks import FrankenlensError, HookedVLM
from hooks.address import Address

Via = Literal["q", "k", "v", "in"]
Between = Literal["frozen", "mlps"]
ARROW = " -> "
_UNIT_OF = {"q": "head", "k": "kv_head", "v": "kv_head"}
_RECEIVERS = "blocks.7.attn.head.0.q, blocks.7.attn.kv_head.0.k (or .v), blocks.5.mlp or logits"
_SENDERS = "embed, blocks.3.attn, blocks.3.attn.head.1 or blocks.3.mlp"


@dataclass(frozen=True)
class Receiver:
    """One input of a component.

    Attributes:
        address: the head, kv_head or MLP; None for the logits.
        via: q, k or v of a head; "in" for an MLP or the logits.
    """

    address: Address | None = None
    via: Via = "in"

    @classmethod
    def parse(cls, text: str | Receiver) -> Receiver:
        """Parse the grammar of this module.

        Raises:
            FrankenlensError: the text names no receiver.
        """
        if isinstance(text, Receiver):
            return text
        text = text.strip()
        if text == "logits":
            return cls()
        name, _, via = text.rpartition(".")
        if via in _UNIT_OF:
            address = Address.parse(name)
            if address.tower == "text" and address.unit in ("head", "kv_head"):
                return cls(address, via)  # type: ignore[arg-type]
            raise FrankenlensError(f"{text!r}: only heads have a {via}; a receiver is {_RECEIVERS}.")
        address = Address.parse(text)
        if address.tower == "text" and address.sub == "mlp" and address.unit is None:
            return cls(address)
        hint = f" Add .q, .k or .v: {text}.q, for example." if address.sub == "attn" and address.unit else ""
        raise FrankenlensError(f"{text!r} is no receiver; it is {_RECEIVERS}.{hint}")

    def __str__(self) -> str:
        if self.address is None:
            return "logits"
        return str(self.address) if self.via == "in" else f"{self.address}.{self.via}"

    @property
    def layer(self) -> int | None:
        """None for the logits."""
        return None if self.address is None else self.address.layer

    @property
    def index(self) -> int | None:
        """The head (kv_head for k and v); None for an MLP or the logits."""
        return None if self.address is None else self.address.index


@dataclass(frozen=True)
class Path:
    """From a sender to a receiver, straight or through others.

    Attributes:
        sender: the component whose output is changed.
        receiver: the input that the change arrives at.
        through: receivers on the way, in order; each passes on the change of its component's own output.

    Example:
        >>> path = fl.Path.parse("blocks.3.attn.head.1 -> blocks.7.attn.head.0.q")
        >>> path.sender.layer, path.receiver.via
        (3, 'q')
    """

    sender: Address
    receiver: Receiver
    through: tuple[Receiver, ...] = ()

    @classmethod
    def parse(cls, text: str | Path) -> Path:
        """Parse the grammar of this module, e.g. "blocks.3.attn.head.1 -> blocks.7.attn.head.0.q".

        Raises:
            FrankenlensError: the text is no path.
        """
        if isinstance(text, Path):
            return text
        first, *rest = (part.strip() for part in text.split(ARROW.strip()))
        if not rest or not all([first, *rest]):
            raise FrankenlensError(
                f"{text!r} is no path; write SENDER{ARROW}RECEIVER: {_SENDERS}, then {_RECEIVERS}."
            )
        *through, last = (Receiver.parse(part) for part in rest)
        return cls(parse_sender(first), last, tuple(through))

    def __str__(self) -> str:
        return ARROW.join(map(str, (self.sender, *self.through, self.receiver)))


def parse_sender(text: str | Address) -> Address:
    """The address of a component that adds to the decoder's residual stream.

    Raises:
        FrankenlensError: the address names something else.
    """
    address = Address.parse(text)
    parts = (("attn", None), ("attn", "head"), ("mlp", None))
    in_block = address.kind == "blocks" and address.tower == "text" and (address.sub, address.unit) in parts
    if not in_block and address.kind != "embed":
        raise FrankenlensError(f"{str(address)!r} sends nothing into the residual stream; choose {_SENDERS}.")
    return address


def sender_hook(sender: Address) -> str:
    """The hook point of what a sender adds to the stream; for `embed`, what enters the first block."""
    return "blocks.0.hook_resid_pre" if sender.kind == "embed" else sender.hook_name


def writes_at(sender: Address) -> int:
    """Where in the order of the forward pass a sender writes: before the blocks, 2N (attention) or 2N + 1 (MLP)."""
    if sender.layer is None:
        return -1
    return 2 * sender.layer + (sender.sub == "mlp")


def reads_at(receiver: Receiver, n_layers: int) -> int:
    """Where a receiver reads, counted as in `writes_at`; it sees what was written before."""
    if receiver.layer is None:
        return 2 * n_layers
    return 2 * receiver.layer + (receiver.via == "in")


def receivers_of(vlm: HookedVLM, sender: str | Address, between: Between = "frozen") -> list[Receiver]:
    """Every receiver downstream of a sender, in the order of the forward pass.

    Args:
        vlm: the model.
        sender: an address.
        between: with "mlps", MLPs are parts of the paths and no receivers.
    """
    first = writes_at(parse_sender(sender))
    every = [one for one in _receivers(vlm) if reads_at(one, vlm.n_layers) > first]
    return [one for one in every if between == "frozen" or one.address is None or one.via != "in"]


def senders_of(vlm: HookedVLM, receiver: str | Receiver) -> list[Address]:
    """The embedding and every head and MLP upstream of a receiver, in the order of the forward pass."""
    last = reads_at(Receiver.parse(receiver), vlm.n_layers)
    return [sender for sender in all_senders(vlm) if writes_at(sender) < last]


def all_senders(vlm: HookedVLM) -> list[Address]:
    """The embedding and every head and MLP."""
    found = [Address.parse("embed")]
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        heads = [f"blocks.{layer}.attn.head.{head}" for head in range(block.n_heads)]
        found += [Address.parse(name) for name in (*heads, f"blocks.{layer}.mlp")]
    return found


def _receivers(vlm: HookedVLM) -> Iterator[Receiver]:
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        for via, unit in _UNIT_OF.items():
            for index in range(block.n_heads if unit == "head" else block.n_kv_heads):
                yield Receiver.parse(f"blocks.{layer}.attn.{unit}.{index}.{via}")
        yield Receiver.parse(f"blocks.{layer}.mlp")
    yield Receiver()


def require_paths(vlm: HookedVLM, paths: Sequence[Path], between: Between = "frozen") -> None:
    """Refuse paths that this model does not have.

    Raises:
        FrankenlensError: names the first such path by its row, and what there is instead.
    """
    if not paths:
        raise FrankenlensError("no path is given; write for example 'blocks.3.attn.head.1 -> logits'.")
    if between not in ("frozen", "mlps"):
        raise FrankenlensError(f"between={between!r}: choose 'frozen' or 'mlps'.")
    vlm.require("positions", "path patching")
    vlm.require("plain blocks", "path patching")
    vlm.require("head result", "path patching")
    seen: dict[Path, int] = {}
    for row, path in enumerate(paths):
        if path in seen:
            raise FrankenlensError(f"path {row} ({path}) is path {seen[path]} again; give each once.")
        seen[path] = row
        why = _fault(vlm, path, between)
        if why:
            raise FrankenlensError(f"path {row} ({path}): {why}.")
        places = [path.sender, *(r.address for r in (*path.through, path.receiver) if r.address is not None)]
        vlm.names([sender_hook(path.sender)])
        vlm.names([f"blocks.{place.layer}.hook_resid_mid" for place in places if place.layer is not None])


def _fault(vlm: HookedVLM, path: Path, between: Between) -> str:
    """What is wrong with a path; "" if nothing is."""
    nodes = [path.sender, *(r.address for r in (*path.through, path.receiver) if r.address is not None)]
    for node in nodes:
        if why := _absent(vlm, node):
            return why
    at = writes_at(path.sender)
    for receiver in (*path.through, path.receiver):
        if receiver.via != "in" and receiver.address is not None:
            wanted, got = _UNIT_OF[receiver.via], receiver.address.unit
            if wanted != got:
                return _wrong_unit(vlm, receiver)
        if reads_at(receiver, vlm.n_layers) <= at:
            return f"{receiver} reads before what stands left of it has written"
        if between == "mlps" and receiver.via == "in" and receiver.address is not None:
            return "with between='mlps' MLPs are parts of every path and no receivers"
        if receiver.address is None and receiver is not path.receiver:
            return "the logits end a path"
        at = 2 * (receiver.layer or 0) + (receiver.via == "in")
    return ""


def _absent(vlm: HookedVLM, node: Address) -> str:
    if node.layers is None:
        return ""
    if node.layers[0] != node.layers[1] or (node.units is not None and node.units[0] != node.units[1]):
        return f"{node} is a range; give its members one by one"
    layer = node.layers[0]
    if layer >= vlm.n_layers:
        return f"there is no layer {layer}; the decoder has layers 0-{vlm.n_layers - 1}"
    block = vlm.anatomy.text.blocks[layer]
    size = {"head": block.n_heads, "kv_head": block.n_kv_heads}.get(node.unit or "")
    if size is not None and node.units is not None and node.units[0] >= size:
        return f"there is no {node.unit} {node.units[0]} in layer {layer}; it has {node.unit}s 0-{size - 1}"
    return ""


def _wrong_unit(vlm: HookedVLM, receiver: Receiver) -> str:
    assert receiver.layer is not None and receiver.index is not None
    block = vlm.anatomy.text.blocks[receiver.layer]
    lead, group = f"blocks.{receiver.layer}.attn", block.n_heads // block.n_kv_heads
    if receiver.via == "q":
        first = receiver.index * group
        return f"queries belong to heads: {lead}.head.{first}.q, the first that reads this kv_head"
    return (
        f"keys and values belong to kv_heads: write {lead}.kv_head.{receiver.index // group}.{receiver.via}"
    )
