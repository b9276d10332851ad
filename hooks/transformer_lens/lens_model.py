"""The smallest model that TransformerLens's ActivationCache can work with: see `hooks.transformer_lens.export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy import Block
from hooks.errors import FrankenlensError
from hooks.opened import Opened
from hooks.plain import matrix, own_parameter, plain_weight
from hooks.selfcheck import tolerance
from hooks.weights import d_mlp

_AFTER_UNEMBEDDING = ("final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class Norm:
    """A layer norm or RMS norm, taken apart: gain * (x - mean(x) if centred) / scale(x) + bias."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centred: bool
    eps: float

    @classmethod
    def of(cls, module: nn.Module, resid: Float[Tensor, "*lead d_model"]) -> Norm:
        """Read off a module, and proved on its own output at one token.

        Raises:
            FrankenlensError: it is neither.
        """
        own: Any = module
        probe = resid.flatten(0, -2)[-1:]
        expected = module.forward(probe)
        eps = getattr(own, "variance_epsilon", getattr(own, "eps", None))
        weight, bias = own_parameter(own, "weight"), own_parameter(own, "bias")
        if weight is not None and eps is not None:
            for gain in (weight.detach(), 1 + weight.detach()):  # Gemma's is 1 + weight
                norm = cls(
                    gain, None if bias is None else bias.detach(), isinstance(own, nn.LayerNorm), float(eps)
                )
                again = norm.gain * norm.bare(probe) + (0 if norm.bias is None else norm.bias)
                if (again - expected).abs().max().item() <= tolerance(expected):
                    return norm
        raise FrankenlensError(
            f"{type(module).__name__} is neither a layer norm nor an RMS norm with a gain."
        )

    def scale(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead one"]:
        """What x is divided by, in float32 at least."""
        x = self._centre(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def bare(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """The norm without gain and bias."""
        return self._centre(x) / self.scale(x)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


class LensModel:
    """What TransformerLens's ActivationCache asks of a model: sizes, norms, W_U, W_O, W_out, biases, the tokenizer.

    Weights are the model's own, read when they are used; nothing is copied before.
    """

    def __init__(self, vlm: Opened, fold_ln: bool, center_unembed: bool) -> None:
        self._vlm, self.fold_ln, self.center_unembed = vlm, fold_ln, center_unembed
        self.tokenizer = getattr(vlm.processor, "tokenizer", None)
        config = vlm.model.config.get_text_config()
        for name in _AFTER_UNEMBEDDING:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise FrankenlensError(
                    f"{type(vlm.model).__name__} applies {name} after its unembedding, which TransformerLens's "
                    "attributions know nothing of; interp.lens does."
                )
        self._final: Any = vlm.module(vlm.anatomy.final_norm)
        self._unembed: Any = vlm.module(vlm.anatomy.unembed)
        block = vlm.anatomy.text.blocks[0]
        self._norm = Norm.of(
            self._final, torch.linspace(-1, 2, vlm.d_model).to(vlm.device, vlm.model.dtype)[None]
        )
        kind = "LN" if self._norm.centred else "RMS"
        self.cfg = SimpleNamespace(
            model_name=type(vlm.model).__name__, n_layers=vlm.n_layers, n_heads=block.n_heads,
            n_key_value_heads=block.n_kv_heads, d_model=vlm.d_model, d_head=block.d_head, d_mlp=d_mlp(vlm.model, block),
            d_vocab=self._unembed.weight.shape[0], attn_only=False, eps=self._norm.eps,
            normalization_type=f"{kind}Pre" if fold_ln else kind, final_rms=not self._norm.centred,
            positional_embedding_type="rotary", device=vlm.device, dtype=vlm.model.dtype,
        )  # fmt: skip
        self.blocks = [LensBlock(vlm, b) for b in vlm.anatomy.text.blocks]
        self.ln_final, self.unembed = (
            FinalNorm(self._norm.bare if fold_ln else self._final.forward),
            self._unembed,
        )

    @property
    def _rows(self) -> Float[Tensor, "d_vocab d_model"]:
        return matrix(self._unembed, "TransformerLens's attribution")

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, as `fold_ln` and `center_unembed` have it."""
        return self._columns(self._rows).T

    @cached_property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Its bias, with the final norm's where that is folded in."""
        weight, own = self._rows, own_parameter(self._unembed, "bias")
        bias = (
            torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            if own is None
            else own.detach()
        )
        if self.fold_ln and self._norm.bias is not None:
            bias = bias + weight @ self._norm.bias
        return bias - bias.mean() if self.center_unembed else bias

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Rows of W_U's transpose for a token, its id, or ids of any shape."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        rows = self._rows
        ids = torch.as_tensor(ids, device=rows.device)
        return self._columns(rows[ids.squeeze() if ids.numel() == 1 else ids])

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token."""
        if self.tokenizer is None:
            raise FrankenlensError(f"no tokenizer to look up {string!r}: open the model with its processor.")
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if len(ids) != 1:
            raise FrankenlensError(f"{string!r} is {len(ids)} tokens, not one.")
        return ids[0]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases of attention and MLP up to a layer."""
        total = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    def _columns(self, rows: Tensor) -> Tensor:
        """Rows of the unembedding's weight, processed."""
        if self.center_unembed:
            rows = rows - self._rows.mean(0)
        return rows * self._norm.gain if self.fold_ln else rows

    def _cannot_run(self, *_: Any, **__: Any) -> NoReturn:
        raise FrankenlensError("this stand-in holds weights and names and cannot run; use the HookedVLM.")

    __call__ = run_with_cache = run_with_hooks = to_tokens = _cannot_run


class FinalNorm(nn.Module):
    """The final norm; without its gain where that is folded into W_U."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """The normalized stream."""
        return self._norm(x)


class LensBlock:
    """`blocks[l].attn.W_O [head d_head d_model]`, `.mlp.W_out [d_mlp d_model]` and their biases."""

    def __init__(self, vlm: Opened, block: Block) -> None:
        self.attn, self.mlp = _Out(vlm, block.out, block.n_heads), _Out(vlm, block.mlp_out)


class _Out:
    def __init__(self, vlm: Opened, path: str, heads: int | None = None) -> None:
        self._vlm, self._path, self._heads = vlm, path, heads

    @property
    def _weight(self) -> Float[Tensor, "out in"]:
        linear = self._vlm.module(self._path)
        weight = plain_weight(linear)
        if weight is None:
            raise FrankenlensError(
                f"{self._path} is a {type(linear).__name__}: no plain weight to read. Cache hook_result, which is made "
                "by the module itself."
            )
        return weight

    @property
    def W_O(self) -> Tensor:
        assert self._heads is not None
        return self._weight.T.unflatten(0, (self._heads, -1))

    @property
    def W_out(self) -> Tensor:
        return self._weight.T

    @property
    def b_O(self) -> Tensor:
        bias = own_parameter(self._vlm.module(self._path), "bias")
        return self._weight.new_zeros(len(self._weight)) if bias is None else bias.detach()

    b_out = b_O
