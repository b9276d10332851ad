"""Donors whose change is put together by hand, for what a single component does not show.

    query-key   the queries and keys of one key/value head's group are RL's, values and output matrices IN's
    joint       one MLP writes a flag that nothing reads, a later one reads it and writes: neither does anything alone
    cancelling  the values of a group of heads are scaled up, their output matrices down: nothing is computed otherwise
    backup      one MLP writes something; the next layer's writes as much where the first does not, and else nothing

The flag is a direction that the later MLP's input hardly has on the prompts given, and that its rewired neuron reads
quadratically (gate and up at once). A backup is a least-squares fit of the next MLP's output matrix, on activations
with and without the first one's change; one neuron of it is rewired to tell the two apart.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.metrics.logits import sparing_logits
from interp.prompts import Prompt, collate

WIRED = ("query-key", "joint", "cancelling", "backup")
SCALE = 2.0
"""Of values, of the kind cancelling."""
ON = 3.0
"""What the rewired neuron's gate and up read where the flag is set."""
BACKED_UP = 4.0
"""Norm of what is written and backed up, in those of what the MLP writes in IN."""
_RIDGE = 1e-3


def wired_names(in_: HookedVLM, kind: str, seed: int) -> tuple[str, ...]:
    """The components that a kind changes, drawn at random: a group of heads with what they share, or two MLPs.

    Raises:
        FrankenlensError: the model has no such components.
    """
    rng = random.Random(seed)
    if kind in ("query-key", "cancelling"):
        layer = rng.randrange(in_.n_layers)
        sites = [site for site in in_.anatomy.text.blocks[layer].sites if not site.cross]
        if not sites:
            raise FrankenlensError(
                f"pairs of kind {kind}: block {layer} does not attend; leave {kind} out of the kinds."
            )
        group, size = rng.randrange(sites[0].n_kv_heads), sites[0].n_heads // sites[0].n_kv_heads
        heads = [f"blocks.{layer}.attn.head.{group * size + i}" for i in range(size)]
        return (*heads, f"blocks.{layer}.attn.kv_head.{group}")
    if in_.n_layers < 2:
        raise FrankenlensError(
            f"pairs of kind {kind}: there is one layer, not two; leave {kind} out of the kinds."
        )
    if kind == "backup":
        first = rng.randrange(in_.n_layers - 1)
        return f"blocks.{first}.mlp", f"blocks.{first + 1}.mlp"
    first, second = sorted(rng.sample(range(in_.n_layers), 2))
    return f"blocks.{first}.mlp", f"blocks.{second}.mlp"


@torch.no_grad()
def wired(
    in_: HookedVLM, rl: HookedVLM, kind: str, names: Sequence[str], prompts: Sequence[Prompt], seed: int
) -> HookedVLM:
    """A copy of IN that is changed in these components alone.

    Args:
        in_, rl: the pair.
        kind: of `WIRED`.
        names: what `wired_names` returned.
        prompts: on which joint and backup are fitted, with what the models write after them.
        seed: of what is written.

    Raises:
        FrankenlensError: an MLP that is not made of gate, up and down matrices.
    """
    model = copy.deepcopy(in_.model)
    if kind in ("query-key", "cancelling"):
        _attention(model, in_, rl, kind, names)
    elif kind == "joint":
        _flagged(model, in_, names, prompts, seed)
    else:
        _backed_up(model, in_, names, prompts, seed)
    return HookedVLM(model, in_.processor, check=False)


def _attention(model: nn.Module, in_: HookedVLM, rl: HookedVLM, kind: str, names: Sequence[str]) -> None:
    own, theirs = dict(model.named_parameters()), dict(rl.model.named_parameters())
    block = in_.anatomy.text.blocks[int(names[0].split(".")[1])]
    site = next(site for site in block.sites if not site.cross)
    values = f"{site.v.module}." if site.v is not None else ""
    out = f"{site.out}." if site.out is not None else ""
    if not values or not out or site.k is None or site.k.module == site.v.module:  # type: ignore[union-attr]
        raise FrankenlensError(
            f"pairs of kind {kind}: {block.path} has no matrices of its own for keys and values; leave {kind} out."
        )
    for piece in (piece for name in names for piece in weight_slices(in_.model, in_.anatomy, name)):
        mine = piece.of(own[piece.parameter])
        if kind == "query-key" and not piece.parameter.startswith((values, out)):
            mine.copy_(piece.of(theirs[piece.parameter]))
        if kind == "cancelling" and piece.parameter.startswith(values):
            mine.mul_(SCALE)
        if kind == "cancelling" and piece.parameter.startswith(out):
            mine.div_(SCALE)


@dataclass(frozen=True)
class _Seen:
    """What an MLP of IN reads and does on real tokens."""

    stream: Float[Tensor, "token d_model"]
    reads: Float[Tensor, "token d_model"]
    inside: Float[Tensor, "token d_mlp"]
    writes: Float[Tensor, "token d_model"]


def _flagged(
    model: nn.Module, in_: HookedVLM, names: Sequence[str], prompts: Sequence[Prompt], seed: int
) -> None:
    layers = [int(name.split(".")[1]) for name in names]
    parts: list[dict[str, Tensor]] = [_matrices(model, in_, layer) for layer in layers]
    first, second = (_seen(in_, layer, prompts) for layer in layers)
    flag, reader, level = _flag(second)
    written = _random(second.writes, seed)
    parts[0]["down"] += torch.outer(flag, _constant(first)).to(parts[0]["down"])
    neuron = _rewired(parts[1], second, reader / level)
    on = float(nn.functional.silu(torch.tensor(ON))) * ON
    parts[1]["down"][:, neuron] = (written / on).to(parts[1]["down"])


