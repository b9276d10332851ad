"""Tuned lens: an affine map of each layer's residual stream, trained so that what it spells is the model's own output.

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", 2303.08112. The map is
h + A h + b, started at A = 0, b = 0 (the logit lens), then the model's own final norm and unembedding; the loss is
KL(output || lens), in nats, by Adam.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.whereabouts import require_file
from interp.lens.streams import Streams, read_streams, resolve_layers
from interp.lens.tokens import Tokens, Where, tokens_of
from interp.pair.pair import weights_sha256
from interp.prompts import Prompt
from interp.results.whole import write_whole
from interp.statistics import distributions

_KIND = "frankenlens tuned lens 1"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Affine maps of one model's layers; the last layer's is the identity.

    Attributes:
        weight, bias: A and b, one per layer.
        layers: the layers they are of.
        fingerprint: SHA-256 of the weights of the model it was trained on.
        made: how it was trained, as plain JSON data; `loss` holds the mean KL (nats) of each step.
    """

    weight: Float[Tensor, "layer d_model d_model"] = field(repr=False)
    bias: Float[Tensor, "layer d_model"] = field(repr=False)
    layers: tuple[int, ...]
    fingerprint: str
    made: dict[str, Any] = field(repr=False)

    def __call__(self, layer: int, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead d_model"]:
        """A layer's residual stream, mapped, in its own precision.

        Raises:
            FrankenlensError: the lens has no such layer.
        """
        if layer == self.made["n_layers"]:
            return resid
        self._require_layer(layer)
        at = self.layers.index(layer)
        return _mapped(resid, self.weight[at], self.bias[at])

    def require(self, vlm: HookedVLM, layers: Sequence[int] = ()) -> None:
        """Refuse a model whose weights are not those the lens was trained on, and layers it was not trained on.

        Raises:
            FrankenlensError: they are not.
        """
        own, name = weights_sha256(vlm.model), getattr(vlm.model, "name_or_path", "")
        if own != self.fingerprint:
            raise FrankenlensError(
                f"this tuned lens was trained on {self.made['model']} with weights {self.fingerprint[:12]}…, this "
                f"model ({name or type(vlm.model).__name__}) has {own[:12]}…; train one "
                "with train_tuned_lens(vlm, prompts)."
            )
        for layer in layers:
            if layer != self.made["n_layers"]:
                self._require_layer(layer)

    def _require_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise FrankenlensError(
                f"this tuned lens was trained on layers {list(self.layers)}, not on layer {layer}; name layers that it "
                "has, or train it on more."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, all or nothing; how it was made and the model's fingerprint are in its metadata.

        Raises:
            FrankenlensError: the disk is full, or the place cannot be written to.
        """
        about = {"kind": _KIND, "fingerprint": self.fingerprint, "layers": json.dumps(self.layers)}
        about |= {"made": json.dumps(self.made)}
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        data = save(tensors, metadata=about | {"sha256": _checksum(tensors, about)})
        write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | Path, vlm: HookedVLM) -> TunedLens:
        """Read a lens that was trained on this very model.

        Raises:
            FrankenlensError: no such file, no tuned lens, a damaged one, or a lens of another model.
        """
        require_file(path, "a lens that TunedLens.save wrote")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).to(vlm.device) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FrankenlensError(f"{path}: cannot be read as safetensors: {error}") from error
        if about.get("kind") != _KIND or set(tensors) != {"weight", "bias"}:
            raise FrankenlensError(f"{path} is no tuned lens; TunedLens.save writes one.")
        found = about.pop("sha256", None)
        if found != _checksum(tensors, about):
            raise FrankenlensError(f"{path} is damaged: its checksum does not hold; train the lens again.")
        layers = tuple(json.loads(about["layers"]))
        lens = cls(
            tensors["weight"], tensors["bias"], layers, about["fingerprint"], json.loads(about["made"])
        )
        lens.require(vlm)
        return lens


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Of the numbers and of all that is said of them."""
    digest = sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_tuned_lens(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    where: Where = "all",
    steps: int = 400,
    tokens_a_step: int = 512,
    learning_rate: float = 1e-3,
    max_tokens: int = 20_000,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train an affine map for each layer on the user's own prompts. The model's weights get no gradient.

    Args:
        vlm: the model; it is not changed.
        prompts: what is read; the lens is as good as they are many.
        layers: which get a map; None: all but the last, whose lens is the output already.
        where: the tokens that count.
        steps: of Adam; the learning rate falls linearly to 0.
        tokens_a_step: drawn at random for each step.
        learning_rate: of the first step.
        max_tokens: at most so many tokens, drawn at random, are kept in memory (layers x tokens x d_model numbers).
        batch_size: prompts a forward.
        seed: of all draws.
        progress: show bars.

    Raises:
        FrankenlensError: no prompts, an empty role, no such layer; or the loss is not finite.
    """
    n = vlm.n_layers
    trained = [layer for layer in resolve_layers(layers, n) if layer != n]
    if not trained or steps < 1 or tokens_a_step < 1:
        raise FrankenlensError(
            f"nothing to train: layers {layers} (of 0 to {n - 1}), {steps} steps of {tokens_a_step} tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = _some(tokens_of(prompts, where), max_tokens, generator)
    streams = read_streams(vlm, tokens, trained, batch_size, progress)
    size = streams.final.shape[-1]
    wide = torch.promote_types(streams.final.dtype, torch.float32)
    weight = torch.zeros(len(trained), size, size, dtype=wide, device=vlm.device, requires_grad=True)
    bias = torch.zeros(len(trained), size, dtype=wide, device=vlm.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1.0 / steps, total_iters=max(1, steps - 1))
    losses = []
    for _ in tqdm(range(steps), desc="tuned lens", disable=not progress, delay=1):
        drawn = torch.randint(len(tokens), (min(tokens_a_step, len(tokens)),), generator=generator)
        losses.append(_gradients(streams, trained, weight, bias, drawn.to(vlm.device)))
        optimiser.step()
        falling.step()
    if not torch.isfinite(torch.tensor(losses)).all():
        raise FrankenlensError(
            f"the loss of the tuned lens is not finite; lower learning_rate ({learning_rate})."
        )
    made = {
        "model": getattr(vlm.model, "name_or_path", "") or type(vlm.model).__name__,
        "n_layers": n,
        "n_prompts": len(prompts),
        "n_tokens": len(tokens),
        "where": where if isinstance(where, str) else "positions",
        "steps": steps,
        "tokens_a_step": tokens_a_step,
        "learning_rate": learning_rate,
        "seed": seed,
        "loss": losses,
    }
    return TunedLens(weight.detach(), bias.detach(), tuple(trained), weights_sha256(vlm.model), made)


def _gradients(
    streams: Streams, layers: Sequence[int], weight: Tensor, bias: Tensor, drawn: Int[Tensor, " some"]
) -> float:
    """Gradients of KL(output || lens), summed over layers, into weight and bias alone; the mean over layers."""
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.no_grad():
        target = distributions.log_probabilities(streams.head(streams.final[drawn]))
    total = 0.0
    for at, layer in enumerate(layers):
        with torch.enable_grad():
            own = weight.detach()[at].requires_grad_(), bias.detach()[at].requires_grad_()
            spelt = streams.head(_mapped(streams.values[layer][drawn], *own))
            loss = distributions.kl(target, distributions.log_probabilities(spelt)).mean()
            weight.grad[at], bias.grad[at] = torch.autograd.grad(loss, own)
        total += loss.item()
    return total / len(layers)


def _mapped(resid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = resid.to(weight.dtype)
    return (wide + wide @ weight.T.to(wide.device) + bias.to(wide.device)).to(resid.dtype)


def _some(tokens: Tokens, most: int, generator: torch.Generator) -> Tokens:
    """At most so many of the tokens, drawn without replacement; prompts without one are left out."""
    if len(tokens) <= most:
        return tokens
    kept = torch.randperm(len(tokens), generator=generator)[:most].sort().values
    rows, row = tokens.row[kept].unique(return_inverse=True)
    prompts = tuple(tokens.prompts[index] for index in rows.tolist())
    return Tokens(prompts, row, tokens.position[kept])
