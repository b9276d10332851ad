"""The difference RL − IN of an activation on the same tokens: its mean, its principal directions, random ones beside.

Source: difference-in-means steering vectors (Rimsky et al. 2312.06681, Arditi et al. 2406.11717), here between two
models on one text instead of two texts in one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookContext, HookedVLM
from hooks.batches import fitting, forward_bytes, in_parts
from hooks.errors import nearest
from interp.lockstep.moved import WHEN
from interp.metrics.logits import sparing_logits
from interp.pair.pair import Pair
from interp.prompts import Prompt, PromptBatch, collate


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at a site. Adding it with coefficient 1 adds as much as RL − IN has of it.

    Attributes:
        name: e.g. "mean" or "pc 1".
        site: hook point that it is added to, e.g. `blocks.4.hook_resid_post`.
        vector: in the units of the activation; flattened where the point has a head axis.
        share: of the differences' sum of squares that lies along it; NaN where that says nothing.
    """

    name: str
    site: str
    vector: Float[Tensor, " d"] = field(repr=False)
    share: float = float("nan")

    @property
    def norm(self) -> float:
        """Its length."""
        return float(self.vector.norm())


@torch.no_grad()
def differences(
    pair: Pair,
    prompts: Sequence[Prompt],
    site: str,
    when: tuple[str, ...] = ("prefill", "generated"),
    batch_size: int = 32,
    progress: bool = False,
) -> Float[Tensor, "example d"]:
    """RL's activation minus IN's on the same tokens, mean over the tokens named, for each prompt (float32, CPU).

    Args:
        pair: IN and RL.
        prompts: with a trace, where tokens of a trace are named.
        site: hook point with a token axis.
        when: of `interp.lockstep.WHEN`: "prefill" is what stands before the trace, "generated" the trace.
        batch_size: prompts a forward.
        progress: a bar.

    Raises:
        FrankenlensError: no prompts, a site that has no token axis, or a prompt without such tokens; names the row.
    """
    require_site(pair.in_, site)
    if not prompts:
        raise FrankenlensError("differences need at least one prompt")
    for row, prompt in enumerate(prompts):
        if not bool(named(collate([prompt]), when).any()):
            raise FrankenlensError(
                f"row {row} ({prompt.example.id}) has none of the tokens {', '.join(when)}: give a prompt with a trace "
                "(prompt.with_tokens), or name other tokens"
            )
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found: dict[int, Tensor] = {}

    def measure(rows: Sequence[int]) -> Float[Tensor, "row d"]:
        batch = collate([prompts[row] for row in rows])
        where = named(batch, when)
        means = [_mean_at(vlm, batch, site, where) for vlm in (pair.rl, pair.in_)]
        return means[0] - means[1]

    width = max(map(len, prompts))
    sizes = [
        fitting(vlm, batch_size, 2 * forward_bytes(vlm, width), "a direction") for vlm in (pair.rl, pair.in_)
    ]
    with tqdm(total=len(order), desc="differences", unit="prompt", disable=not progress, delay=1) as bar:
        for rows, values in in_parts(order, min(sizes), measure):
            found |= dict(zip(rows, values, strict=True))
            bar.update(len(rows))
    return torch.stack([found[row] for row in range(len(prompts))])


def mean_difference(found: Float[Tensor, "example d"], site: str) -> Direction:
    """The mean over examples of `differences`; its share is that of a common shift in their sum of squares."""
    mean = found.mean(0)
    total = float((found.double() ** 2).sum())
    return Direction(
        "mean", site, mean, float(mean.double().norm() ** 2) * len(found) / total if total else np.nan
    )


def principal_directions(found: Float[Tensor, "example d"], site: str, k: int = 3) -> list[Direction]:
    """The k directions that hold most of `differences` (singular value decomposition, not centred: a common shift is
    a difference too), each as long as the examples' root mean square along it, pointing to their mean's side.

    Raises:
        FrankenlensError: k is not within the rank that so many examples and dimensions allow.
    """
    if not 1 <= k <= min(found.shape):
        raise FrankenlensError(f"k = {k}: {found.shape[0]} examples of {found.shape[1]} dimensions have 1 to "
                               f"{min(found.shape)} principal directions")  # fmt: skip
    _, sizes, rows = torch.linalg.svd(found.double(), full_matrices=False)
    shares = sizes**2 / (sizes**2).sum()
    chosen = []
    for i in range(k):
        sign = 1.0 if float(found.double().mean(0) @ rows[i]) >= 0 else -1.0
        vector = sign * rows[i] * sizes[i] / len(found) ** 0.5
        chosen.append(Direction(f"pc {i + 1}", site, vector.float(), float(shares[i])))
    return chosen


def random_directions(like: Direction, n: int, seed: int = 0) -> list[Direction]:
    """n directions at the same site, uniform on the sphere, as long as `like`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, len(like.vector), generator=generator, dtype=torch.float64)
    drawn = drawn / drawn.norm(dim=1, keepdim=True) * like.vector.double().norm()
    return [Direction(f"{like.name}, random {i + 1}", like.site, row.float()) for i, row in enumerate(drawn)]


def named(batch: PromptBatch, when: Sequence[str]) -> Bool[Tensor, "batch pos"]:
    """The tokens of finished prompts that `when` names.

    Raises:
        FrankenlensError: a name that does not exist.
    """
    mask = torch.zeros_like(batch.roles, dtype=torch.bool)
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)[None]
    starts = batch.columns(torch.tensor([p.n_prompt_tokens for p in batch.prompts], device=columns.device))
    real = batch.mask("all")
    for name in when:
        if name not in WHEN:
            raise FrankenlensError(
                f"when={name!r} is none of {', '.join(WHEN)}. {nearest(name, WHEN)}".strip()
            )
        if name in ("prefill", "generated"):
            written = columns >= starts[:, None]
            mask |= real & (written if name == "generated" else ~written)
        else:
            mask |= batch.mask(name)
    return mask


def require_site(vlm: HookedVLM, site: str) -> None:
    """Refuse a site without a token axis.

    Raises:
        FrankenlensError: an unknown hook point, or one of the vision side or of attention's squares.
    """
    axes = vlm.hook_points[vlm.names(site)[0]].axes
    if axes[:2] != ("batch", "pos"):
        raise FrankenlensError(
            f"{site} [{' '.join(axes)}] has no axis of the decoder's tokens; give a site such as "
            "blocks.3.hook_resid_post, blocks.3.hook_mlp_out or blocks.3.attn.hook_z"
        )


def _mean_at(
    vlm: HookedVLM, batch: PromptBatch, site: str, where: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d"]:
    """Mean of an activation over the tokens of each row; the activation itself is not kept."""
    kept: list[Tensor] = []

    def read(activation: Tensor, hook: HookContext) -> None:
        here = where.to(activation.device)
        flat = activation.flatten(2).float().masked_fill(~here[..., None], 0.0)
        kept.append((flat.sum(1) / here.sum(1, keepdim=True)).cpu())

    with sparing_logits(vlm) as extra:
        vlm.run_with_hooks(batch.to(vlm.device).inputs, [(site, read)], use_cache=False, **extra)
    return kept[0]
