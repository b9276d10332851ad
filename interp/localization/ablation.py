"""Layers, their halves and single heads left out while a model generates: does it still answer right?

`skip` passes the residual stream by (a block, or its attention or MLP alone); `zero` is the same for attention, MLP and
heads; `mean` puts the mean activation in, `resample`, at each token anew, the activation at a random token of the same
kind in another prompt's run. Mean and pool are taken per kind of token: the role in the prompt, and "generated" for all
that follows. A skipped block of Qwen3-VL still receives the DeepStack states, which are added behind the block.
The intervention is on during prefill and at every decoding step. Source: layer skip of 2602.12395, which has neither
halves, heads nor controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import Address, FrankenlensError, HookedVLM
from hooks.batches import fitting, forward_bytes, in_parts
from hooks.engine import HookContext, HookFunction
from hooks.weights import part_paths
from interp.localization.outcomes import Grader
from interp.localization.pools import GENERATED, Pool
from interp.metrics.logits import sparing_logits
from interp.pair.generation import greedy, greedy_batch, rows_fitting
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.pairing import content
from interp.questions.examples import cluster_of
from interp.questions.grading import Ungraded, grade
from interp.results.store import Store, fingerprint, under
from interp.results.store import part as finished_part

KINDS = ("skip", "zero", "mean", "resample")


@dataclass(frozen=True)
class Ablation:
    """One component, and what takes its place.

    Attributes:
        address: `blocks.3`, `blocks.3.attn`, `blocks.3.mlp`, `blocks.3.attn.head.1` or `blocks.3.mlp.expert.7`.
        kind: of `KINDS`; a whole block can only be skipped.

    Raises:
        FrankenlensError: anything else.
    """

    address: str
    kind: str = "skip"

    def __post_init__(self) -> None:
        place = Address.parse(self.address)
        if self.kind not in KINDS:
            raise FrankenlensError(f"there is no ablation {self.kind!r}; choose {', '.join(KINDS)}")
        if place.kind != "blocks" or place.tower != "text" or place.unit not in (None, "head", "expert"):
            raise FrankenlensError(
                f"{self.address} cannot be ablated while generating; give a decoder block, its .attn or .mlp, a head "
                "or an expert"
            )
        if place.sub is None and self.kind != "skip":
            raise FrankenlensError(
                f"{self.address} is a whole block: it can only be skipped, not {self.kind!r}"
            )

    @property
    def name(self) -> str:
        """E.g. `skip blocks.3`."""
        return f"{self.kind} {self.address}"

    @property
    def place(self) -> Address:
        """The component, single."""
        return Address.parse(self.address)

    @property
    def hook(self) -> str:
        """Where it acts."""
        layer, sub = self.place.layer, self.place.sub
        if self.place.unit == "head":
            return f"blocks.{layer}.attn.hook_z"
        if self.place.unit == "expert":
            return f"blocks.{layer}.mlp.hook_expert_out.{self.place.index}"
        return (
            f"blocks.{layer}."
            + {None: "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}[sub]
        )


_SUB = {"attn": "attn", "head": "attn", "mlp": "mlp", "expert": "mlp"}


def layers_of(
    vlm: HookedVLM, parts: Sequence[str] = ("block", "attn", "mlp"), kind: str = "skip"
) -> list[Ablation]:
    """Every layer's block, attention, MLP, heads ("head") or experts ("expert"), where a layer has them; blocks are
    skipped whatever the kind.

    Raises:
        FrankenlensError: another part.
    """
    found = []
    for part in parts:
        if part not in ("block", "attn", "mlp", "head", "expert"):
            raise FrankenlensError(f"there is no part {part!r}; choose of block, attn, mlp, head, expert")
        if part == "expert":
            vlm.require("experts", "ablation of experts")
        for layer in range(vlm.n_layers):
            if part != "block" and not part_paths(vlm.anatomy.text.blocks[layer], _SUB[part]):
                continue
            if part == "block":
                found.append(Ablation(f"blocks.{layer}", "skip"))
            elif part == "head":
                heads = vlm.anatomy.text.blocks[layer].n_heads
                found += [Ablation(f"blocks.{layer}.attn.head.{h}", kind) for h in range(heads)]
            elif part == "expert":
                found += [
                    Ablation(f"blocks.{layer}.mlp.expert.{e}", kind) for e in range(_n_experts(vlm, layer))
                ]
            else:
                found.append(Ablation(f"blocks.{layer}.{part}", kind))
    return found


def ablate(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    ablations: Sequence[Ablation],
    *,
    grader: Grader = grade,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    keep: Store | None = None,
) -> xr.Dataset:
    """Answers of the whole model and under every ablation, graded.

    An answer that cannot be read or graded counts as wrong under an ablation (breaking the form is an effect, and is
    counted in `parsed`, the reason in `fault`); prompts whose clean trace does not parse or cannot be graded are left
    out of every ablation, with the reason in `why`. What is written is kept, ablation by ablation, where there is a
    store.

    Returns:
        right [ablation example] and clean [example], NaN where left out; parsed [ablation example]; fault [ablation
        example] (why the grader cannot read an answer, "" where it can); why [example].

    Raises:
        FrankenlensError: no prompts, no ablations, or a component that the model does not have; before anything runs.
    """
    if not prompts or not ablations:
        raise FrankenlensError("an ablation needs at least one prompt and one component")
    for ablation in ablations:
        _require(vlm, ablation)
    traces = greedy(vlm, prompts, max_new_tokens, batch_size, progress, under(keep, "clean"))
    answers = [_answer(prompt, ids) for prompt, ids in zip(prompts, traces, strict=True)]
    graded = [_graded(answer, prompt, grader) for answer, prompt in zip(answers, prompts, strict=True)]
    why = [
        "the clean trace does not parse" if answer is None else fault
        for answer, (_, fault) in zip(answers, graded, strict=True)
    ]
    kept = [row for row, reason in enumerate(why) if not reason]
    clean = np.full(len(prompts), np.nan)
    clean[kept] = [graded[row][0] for row in kept]
    right = np.full((len(ablations), len(prompts)), np.nan)
    parsed, fault = right.copy(), np.full(right.shape, "", dtype=object)
    longer = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, traces, strict=True)]
    pools = cache(partial(_pools, vlm, longer, ablations, batch_size, seed))
    numbers = cache(partial(_numbers, longer))
    kept.sort(key=lambda row: len(prompts[row]))
    size = rows_fitting([vlm], [prompts[row] for row in kept], max_new_tokens, batch_size)
    total = -(-len(kept) // size) * len(ablations)
    with tqdm(total=total, desc="ablate", disable=not progress, delay=1) as bar:

        def measure(some: Sequence[int]) -> None:
            """Fills in these rows."""
            batch = [prompts[row] for row in some]
            for k, ablation in enumerate(ablations):

                def write(ablation: Ablation = ablation, rows: Sequence[int] = some) -> list[list[int]]:
                    whole = collate([prompts[row] for row in rows], "left").to(vlm.device)
                    pool = pools().get(ablation.hook)
                    owners = [numbers()[row] for row in rows] if ablation.kind == "resample" else []
                    hooks = ablation_hooks(ablation, whole, pool, owners, seed)
                    return greedy_batch(vlm, whole, max_new_tokens, hooks)

                of = fingerprint([list(one.ids) for one in batch], ablation.name, seed, some, max_new_tokens)
                written = finished_part(keep, f"{some[0]:06d}-{len(some)}-{k:06d}", write, of)
                for row, ids in zip(some, written, strict=True):
                    answer = _answer(prompts[row], ids)
                    grade_, fault[k, row] = _graded(answer, prompts[row], grader)
                    right[k, row] = np.nan_to_num(grade_)
                    parsed[k, row] = answer is not None
                bar.update()

        list(in_parts(kept, size, measure))
    places = [ablation.place for ablation in ablations]
    return xr.Dataset(
        {
            "right": (("ablation", "example"), right),
            "parsed": (("ablation", "example"), parsed),
            "fault": (("ablation", "example"), fault.astype(str)),
            "clean": ("example", clean),
            "why": ("example", np.array(why, dtype=str)),
        },
        coords={
            "ablation": [ablation.name for ablation in ablations],
            "kind": ("ablation", [ablation.kind for ablation in ablations]),
            "layer": ("ablation", [int(place.layer or 0) for place in places]),
            "part": ("ablation", [place.unit or place.sub or "block" for place in places]),
            "head": ("ablation", [-1 if place.index is None else place.index for place in places]),
            "example": [prompt.example.id for prompt in prompts],
            "task": ("example", [prompt.example.task for prompt in prompts]),
            "cluster": ("example", [cluster_of(prompt.example) for prompt in prompts]),
        },
        attrs={"seed": seed},
    )


def ablation_hooks(
    ablation: Ablation, batch: PromptBatch, pool: Pool | None = None, rows: Sequence[int] = (), seed: int = 0
) -> list[tuple[str, HookFunction]]:
    """The hooks of one ablation while `batch` is prefilled and continued.

    Args:
        ablation: what is done.
        batch: the prompts, padded on the left.
        pool: clean activations of its hook point; for mean and resample.
        rows: the batch's prompts as the pool numbers them; for resample.
        seed: of what `resample` draws; each prompt's draws are its own, whatever stands beside it.
    """
    kinds, own = batch.roles.long(), torch.tensor(rows, dtype=torch.long)
    generators = [_generator(prompt, seed) for prompt in batch.prompts] if ablation.kind == "resample" else []
    if ablation.place.sub is None:
        before: list[Tensor] = []

        def keep(activation: Tensor, hook: HookContext) -> None:
            before[:] = [activation.clone()]

        pre = ablation.hook.replace("resid_post", "resid_pre")
        return [(pre, keep), (ablation.hook, lambda activation, hook: before[0].to(activation.device))]

    def new(activation: Tensor) -> Tensor:
        if ablation.kind in ("skip", "zero"):
            return torch.zeros_like(activation)
        if pool is None:
            raise FrankenlensError(f"{ablation.name} needs the pool of its hook point")
        prefill = activation.shape[1] == kinds.shape[1]
        wanted = kinds if prefill else torch.full(activation.shape[:2], GENERATED)
        drawn = pool.mean(wanted) if ablation.kind == "mean" else pool.sample(wanted, own, generators)
        return drawn.to(activation)

    def write(activation: Tensor, hook: HookContext) -> Tensor:
        head = ablation.place.index
        if head is None or ablation.place.unit == "expert":
            return new(activation)
        whole = activation.clone()
        whole[:, :, head] = new(activation)[:, :, head]
        return whole

    return [(ablation.hook, write)]


@torch.no_grad()
def _pools(
    vlm: HookedVLM, prompts: Sequence[Prompt], ablations: Sequence[Ablation], batch_size: int, seed: int
) -> dict[str, Pool]:
    """Clean activations by hook point; those that are resampled are owned by their prompt's number (`_numbers`)."""
    names = list(dict.fromkeys(a.hook for a in ablations if a.kind in ("mean", "resample")))
    sampled = {a.hook for a in ablations if a.kind == "resample"}
    pools = {name: Pool() for name in names}
    number = _numbers(prompts) if sampled else []

    def read(rows: Sequence[int]) -> list[tuple[str, int, Tensor, dict[str, Tensor]]]:
        """Hook point, kind of token, its activations, and whose they are."""
        some, found = [prompts[row] for row in rows], []
        batch = collate(some).to(vlm.device)
        kinds = batch.roles.long()
        for row, prompt in enumerate(some):
            kinds[row, prompt.n_prompt_tokens : len(prompt)] = GENERATED
        owned = {}
        if sampled:
            owner = torch.tensor([number[row] for row in rows], device=kinds.device)
            owned = {"prompts": owner[:, None].expand_as(kinds), "keys": _keys(some, kinds, seed)}

        def take(activation: Tensor, hook: HookContext) -> None:
            for kind in range(GENERATED + 1):
                here = (kinds == kind).to(activation.device)
                of = {name: one[kinds == kind] for name, one in owned.items() if hook.name in sampled}
                found.append((hook.name, kind, activation[here], of))

        with sparing_logits(vlm) as extra:
            vlm.run_with_hooks(batch.inputs, [(name, take) for name in names], use_cache=False, **extra)
        return found

    if names:
        width = max(map(len, prompts))
        size = fitting(vlm, batch_size, (1 + len(names)) * forward_bytes(vlm, width), "an ablation")
        for _, found in in_parts(range(len(prompts)), size, read):
            for name, kind, activations, of in found:
                pools[name].add(kind, activations, **of)
    return pools


