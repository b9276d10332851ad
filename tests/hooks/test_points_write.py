"""A value written at any hook point of any family does what the same edit with plain PyTorch hooks does."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.families import EACH_KIND, TinyVLM, tiny
from tests.hooks.interventions import intervention
from tests.hooks.reference import of_one_block, reference, tolerance


@dataclass(frozen=True)
class Case:
    bare: TinyVLM
    vlm: HookedVLM = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    clean: dict[str, Tensor] = field(repr=False)
    logits: Tensor = field(repr=False)

    def run(self, *hooks: tuple[str, Callable]) -> Tensor:
        with torch.no_grad():
            return self.vlm.run_with_hooks(self.inputs, fwd_hooks=list(hooks)).logits

    def plain(self, name: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
        arguments = (self.bare.model, self.bare.family, name, edit, self.clean, self.inputs)
        with torch.no_grad(), intervention(*arguments):
            return self.bare.model(**self.inputs).logits

    def difference(self, a: Tensor, b: Tensor) -> float:
        real = self.inputs["attention_mask"].bool()
        return (a - b)[real].abs().max().item()


@pytest.fixture(scope="module", params=EACH_KIND)
def case(request) -> Case:
    bare, opened = tiny(request.param), tiny(request.param)
    vlm = HookedVLM(opened.model, opened.processor)
    inputs = bare.inputs(batch=2)
    with torch.no_grad():
        logits = bare.model(**inputs).logits
    return Case(bare, vlm, inputs, reference(bare.model, request.param, inputs), logits)


def noise(name: str, like: Tensor) -> Tensor:
    """A perturbation of a point, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(len(name))
    scale = 0.1 if name.endswith("hook_pattern") else 0.5
    return scale * torch.randn(like.shape, generator=generator)


