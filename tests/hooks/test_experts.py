"""Points of experts against plain PyTorch hooks, and against matrix products written out here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from tests.architectures import build

DEFAULT = ("qwen3_moe", "gpt_oss", "llama4")
"""A router that returns logits, weights and the chosen; one with biases; experts that are given every token."""
OTHERS = (
    "gemma4+experts", "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "mixtral", "deepseek_v3", "jamba", "nemotron_h",
    "granitemoehybrid", "aria", "qwen3_next", "qwen3_omni_moe_thinker", "llava+gpt_oss", "internvl+qwen3_moe",
)  # fmt: skip
EVERY = [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
LEAVES = ("router_logits", "router_weights", "expert_in", "expert_out")


class Case:
    """An opened tiny model, its first layer of experts, and what plain hooks see there."""

    def __init__(self, name: str) -> None:
        given = build(name)
        self.model, self.inputs = given.model, given.inputs
        with torch.no_grad():
            self.bare = self.model(**self.inputs).logits
        self.vlm = HookedVLM(self.model, inputs=self.inputs)
        blocks = self.vlm.anatomy.text.blocks
        self.layer = next(layer for layer, block in enumerate(blocks) if block.writer("moe"))
        found = blocks[self.layer].writer("moe").experts  # type: ignore[union-attr]
        assert found is not None
        self.n, self.repeated = found.n_experts, found.chosen is None
        self.experts: Any = self.model.get_submodule(found.module)
        self.router: Any = self.model.get_submodule(found.router)
        self.name = f"blocks.{self.layer}.mlp.hook"
        self.tolerance = 1e-5 * max(1.0, self.bare[self.bare > -1e9].abs().max().item())

    def plain(self) -> Tensor:
        with torch.no_grad():
            return self.model(**self.inputs).logits

    def ours(self, *hooks: tuple[str, Callable]) -> Tensor:
        with torch.no_grad():
            return self.vlm.run_with_hooks(self.inputs, list(hooks)).logits

    def read(self, *names: str) -> list[Tensor]:
        with torch.no_grad():
            _, cache = self.vlm.run_with_cache(self.inputs, list(names))
        return [cache[name] for name in names]

    def alike(self, ours: Tensor, theirs: Tensor) -> None:
        """The same edit, and one that matters."""
        assert (theirs - self.bare).abs().max().item() > 100 * self.tolerance
        assert (ours - theirs).abs().max().item() <= self.tolerance


@pytest.fixture(scope="module", params=EVERY)
def case(request: Any) -> Case:
    return Case(request.param)


@contextmanager
def before(module: nn.Module, fn: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(fn)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, fn: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(fn)
    try:
        yield
    finally:
        handle.remove()


def by_hand(module: Any, x: Tensor, expert: int) -> Tensor:
    """One expert of gpt-oss, Llama 4 or Qwen3-MoE, from its matrices."""
    up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if type(module).__name__ == "GptOssExperts":
        both = x @ up + module.gate_up_proj_bias[expert]
        gate, linear = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
        return (linear + 1) * gate * torch.sigmoid(module.alpha * gate) @ down + module.down_proj_bias[expert]
    up, down = (up.T, down.T) if type(module).__name__ == "Llama4TextExperts" else (up, down)
    gate, linear = (x @ up.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * linear) @ down.T


@torch.no_grad()
def test_what_is_read_is_what_plain_hooks_and_matrix_products_give(case: Case) -> None:
    seen: dict[str, Any] = {}
    with (
        before(case.experts, lambda module, args: seen.update(experts=[a.clone() for a in args])),
        after(case.router, lambda module, args, output: seen.update(x=args[0].clone(), out=output)),
        after(case.experts, lambda module, args, output: seen.update(total=output.clone())),
    ):
        case.plain()
    logits, weights = case.read(f"{case.name}_router_logits", f"{case.name}_router_weights")
    assert logits.shape == weights.shape == (*case.inputs["input_ids"].shape, case.n)
    flat = weights.flatten(0, 1)

    matrix = case.router.weight.to(torch.float32)
    expected = seen["x"].reshape(-1, matrix.shape[1]) @ matrix.T
    bias = getattr(case.router, "bias", None)
    expected = expected if bias is None else expected + bias
    assert (logits.flatten(0, 1) - expected).abs().max().item() <= 1e-5 * max(
        1.0, float(expected.abs().max())
    )

    each = torch.stack(case.read(*(f"{case.name}_expert_out.{i}" for i in range(case.n))), -2)
    (whole,) = case.read(f"{case.name}_expert_out")
    scale = max(1.0, float(whole.abs().max()))
    assert (each - whole).abs().max().item() <= 1e-5 * scale
    total = seen["total"].unflatten(0, (case.n, -1)).sum(0) if case.repeated else seen["total"]
    assert (whole.flatten(0, 1).sum(1) - total).abs().max().item() <= 1e-5 * scale
    assert (whole[weights == 0] == 0).all()
    if case.repeated:
        tokens = seen["x"]
        assert torch.equal(flat, seen["out"][0])
        alone = [by_hand(case.experts, tokens * flat[:, i, None], i) for i in range(case.n)]
    else:
        tokens, chosen, given = seen["experts"]
        dense = torch.zeros_like(flat)
        for row in range(len(chosen)):
            for slot in range(chosen.shape[1]):
                dense[row, chosen[row, slot]] = given[row, slot]
        assert torch.equal(flat, dense)
        assert torch.equal(case.read(f"{case.name}_expert_in")[0].flatten(0, 1), tokens)
        if type(case.experts).__name__ not in ("GptOssExperts", "Qwen3MoeExperts"):
            return
        alone = [by_hand(case.experts, tokens, i) * dense[:, i, None] for i in range(case.n)]
    assert (whole.flatten(0, 1) - torch.stack(alone, 1)).abs().max().item() <= 1e-5 * scale


def test_what_is_written_back_changes_no_bit(case: Case) -> None:
    names = [f"{case.name}_{leaf}" for leaf in LEAVES if f"{case.name}_{leaf}" in case.vlm.hook_points]
    names.append(f"{case.name}_expert_out.1")
    assert len(names) == 4 if case.repeated else 5
    for some in (*([name] for name in names), names):
        hooks = [(name, lambda activation, hook: activation.clone()) for name in some]
        assert torch.equal(case.ours(*hooks), case.bare), some
    assert torch.equal(case.plain(), case.bare)


def test_zeroing_an_expert_is_masking_its_weight(case: Case) -> None:
    chosen = int((case.read(f"{case.name}_router_weights")[0] != 0).sum((0, 1)).argmax())

    def masked(module: nn.Module, args: tuple) -> tuple:
        if case.repeated:
            each = args[0].unflatten(0, (case.n, -1)).clone()
            each[chosen] = 0
            return (each.flatten(0, 1),)
        return args[0], args[1], args[2] * (args[1] != chosen)

    with before(case.experts, masked):
        theirs = case.plain()

    def zero(activation: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(activation)

    def cut(weights: Tensor, hook: Any) -> None:
        weights[..., chosen] = 0

    def cut_out(each: Tensor, hook: Any) -> Tensor:
        return each.index_fill(-2, torch.tensor([chosen]), 0.0)

    case.alike(case.ours((f"{case.name}_expert_out.{chosen}", zero)), theirs)
    case.alike(case.ours((f"{case.name}_expert_out", cut_out)), theirs)
    case.alike(case.ours((f"{case.name}_router_weights", cut)), theirs)


def test_weights_outside_of_the_chosen_choose_more_experts(case: Case) -> None:
    even = 1 / case.n

    def all_of_them(module: nn.Module, args: tuple) -> tuple:
        index = torch.arange(case.n).expand(len(args[0]), -1)
        return args[0], index, torch.full(index.shape, even)

    def all_scores(module: nn.Module, args: tuple, output: tuple) -> tuple:
        return torch.full_like(output[0], even), output[1]

    with after(case.router, all_scores) if case.repeated else before(case.experts, all_of_them):
        theirs = case.plain()
    case.alike(
        case.ours((f"{case.name}_router_weights", lambda weights, hook: torch.full_like(weights, even))),
        theirs,
    )


def routed_again(module: Any, x: Tensor, output: tuple) -> tuple:
    """What these routers make of logits in another order, written out."""
    x = x.reshape(-1, module.weight.shape[1])
    logits = nn.functional.linear(x, module.weight, getattr(module, "bias", None)).roll(1, -1)
    if type(module).__name__ == "GptOssTopKRouter":
        top, index = logits.topk(module.top_k, -1)
        return logits, top.softmax(-1), index
    if type(module).__name__ == "Llama4Router":
        top, index = logits.topk(module.top_k, -1)
        return torch.zeros_like(logits).scatter(1, index, top.sigmoid()), logits
    top, index = logits.softmax(-1).topk(module.top_k, -1)
    return logits, top / top.sum(-1, keepdim=True) if module.norm_topk_prob else top, index


@pytest.mark.parametrize("name", DEFAULT)
def test_logits_that_are_written_route(name: str) -> None:
    case = Case(name)
    with after(case.router, lambda module, args, output: routed_again(module, args[0], output)):
        theirs = case.plain()
    ours = case.ours((f"{case.name}_router_logits", lambda logits, hook: logits.roll(1, -1)))
    case.alike(ours, theirs)


def test_routing_follows_its_logits(case: Case) -> None:
    """With logits that name one expert, that one is chosen for every token."""
    weights = f"{case.name}_router_weights"
    (own,) = case.read(weights)
    rare = int((own != 0).sum((0, 1)).argmin())
    seen: list[Tensor] = []
    with torch.no_grad(), case.vlm.hooks([(f"{case.name}_router_logits", lambda a, hook: force(a, rare))]):
        case.vlm.run_with_hooks(case.inputs, [(weights, lambda a, hook: seen.append(a.clone()))])
    assert (own[..., rare] == 0).any()
    assert (seen[0][..., rare] > 0).all()


def force(logits: Tensor, expert: int) -> Tensor:
    new = torch.full_like(logits, -20.0)
    new[..., expert] = 20.0
    return new


def test_a_change_of_an_experts_output_is_added(case: Case) -> None:
    (like,) = case.read(f"{case.name}_expert_out.0")
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) * like.abs().max()
    rows = noise.flatten(0, -2)

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not case.repeated:
            return output + rows
        return torch.cat([output[: len(rows)] + rows, output[len(rows) :]])

    with after(case.experts, add):
        theirs = case.plain()
    first, whole = f"{case.name}_expert_out.0", f"{case.name}_expert_out"
    half = (first, lambda activation, hook: activation + noise / 2)

    def rest(each: Tensor, hook: Any) -> None:
        each[..., 0, :] += noise / 2

    case.alike(case.ours(half, half), theirs)
    case.alike(case.ours((whole, rest), half), theirs)
    case.alike(case.ours(half, (whole, rest)), theirs)


def test_an_experts_gradient_is_that_of_what_they_give_out(case: Case) -> None:
    held: dict[str, Tensor] = {}

    def hold(activation: Tensor, hook: Any) -> Tensor:
        held["ours"] = activation.clone()
        held["ours"].retain_grad()
        return held["ours"]

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        held["theirs"] = output

    with torch.enable_grad(), after(case.experts, keep):
        out = case.vlm.run_with_hooks(case.inputs, [(f"{case.name}_expert_out", hold)]).logits
        out[out > -1e9].square().sum().backward()
    case.model.zero_grad()
    ours = held["ours"].grad
    theirs = held["theirs"].grad
    assert ours is not None
    assert theirs is not None
    one = ours.flatten(0, 1)
    rows = (
        theirs.unflatten(0, (case.n, -1)).transpose(0, 1) if case.repeated else theirs[:, None].expand_as(one)
    )
    size = float(theirs.abs().max())
    assert size > 0
    assert (one - rows).abs().max().item() <= 1e-5 * size


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_a_shared_expert_is_no_expert(name: str) -> None:
    """What the MLP adds beyond its experts is its shared expert's, gated or not, by a plain hook."""
    case = Case(name)
    body = case.model.get_submodule(case.vlm.anatomy.text.blocks[case.layer].mlp)
    (shared,) = (
        child for part, child in body.named_children() if part in ("shared_experts", "shared_expert")
    )
    seen: dict[str, Tensor] = {}
    with (
        after(shared, lambda module, args, output: seen.update(x=args[0].clone(), shared=output.clone())),
        after(body, lambda module, args, output: seen.update(out=output.clone())),
    ):
        each, whole = case.read(f"{case.name}_expert_out", f"blocks.{case.layer}.hook_mlp_out")
    gate = getattr(body, "shared_expert_gate", None)
    beside = seen["shared"] if gate is None else torch.sigmoid(gate(seen["x"])) * seen["shared"]
    left = whole - each.sum(-2)
    assert torch.equal(whole, seen["out"])
    assert (left - beside.reshape(left.shape)).abs().max().item() <= 1e-5 * max(1.0, float(whole.abs().max()))
    assert left.abs().max().item() > 1e-2