def _numbers(prompts: Sequence[Prompt]) -> list[int]:
    """One for all prompts that hold the same."""
    first: dict[str, int] = {}
    return [first.setdefault(content(prompt), row) for row, prompt in enumerate(prompts)]


def _generator(prompt: Prompt, seed: int) -> torch.Generator:
    """One of the prompt's own: of what it holds, not of where it stands."""
    return torch.Generator().manual_seed(seed + int(content(prompt)[:12], 16))


def _keys(
    prompts: Sequence[Prompt], kinds: Int[Tensor, "batch pos"], seed: int
) -> Float[Tensor, "batch pos"]:
    """A random number for every real token, its prompt's own; infinite on padding."""
    keys = torch.full(kinds.shape, torch.inf, dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        real = (kinds[row] >= 0).cpu()
        keys[row, real] = torch.rand(int(real.sum()), generator=_generator(prompt, seed), dtype=torch.float64)
    return keys.to(kinds.device)


def _answer(prompt: Prompt, ids: Sequence[int]) -> str | None:
    return prompt.builder.read_trace(prompt.with_tokens(ids)).answer


def _graded(answer: str | None, prompt: Prompt, grader: Grader) -> tuple[float, str]:
    """1, 0, or NaN with the reason."""
    try:
        return float(answer is not None and grader(answer, prompt.example)), ""
    except Ungraded as error:
        return float("nan"), str(error)


def _require(vlm: HookedVLM, ablation: Ablation) -> None:
    place, layers = ablation.place, vlm.n_layers
    if place.layer is None or place.layer >= layers:
        raise FrankenlensError(f"{ablation.address}: the decoder has blocks 0-{layers - 1}")
    if place.unit == "expert":
        experts = _n_experts(vlm, place.layer)
        if place.index is None or place.index >= experts:
            have = f"experts 0-{experts - 1}" if experts else "no experts that could be told apart"
            raise FrankenlensError(f"{ablation.address}: the block has {have}")
        vlm.names(ablation.hook)
        return
    heads = vlm.anatomy.text.blocks[place.layer].n_heads
    if place.index is not None and place.index >= heads:
        raise FrankenlensError(f"{ablation.address}: the block has heads 0-{heads - 1}")
    vlm.names(ablation.hook)


def _n_experts(vlm: HookedVLM, layer: int) -> int:
    writer = vlm.anatomy.text.blocks[layer].writer("moe")
    return 0 if writer is None or writer.experts is None else writer.experts.n_experts