def installed_hooks(vlm: HookedVLM) -> int:
    modules = list(vlm.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


def test_every_write_equals_the_same_edit_with_plain_hooks(case):
    lines = []
    for name in case.vlm.hook_points:
        ours = case.run((name, lambda a, hook: a + noise(hook.name, a)))
        theirs = case.plain(name, lambda a, name=name: a + noise(name, a))
        effect, error = case.difference(theirs, case.logits), case.difference(ours, theirs)
        if not effect > 100 * tolerance(case.logits):
            lines.append(f"{name}: the plain edit moves the logits by only {effect:.3g}")
        if not error <= tolerance(theirs):
            lines.append(f"{name}: differs from the plain edit by {error:.3g} (effect {effect:.3g})")
    assert lines == []


def test_replacing_by_a_new_tensor_acts_like_adding(case):
    """The value returned counts, whatever memory it lives in."""
    lines = []
    for name in of_one_block(case.vlm.hook_points):
        value = case.clean[name] + noise(name, case.clean[name])
        ours = case.run((name, lambda a, hook, value=value: value))
        theirs = case.plain(name, lambda a, value=value: value)
        if not case.difference(ours, theirs) <= tolerance(theirs):
            lines.append(f"{name}: differs by {case.difference(ours, theirs):.3g}")
    assert lines == []


def test_edit_in_place_without_return_acts_or_raises(case):
    lines = []
    for name in of_one_block(case.vlm.hook_points):

        def edit(a: Tensor, hook) -> None:
            a.add_(noise(hook.name, a))

        try:
            ours = case.run((name, edit))
        except (RuntimeError, TypeError, ValueError) as error:
            if name not in str(error):
                lines.append(f"{name}: refused without naming the point: {error}")
            continue
        theirs = case.plain(name, lambda a, name=name: a + noise(name, a))
        if not case.difference(ours, theirs) <= tolerance(theirs):
            lines.append(f"{name}: differs by {case.difference(ours, theirs):.3g}")
    assert lines == []


def test_hooks_on_one_point_act_in_order(case):
    lines = []
    for name in of_one_block(case.vlm.hook_points):
        shift = noise(name, case.clean[name])
        ours = case.run((name, lambda a, hook, shift=shift: a + shift), (name, lambda a, hook: a * 2))
        theirs = case.plain(name, lambda a, shift=shift: (a + shift) * 2)
        if not case.difference(ours, theirs) <= tolerance(theirs):
            lines.append(f"{name}: differs by {case.difference(ours, theirs):.3g}")
    assert lines == []


def test_one_head_edited_leaves_the_others_of_its_group(case):
    """Key-value head 1 serves query heads 2 and 3 only."""
    for point, axis, changed in (("v", -2, 1), ("rot_k", -2, 1), ("pattern", 1, 3)):
        name = f"blocks.0.attn.hook_{point}"

        def scale(a: Tensor, hook=None, axis=axis, changed=changed) -> Tensor:
            a = a.clone()
            a.select(axis, changed).mul_(3)
            return a

        with torch.no_grad():
            seen: dict[str, Tensor] = {}
            reader = ("blocks.0.attn.hook_z", lambda a, hook, seen=seen: seen.update(z=a.clone()))
            ours = case.run((name, scale), reader)
        theirs = case.plain(name, scale)
        assert case.difference(ours, theirs) <= tolerance(theirs)
        moved = (seen["z"] - case.clean["blocks.0.attn.hook_z"])[case.inputs["attention_mask"].bool()]
        assert (moved.abs().amax((0, 2)) > 1e-3).tolist() == [False, False, point != "pattern", True]


def test_a_pattern_read_after_its_scores_were_written(case):
    seen: dict[str, Tensor] = {}
    case.run(
        ("blocks.1.attn.hook_attn_scores", lambda a, hook: a * 2),
        ("blocks.1.attn.hook_pattern", lambda a, hook: seen.update(pattern=a.clone())),
    )
    expected = (case.clean["blocks.1.attn.hook_attn_scores"] * 2).softmax(-1)
    rows = case.inputs["attention_mask"].bool()
    difference = (seen["pattern"] - expected).movedim(2, 1)[rows]
    assert difference.abs().max() <= 1e-5


def test_own_value_written_back_changes_nothing(case):
    lines = []
    for name in case.vlm.hook_points:
        with torch.no_grad():
            _, cache = case.vlm.run_with_cache(case.inputs, names_filter=name)
        identity = case.run((name, lambda a, hook: a))
        patched = case.run((name, lambda a, hook, value=cache[name]: value))
        if (identity - patched).abs().max().item() != 0.0:
            lines.append(f"{name}: {(identity - patched).abs().max().item():.3g}")
        if not case.difference(identity, case.logits) <= tolerance(case.logits):
            lines.append(f"{name}: identity differs from the bare model")
    assert lines == []


def test_all_own_values_written_back_at_once_change_nothing(case):
    with torch.no_grad():
        _, cache = case.vlm.run_with_cache(case.inputs)
    identity = case.run(*((name, lambda a, hook: a) for name in case.vlm.hook_points))
    patched = case.run(*((name, lambda a, hook: cache[hook.name]) for name in case.vlm.hook_points))
    assert (identity - patched).abs().max().item() == 0.0


@pytest.mark.parametrize(
    "wrong",
    [lambda a: a[..., :-1], lambda a: a[:1, :1], lambda a: a.unsqueeze(0), lambda a: a.sum(), lambda a: "no"],
    ids=["shorter", "broadcastable", "one axis more", "scalar", "no tensor"],
)
def test_wrong_return_is_one_clear_error_and_the_model_stays_usable(case, wrong):
    attached = installed_hooks(case.vlm)
    before = case.vlm(case.inputs).logits
    lines = []
    for name in of_one_block(case.vlm.hook_points):
        with pytest.raises((ValueError, TypeError)) as error:
            case.run((name, lambda a, hook: wrong(a)))
        if name not in str(error.value):
            lines.append(f"{name}: not named in: {error.value}")
        if installed_hooks(case.vlm) != attached:
            lines.append(f"{name}: hooks left behind")
    assert lines == []
    assert torch.equal(case.vlm(case.inputs).logits, before)


def test_names_chosen_by_a_function(case):
    def doubled(a: Tensor, hook) -> Tensor:
        return a * 2

    by_function = case.run((lambda name: name.startswith("blocks.") and name.endswith("hook_z"), doubled))
    by_name = case.run(*((f"blocks.{i}.attn.hook_z", doubled) for i in range(case.vlm.n_layers)))
    assert torch.equal(by_function, by_name)


def test_unknown_and_absent_names_are_refused_before_anything_runs(case):
    attached = installed_hooks(case.vlm)
    wrong = {"blocks.1.attn.hook_patern": "blocks.1.attn.hook_pattern", "blocks.99.hook_resid_pre": "blocks."}
    wrong |= dict.fromkeys(list(case.vlm.absent)[:1], "absent")
    for name, hint in wrong.items():
        calls: list[str] = []
        with pytest.raises((KeyError, ValueError)) as error:
            case.run(
                ("hook_embed", lambda a, hook, calls=calls: calls.append(hook.name)),
                (name, lambda a, hook: a),
            )
        assert name in str(error.value)
        assert hint in str(error.value)
        assert calls == []
        assert installed_hooks(case.vlm) == attached


def test_error_raised_inside_a_hook_reaches_the_caller_and_leaves_nothing(case):
    attached = installed_hooks(case.vlm)
    before = case.vlm(case.inputs).logits

    def broken(a: Tensor, hook) -> None:
        raise ZeroDivisionError("mine")

    for name in ("blocks.0.attn.hook_pattern", "vision.blocks.1.attn.hook_q", "hook_embed"):
        with pytest.raises(ZeroDivisionError, match="mine"):
            case.run((name, broken))
        assert installed_hooks(case.vlm) == attached
    assert torch.equal(case.vlm(case.inputs).logits, before)


def test_gradient_reaches_every_point(case):
    kept: dict[str, Tensor] = {}

    def keep(a: Tensor, hook) -> Tensor:
        a.retain_grad()
        kept[hook.name] = a
        return a

    names = list(case.vlm.hook_points)
    logits = case.vlm.run_with_hooks(case.inputs, fwd_hooks=[(name, keep) for name in names]).logits
    real = case.inputs["attention_mask"].bool()
    logits[real].square().sum().backward()
    case.vlm.model.zero_grad(set_to_none=True)
    assert set(kept) == set(names)
    assert [n for n, a in kept.items() if a.grad is None or not a.grad.abs().max() > 0] == []
