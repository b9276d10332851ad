"""That numbers are exact on the device: six tiny families x precisions x attention, against the bare model.

In float32 (TF32 off) the bounds are those of the tests on a CPU, 1e-5 x max(1, largest logit). In bfloat16 an
intervention may be twice as far from the same weights in float32 as one plain forward is
(tests/interp/sweep/test_sweep.py); what is only read is bit-identical.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, collate
from interp.sweep import Intervention, sweep
from tests.benchmarks.gpu.steps import Step
from tests.families import FAMILIES, TinyVLM, tiny
from tests.hooks.reference import Taps, parts, reference, tolerance

TEXTS = ("how many red", "what shape in row 2 is there")
METRIC = LogitDifference(torch.arange(2) + 30, torch.arange(2) + 40)
SITES = {
    "stream": Intervention("blocks.1.hook_resid_pre", "zero", -3),
    "head": Intervention("blocks.1.attn.hook_z", "zero", "all", 2),
    "head at the image": Intervention("blocks.0.attn.hook_z", "zero", "image", 1),
    "MLP": Intervention("blocks.1.hook_mlp_out", "scale", "all", value=0.5),
}


def steps_of(device: torch.device) -> list[Step]:
    """A step for each family."""
    return [Step(family, 12, partial(family_cases, family, device)) for family in FAMILIES]


def cases() -> list[tuple[torch.dtype, str]]:
    """Precisions and kinds of attention; flash attention where it is installed, which knows no float32."""
    found = [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("eager", "sdpa")]
    return [*found, *([(torch.bfloat16, "flash_attention_2")] if find_spec("flash_attn") else [])]


def family_cases(family: str, device: torch.device) -> dict[str, Any]:
    """All cases of a family; those that fail are named together.

    Raises:
        AssertionError: some did.
    """
    found: dict[str, Any] = {}
    failed = []
    with without_tf32():
        for dtype, kind in cases():
            name = f"{str(dtype).removeprefix('torch.')} {kind}"
            try:
                found[name] = case(family, device, dtype, kind)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}"[:600])
    if failed:
        raise AssertionError(f"{len(failed)} of {len(cases())}: {'; '.join(failed)}; the others: {found}")
    return found


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 that is float32, in matrix products and convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def case(family: str, device: torch.device, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """One family in one precision with one attention."""
    given = tiny(family)
    given.model.to(device, dtype).requires_grad_(False)
    given.model.set_attn_implementation(kind)
    padded = on(device, given.inputs(batch=2))
    bare = logits_of(given.model, padded)
    vlm = HookedVLM(given.model, inputs=on(device, given.inputs()))
    same(logits_of(vlm, padded), bare, "logits with nothing attached")
    found: dict[str, Any] = {"points": points(vlm, given, padded)}
    if dtype == torch.float32:
        found["of_reference"] = against_reference(vlm, given, on(device, given.inputs()))
    found |= interventions(vlm, given, device)
    same(logits_of(vlm, padded), bare, "logits after all of it")
    vlm.close()
    same(logits_of(given.model, padded), bare, "logits of the closed model")
    return found


def points(vlm: HookedVLM, given: TinyVLM, inputs: Mapping[str, Tensor]) -> int:
    """What a cache holds of modules' inputs and outputs is what plain hooks see, bit for bit; how many points."""
    blocks = parts(given.model, given.family).text
    modules = [m for b in blocks for m in (b.block, b.attn, b.mlp, b.down)]
    with torch.no_grad():
        with Taps(*modules) as taps:
            given.model(**inputs)
        seen = {}
        for i, block in enumerate(blocks):
            seen |= {
                f"blocks.{i}.hook_resid_pre": taps.hidden(block.block),
                f"blocks.{i}.hook_attn_out": taps.out[block.attn],
                f"blocks.{i}.hook_mlp_out": taps.out[block.mlp],
                f"blocks.{i}.mlp.hook_post": taps.args[block.down][0],
            }
        _, cache = vlm.run_with_cache(inputs, list(seen))
    for name, value in seen.items():
        same(cache[name], value, name)
    return len(seen)