def _backed_up(
    model: nn.Module, in_: HookedVLM, names: Sequence[str], prompts: Sequence[Prompt], seed: int
) -> None:
    """The first writes a random direction on every token, the second what the stream lacks after it if it does not."""
    layers = [int(name.split(".")[1]) for name in names]
    parts = [_matrices(model, in_, layer) for layer in layers]
    first, without = (_seen(in_, layer, prompts) for layer in layers)
    written = BACKED_UP * _random(first.writes, seed)
    parts[0]["down"] += torch.outer(written, _constant(first)).to(parts[0]["down"])
    changed = HookedVLM(model, in_.processor, check=False)
    try:
        present = _seen(changed, layers[1], prompts)
    finally:
        changed.close()
    reads = torch.cat([present.reads, without.reads])
    there = torch.cat([torch.ones(len(present.reads)), torch.zeros(len(without.reads))]).to(reads)
    reader = _least_squares(reads, there[:, None])[:, 0]
    neuron = _rewired(parts[1], without, reader)
    inside = torch.cat([present.inside, without.inside])
    inside[:, neuron] = nn.functional.silu(reads @ reader * ON) * (reads @ reader * ON)
    wanted = torch.cat([present.writes, present.stream + present.writes - without.stream])
    missing = wanted - inside @ parts[1]["down"].T.to(wanted)
    parts[1]["down"] += _least_squares(inside, missing).T.to(parts[1]["down"])


def _random(writes: Float[Tensor, "token d_model"], seed: int) -> Float[Tensor, " d_model"]:
    """A direction drawn at random, as long as what is written on a token."""
    drawn = torch.randn(writes.shape[1], generator=torch.Generator().manual_seed(seed)).to(writes)
    return drawn * (writes.norm(dim=-1).mean() / drawn.norm())


def _rewired(mlp: dict[str, Tensor], seen: _Seen, reader: Float[Tensor, " d_model"]) -> int:
    """The least used neuron, whose gate and up now read ON where the reader reads 1."""
    neuron = int((seen.inside.abs().mean(0) * mlp["down"].norm(dim=0)).argmin())
    for name in ("gate", "up"):
        mlp[name][neuron] = (reader * ON).to(mlp[name])
    return neuron


def _flag(seen: _Seen) -> tuple[Tensor, Tensor, float]:
    """What is added to the stream, the direction of the MLP's input that shows it, and how high it stands there."""
    size = seen.stream.square().mean(-1, keepdim=True).sqrt()
    normed = seen.stream / size
    gain = (seen.reads * normed).sum(0) / normed.square().sum(0)
    strength, directions = torch.linalg.eigh(seen.reads.T @ seen.reads / len(seen.reads))
    reader = directions[:, 0]
    level = float(max(10 * strength[0].clamp_min(0).sqrt(), 0.3 * strength.mean().sqrt()))
    along = reader / gain
    return along * (level * float(size.mean()) / float(reader @ (gain * along))), reader, level


def _constant(seen: _Seen) -> Float[Tensor, " d_mlp"]:
    """Weights on an MLP's neurons that come to 1 on every token, as nearly as can be."""
    return _least_squares(seen.inside, torch.ones(len(seen.inside), 1).to(seen.inside))[:, 0]


def _least_squares(
    given: Float[Tensor, "token feature"], wanted: Float[Tensor, "token target"]
) -> Float[Tensor, "feature target"]:
    gram = given.T @ given
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(gram + ridge, given.T @ wanted)


def _seen(in_: HookedVLM, layer: int, prompts: Sequence[Prompt]) -> _Seen:
    batch = collate(prompts).to(in_.device)
    names = [f"blocks.{layer}.{leaf}" for leaf in ("hook_resid_mid", "mlp.hook_post", "hook_mlp_out")]
    kept: list[Tensor] = []
    module = in_.model.get_submodule(in_.anatomy.text.blocks[layer].mlp)
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    try:
        with sparing_logits(in_) as extra:
            _, cache = in_.run_with_cache(batch.inputs, names, use_cache=False, **extra)
    finally:
        handle.remove()
    real = batch.mask("all")
    stream, inside, writes = (cache[name][real].double() for name in names)
    return _Seen(stream, kept[0].reshape(*real.shape, -1)[real].double(), inside, writes)


def _matrices(model: nn.Module, in_: HookedVLM, layer: int) -> dict[str, Tensor]:
    """gate, up [d_mlp d_model] and down [d_model d_mlp]."""
    pieces = weight_slices(in_.model, in_.anatomy, f"blocks.{layer}.mlp")
    own = dict(model.named_parameters())
    found: dict[str, Tensor] = {
        part: own[piece.parameter]
        for piece in pieces
        for part in ("gate", "up", "down")
        if piece.parameter.endswith(f".{part}_proj.weight")
    }
    if len(found) < 3:
        raise FrankenlensError(
            f"blocks.{layer}.mlp is not made of gate, up and down matrices; leave joint and backup out of the kinds."
        )
    return found
