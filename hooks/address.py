"""Addresses: one name for a component's two bodies, its activation and its weights.

Grammar (ranges are inclusive)::

    address := "embed" | "projector" | "ln_final" | "unembed" | "vision" | "rest"
             | [tower "."] "blocks." range [ "." part ]
    tower   := "vision" | "tower_" int
    part    := ("attn" | "cross_attn") [ ".head." range | ".kv_head." range ] | "mixer"
             | "mlp" [ ".neuron." range | ".expert." range ]
    range   := int | int "-" int
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hooks.errors import FrankenlensError, nearest, shown

WHOLE = ("embed", "projector", "ln_final", "unembed", "vision", "rest")
_BLOCKS = re.compile(
    r"(?:(?P<tower>vision|tower_[0-9]{1,4})\.)?blocks\.(?P<layers>[0-9]{1,4}(?:-[0-9]{1,4})?)"
    r"(?:\.(?P<sub>attn|cross_attn|mixer|mlp)"
    r"(?:\.(?P<unit>head|kv_head|neuron|expert)\.(?P<units>[0-9]{1,8}(?:-[0-9]{1,8})?))?)?"
)
MOST = 5_000_000
"""Single components of a range, at most: the neurons of the largest models are half of that."""
_UNITS = {
    "attn": ("head", "kv_head"),
    "cross_attn": ("head", "kv_head"),
    "mixer": (),
    "mlp": ("neuron", "expert"),
}
_EXAMPLES = (
    *WHOLE,
    "blocks.17",
    "blocks.9-18.mlp",
    "blocks.17.attn",
    "blocks.17.attn.head.3",
    "blocks.17.attn.kv_head.1",
    "blocks.17.mlp.neuron.5",
    "blocks.17.mlp.expert.12",
    "blocks.17.mixer",
    "blocks.17.cross_attn.head.3",
    "vision.blocks.5",
    "vision.blocks.5.attn.head.0",
    "vision.blocks.5.mlp",
)


@dataclass(frozen=True, order=True)
class Address:
    """A component (or an inclusive range of alike components) of a vision-language model.

    `kind` is "blocks" or one of `WHOLE`; `layers` and `units` are inclusive (first, last) pairs.
    """

    kind: str
    tower: str = "text"
    layers: tuple[int, int] | None = None
    sub: str | None = None
    unit: str | None = None
    units: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: "str | Address") -> "Address":
        """Parse the grammar of this module.

        Raises:
            FrankenlensError: the text names no component; the message shows the nearest valid form.
        """
        if isinstance(text, Address):
            return text
        if not isinstance(text, str):
            raise FrankenlensError(f"{shown(text)} is not an address, which is a text. {_examples()}")
        if text in WHOLE:
            return cls(text, "vision" if text == "vision" else "text")
        match = _BLOCKS.fullmatch(text)
        if match is None:
            raise FrankenlensError(
                f"{shown(text)} is not an address. {nearest(text, _EXAMPLES) or _examples()}"
            )
        sub, unit = match["sub"], match["unit"]
        if unit is not None and unit not in _UNITS[sub]:
            have = " / ".join(_UNITS[sub]) or "no parts of its own"
            raise FrankenlensError(f"{text!r}: {sub!r} has {have}, no {unit!r}.")
        return cls(
            "blocks",
            match["tower"] or "text",
            _range(match["layers"], text),
            sub,
            unit,
            _range(match["units"], text) if unit else None,
        )

    def __str__(self) -> str:
        if self.layers is None:
            return self.kind
        parts = [self.tower] if self.tower != "text" else []
        parts += ["blocks", _show(self.layers)]
        parts += [self.sub] if self.sub else []
        parts += [self.unit, _show(self.units)] if self.unit and self.units else []
        return ".".join(parts)

    def expand(self) -> Iterator["Address"]:
        """Every single component that this address covers, layer by layer.

        Raises:
            FrankenlensError: there are more than `MOST`.
        """
        if self.layers is None:
            yield self
            return
        spans = [last - first + 1 for first, last in (self.layers, self.units or (0, 0))]
        if spans[0] * spans[1] > MOST:
            raise FrankenlensError(
                f"{self} covers {spans[0] * spans[1]:,} components, more than a model has."
            )
        for layer in range(self.layers[0], self.layers[1] + 1):
            if self.units is None:
                yield replace(self, layers=(layer, layer))
            else:
                for unit in range(self.units[0], self.units[1] + 1):
                    yield replace(self, layers=(layer, layer), units=(unit, unit))

    @property
    def layer(self) -> int | None:
        """The layer of a single component; None for an embedding, projector, norm or unembedding."""
        return None if self.layers is None else self._single(self.layers)

    @property
    def index(self) -> int | None:
        """The head, kv head or neuron of a single component; None if the address names no such unit."""
        return None if self.units is None else self._single(self.units)

    @property
    def hook_name(self) -> str:
        """The hook point that carries this component's activation (for a head: its row of `hook_result`).

        Raises:
            FrankenlensError: a range, or a component whose activation is not one hook point.
        """
        whole = {
            "embed": "hook_embed",
            "projector": "projector.hook_out",
            "ln_final": "ln_final.hook_normalized",
        }
        if self.kind in whole:
            return whole[self.kind]
        if self.kind != "blocks":
            raise FrankenlensError(
                f"{self} has weights but no activation of its own; patch what it writes to instead."
            )
        block = f"{'' if self.tower == 'text' else f'{self.tower}.'}blocks.{self.layer}"
        suffix = {
            (None, None): "hook_resid_post",
            ("attn", None): "hook_attn_out",
            ("attn", "head"): "attn.hook_result",
            ("cross_attn", None): "hook_cross_attn_out",
            ("cross_attn", "head"): "cross_attn.hook_result",
            ("mixer", None): "hook_mixer_out",
            ("mlp", None): "hook_mlp_out",
            ("mlp", "expert"): "mlp.hook_expert_out",
            ("mlp", "neuron"): "mlp.hook_post",
        }
        if (self.sub, self.unit) not in suffix:
            raise FrankenlensError(
                f"{self} is shared keys and values: patch blocks.{self.layer}.attn.hook_k and hook_v."
            )
        return f"{block}.{suffix[self.sub, self.unit]}"

    def _single(self, pair: tuple[int, int]) -> int:
        if pair[0] != pair[1]:
            raise FrankenlensError(f"{self} is a range; expand() it into single components first.")
        return pair[0]


def _range(text: str, address: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    pair = (int(first), int(last or first))
    if pair[1] < pair[0]:
        raise FrankenlensError(f"{address!r}: the range {text} runs backwards; write {pair[1]}-{pair[0]}.")
    return pair


def _show(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}-{pair[1]}"


def _examples() -> str:
    return f"Valid forms: {', '.join(_EXAMPLES)}."