def against_reference(vlm: HookedVLM, given: TinyVLM, inputs: Mapping[str, Tensor]) -> int:
    """Every point against plain PyTorch, scores, patterns and single heads too; how many."""
    with torch.device(next(given.model.parameters()).device):
        expected = reference(given.model, given.family, inputs)
    with torch.no_grad():
        _, cache = vlm.run_with_cache(inputs)
    for name in cache:
        ours, theirs = cache[name], expected[name]
        assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
        known = theirs.isfinite()
        off = float((ours[known] - theirs[known]).abs().max())
        assert off <= tolerance(theirs), f"{name}: off by {off:.3g}, allowed {tolerance(theirs):.3g}"
    return len(cache)


def interventions(vlm: HookedVLM, given: TinyVLM, device: torch.device) -> dict[str, float]:
    """A sweep against one full forward of one prompt for each intervention, with plain hooks."""
    prompts = prompts_of(vlm, given)
    ours = sweep(vlm, prompts, list(SITES.values()), METRIC, progress=False)
    found = torch.tensor(ours.value.values[0])
    plain, largest = one_by_one(given.model, given.family, prompts, device)
    effect = float((plain - torch.tensor(ours.clean.values[0])).abs().amax(-1).min())
    if next(given.model.parameters()).dtype == torch.float32:
        off, allowed = float((found - plain).abs().max()), 1e-5 * max(1.0, largest)
        assert effect > 100 * allowed, f"an intervention does no more than {effect:.3g}"
    else:
        exact = one_by_one(widened(given.model), given.family, prompts, device)[0]
        off, allowed = float((found - exact).abs().max()), 2 * float((plain - exact).abs().max())
    assert off <= allowed, f"interventions off by {off:.3g}, allowed {allowed:.3g}"
    return {"off": off, "allowed": allowed, "least_effect": effect}


def prompts_of(vlm: HookedVLM, given: TinyVLM) -> list[Prompt]:
    """Two prompts of different lengths."""
    return [
        Prompt.from_inputs(
            given.inputs(text=text, seed=i), image_token_id=vlm.image_token_id, name=f"prompt {i}"
        )
        for i, text in enumerate(TEXTS)
    ]


def widened(model: Any) -> Any:
    """The same weights in float32; flash attention knows none."""
    wide = copy.deepcopy(model).float()
    if "flash" in model.config._attn_implementation:
        wide.set_attn_implementation("sdpa")
    return wide


def one_by_one(
    model: Any, family: str, prompts: Sequence[Prompt], device: torch.device
) -> tuple[Tensor, float]:
    """The metric [intervention example] under plain hooks, and the largest logit."""
    values, largest = torch.zeros(len(SITES), len(prompts), dtype=torch.float64), 0.0
    for row, prompt in enumerate(prompts):
        inputs = collate([prompt]).to(device).inputs
        for number, name in enumerate(SITES):
            remove = _attached(model, family, name, prompt)
            try:
                logits = logits_of(model, inputs)[0, -1].float()
            finally:
                remove()
            largest = max(largest, float(logits.abs().max()))
            values[number, row] = float(logits[int(METRIC.a[row])] - logits[int(METRIC.b[row])])
    return values, largest


def _attached(model: Any, family: str, name: str, prompt: Prompt) -> Callable[[], None]:
    """One of `SITES`, as PyTorch's own hook; what takes it off."""
    text = parts(model, family).text
    if name == "MLP":

        def halve(module: Any, args: tuple, output: Tensor) -> Tensor:
            return output * 0.5

        return text[1].mlp.register_forward_hook(halve).remove
    if name == "stream":

        def stream(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[:, -3] = 0
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return text[1].block.register_forward_pre_hook(stream, with_kwargs=True).remove
    layer, head = (1, 2) if name == "head" else (0, 1)
    block = text[layer]
    tokens = slice(None) if name == "head" else prompt.positions("image")

    def z(module: Any, args: tuple) -> tuple:
        mixed = args[0].clone()
        mixed[:, tokens, head * block.d_head : (head + 1) * block.d_head] = 0
        return (mixed, *args[1:])

    return block.out.register_forward_pre_hook(z).remove


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Of a bare model, or an opened one."""
    return (model(inputs) if isinstance(model, HookedVLM) else model(**inputs)).logits


def on(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors there."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Refuses what differs in a bit."""
    if not torch.equal(ours, theirs):
        off = float((ours.float() - theirs.float()).abs().max())
        raise AssertionError(f"{what}: not bit-identical, off by {off:.3g}")