@torch.no_grad()
def test_rows_of_a_batch_are_laid_out_as_the_stream_is() -> None:
    case = Case("qwen3_moe")
    ids = case.inputs["input_ids"]
    other = ids.flip(1)
    both = {"input_ids": torch.cat([ids, other])}
    name = f"{case.name}_expert_out"
    _, together = case.vlm.run_with_cache(both, [name])
    for row, one in enumerate((ids, other)):
        _, alone = case.vlm.run_with_cache({"input_ids": one}, [name])
        assert (together[name][row] - alone[name][0]).abs().max().item() <= 1e-5
    assert (together[name][0] - together[name][1]).abs().max().item() > 1e-2


@torch.no_grad()
def test_an_expert_stays_cut_while_generating() -> None:
    case = Case("qwen3_moe")
    seen: list[tuple[int, ...]] = []

    def cut(activation: Tensor, hook: Any) -> Tensor:
        seen.append(tuple(activation.shape[:2]))
        return torch.zeros_like(activation)

    case.vlm.generate(
        case.inputs, [(f"{case.name}_expert_out.1", cut)], max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    n = case.inputs["input_ids"].shape[1]
    assert seen == [(1, n), (1, 1), (1, 1)]


def test_nothing_is_computed_for_a_hook_that_is_not_there() -> None:
    case = Case("qwen3_moe")
    counts = [0]
    own = case.experts.forward
    case.experts.forward = lambda *args, **kwargs: (
        counts.__setitem__(0, counts[0] + 1),
        own(*args, **kwargs),
    )[1]  # type: ignore[method-assign]
    case.plain()
    assert counts == [1]
    case.ours((f"{case.name}_expert_out.1", lambda activation, hook: None))
    assert counts == [3]  # the model's own call, and one of the expert alone
    case.plain()
    assert counts == [4]


def test_experts_that_cannot_be_told_apart_are_absent_with_the_reason() -> None:
    given = build("ernie4_5_vl_moe")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    layer = next(layer for layer, block in enumerate(vlm.anatomy.text.blocks) if block.writer("moe"))
    name = f"blocks.{layer}.mlp.hook_expert_out"
    assert "other tokens" in vlm.absent[name]
    with pytest.raises(FrankenlensError, match="other tokens"):
        vlm.run_with_cache(given.inputs, [name])


def test_an_expert_that_is_not_there_is_named() -> None:
    case = Case("qwen3_moe")
    with pytest.raises(FrankenlensError, match="no hook point"):
        case.ours((f"{case.name}_expert_out.{case.n}", lambda activation, hook: None))
