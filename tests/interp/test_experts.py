"""Experts as components: every analysis that knows `mlp.expert.E`, against matrix products and hooks written here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from interp.comparison import by_address, compare
from interp.decision import find_decisions
from interp.freezing import freeze
from interp.localization.ablation import Ablation, ablate, ablation_hooks, layers_of
from interp.lockstep import Moved, lockstep
from interp.map import component_map, components, plot_map, summarise
from interp.map.attribution import attribute
from interp.metrics import TraceLogLikelihood
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.questions.tasks import REASONING, sample
from interp.sweep import Intervention, sweep
from interp.sweep.places import where_mask
from interp.transfer.grafts import Graft, grafted
from tests import other_kinds

LAYER, EXPERT = 2, 1
HOOK = f"blocks.{LAYER}.mlp.hook_expert_out"
PATH = f"model.language_model.layers.{LAYER}.mlp.experts"


class Given:
    """A mixture-of-experts pair, and prompts with a trace."""

    def __init__(self) -> None:
        self.in_, self.rl = other_kinds.experts(branch=1.0, update=0.5)
        self.pair = Pair(self.in_, self.rl)
        examples = [e for task in REASONING for e in sample(task, 1, seed=3, split="map")][:4]
        traces = ["<think> 3 red </think> answer 3", "<think> 2 </think> answer no"] * 2
        self.examples = examples
        self.prompts = [
            self.pair.builder.build(example, trace) for example, trace in zip(examples, traces, strict=True)
        ]


@pytest.fixture(scope="module")
def given():
    found = Given()
    yield found
    found.pair.close()


def contribution(module: Any, args: tuple, expert: int) -> Tensor:
    """What one expert adds, from its matrices: Σ over slots of weight · W_down (silu(gate) · up)."""
    x, chosen, weights = args
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
    out = (gate * torch.sigmoid(gate) * up) @ module.down_proj[expert].T
    return out * (weights * (chosen == expert)).sum(1, keepdim=True)


@torch.no_grad()
def expected(given: Given, change: Callable[[Tensor, Tensor], Tensor], where: str) -> np.ndarray:
    """The trace's log-probability with the expert's contribution changed, one prompt at a time, by plain hooks."""
    found = []
    for prompt in given.prompts:
        batch = collate([prompt])
        here = where_mask(where, batch)[0][:, None]
        theirs: list[Tensor] = []

        def see(module: nn.Module, args: tuple, output: Tensor, theirs: list = theirs) -> None:
            theirs.append(contribution(module, args, EXPERT))

        def act(
            module: nn.Module, args: tuple, output: Tensor, theirs: list = theirs, here: Tensor = here
        ) -> Tensor:
            own = contribution(module, args, EXPERT)
            return output + torch.where(here, change(own, theirs[0]) - own, 0.0)

        for vlm, fn in ((given.rl, see), (given.in_, act)):
            handle = vlm.model.get_submodule(PATH).register_forward_hook(fn)
            try:
                logits = vlm.model(**batch.inputs).logits
            finally:
                handle.remove()
        found.append(float(TraceLogLikelihood().select([0])(logits, batch)[0]))
    return np.array(found)


def test_interventions_on_an_expert_are_plain_hooks(given: Given) -> None:
    cases: list[tuple[Intervention, Callable[[Tensor, Tensor], Tensor]]] = [
        (Intervention(HOOK, "replace", "all", EXPERT), lambda own, theirs: theirs),
        (Intervention(HOOK, "replace", "image", EXPERT), lambda own, theirs: theirs),
        (Intervention(HOOK, "zero", "all", EXPERT), lambda own, theirs: torch.zeros_like(own)),
        (Intervention(HOOK, "scale", "reasoning", EXPERT, value=3.0), lambda own, theirs: 3 * own),
        (Intervention(HOOK, "add", "question", EXPERT, value=0.5), lambda own, theirs: own + 0.5),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no shortcut is refused
        found = sweep(
            given.in_,
            given.prompts,
            [one for one, _ in cases],
            TraceLogLikelihood(),
            donor=given.rl,
            progress=False,
        )
    clean = found["clean"].to_numpy()[0]
    for row, (one, change) in enumerate(cases):
        theirs = expected(given, change, str(one.where))
        tolerance = 1e-5 * max(1.0, np.abs(clean).max())
        assert np.abs(found["value"].to_numpy()[0, row] - theirs).max() <= tolerance, one.name
        assert np.abs(theirs - clean).max() > 100 * tolerance, one.name


def test_means_and_other_prompts_of_an_expert(given: Given) -> None:
    kinds = [Intervention(HOOK, kind, "question", EXPERT) for kind in ("mean", "resample")]
    found = sweep(given.in_, given.prompts, kinds, TraceLogLikelihood(), progress=False)
    rows, tokens = [], []
    for prompt in given.prompts:
        batch = collate([prompt])
        with torch.no_grad():
            _, cache = given.in_.run_with_cache(batch.inputs, [f"{HOOK}.{EXPERT}"])
        rows.append(cache[f"{HOOK}.{EXPERT}"])
        tokens.append(rows[-1][where_mask("question", batch)])
    mean = torch.cat(tokens).mean(0)
    theirs = expected(given, lambda own, other: mean.expand_as(own), "question")
    clean = found["clean"].to_numpy()[0]
    tolerance = 1e-5 * max(1.0, np.abs(clean).max())
    assert np.abs(found["value"].to_numpy()[0, 0] - theirs).max() <= tolerance
    assert np.abs(theirs - clean).max() > 100 * tolerance


def test_an_index_that_is_no_expert_is_refused(given: Given) -> None:
    for one, why in (
        (Intervention(HOOK, "zero", index=4), "out of range"),
        (Intervention(f"{HOOK}.1", "zero"), "index=1"),
    ):
        with pytest.raises(FrankenlensError, match=why):
            sweep(given.in_, given.prompts, [one], TraceLogLikelihood(), progress=False)


def test_a_map_of_experts_is_drawn_and_its_controls_hold(given: Given) -> None:
    decisions = find_decisions(given.pair, given.examples, "soft", max_new_tokens=8, progress=False)
    found = component_map(given.pair, decisions, points=("expert", "mlp_out"), roles=["all"], progress=False)
    names = [c.name for c in components(given.in_, ("expert",))]
    assert names == [f"blocks.{layer}.mlp.expert.{e}" for layer in (0, 2, 3, 4) for e in range(4)]
    assert not any(".expert." in c.name for c in components(given.in_, ("mlp_out", "head")))
    assert (found["control_self"].to_numpy() == 0).all()
    values = sweep(
        given.in_,
        decisions.prompts,
        [Intervention(HOOK, "replace", "all", EXPERT)],
        decisions.metric,
        donor=given.rl,
        progress=False,
    )
    effect = found["effect"].sel(
        direction="rl_to_in", component=f"blocks.{LAYER}.mlp.expert.{EXPERT}", role="all"
    )
    theirs = (values["value"] - values["clean"]).to_numpy()[0, 0]
    assert np.abs(effect.to_numpy() - theirs).max() <= 1e-6
    titles = [axes.get_title() for axes in plot_map(summarise(found)).axes]
    assert any(title.startswith("experts") for title in titles)

    # Every contribution is a part of the MLP's output, so first-order estimates add up to the MLP's.
    estimates = attribute(given.pair, decisions, points=("expert", "mlp_out"), roles=["all"], progress=False)[
        "effect"
    ]
    at = estimates.sel(direction="rl_to_in", role="all")
    parts = sum(at.sel(component=f"blocks.{LAYER}.mlp.expert.{e}").to_numpy() for e in range(4))
    whole = at.sel(component=f"blocks.{LAYER}.mlp").to_numpy()
    assert np.abs(parts - whole).max() <= 1e-4 * max(1.0, np.abs(whole).max())
    assert np.abs(whole).max() > 1e-2


def test_a_graft_of_an_expert_is_a_slice_of_two_tensors(given: Given) -> None:
    own, theirs = (dict(vlm.model.named_parameters()) for vlm in (given.in_, given.rl))
    before = {name: p.detach().clone() for name, p in own.items()}
    address = f"blocks.{LAYER}.mlp.expert.{EXPERT}"
    with grafted(given.in_, given.rl, Graft((address,))):
        for name, parameter in own.items():
            same = before[name].clone()
            if name.startswith(PATH):
                same[EXPERT] = theirs[name][EXPERT]
                assert not torch.equal(same, before[name])
            assert torch.equal(parameter, same), name
    assert all(torch.equal(p, before[name]) for name, p in own.items())
    with grafted(given.in_, given.rl, Graft((address,), form="low_rank", rank=2)):
        for name in (f"{PATH}.gate_up_proj", f"{PATH}.down_proj"):
            delta = (own[name][EXPERT] - before[name][EXPERT]).double()
            values = torch.linalg.svdvals((theirs[name][EXPERT] - before[name][EXPERT]).double())
            assert torch.allclose(torch.linalg.svdvals(delta)[:2], values[:2], rtol=1e-3)
            assert torch.linalg.svdvals(delta)[2] < 1e-3 * values[0]


def test_a_frozen_expert_keeps_every_bit() -> None:
    vlm, _ = other_kinds.experts()
    prompt = Pair(vlm, vlm).builder.build(sample(REASONING[0], 1, seed=3, split="map")[0], "answer 3")
    tensors = {name: p for name, p in vlm.model.named_parameters() if name.startswith(PATH)}
    before = {name: p.detach().clone() for name, p in tensors.items()}
    with freeze(vlm, f"blocks.{LAYER}.mlp.expert.{EXPERT}"):
        optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-2, weight_decay=0.1)
        vlm.model(**collate([prompt]).inputs).logits.square().mean().backward()
        optimizer.step()
    for name, parameter in tensors.items():
        assert torch.equal(parameter[EXPERT], before[name][EXPERT])
        assert not torch.equal(parameter, before[name])


def test_a_comparison_knows_experts(given: Given, tmp_path: Any) -> None:
    folders = []
    for name, vlm in (("in", given.in_), ("rl", given.rl)):
        folders.append(tmp_path / name)
        vlm.model.save_pretrained(folders[-1], save_original_format=False)
    table = compare(*folders, spectra=False, progress=False)
    found = by_address(table, *folders, progress=False).set_index("address")
    own, theirs = (vlm.model.state_dict() for vlm in (given.in_, given.rl))
    for expert in range(4):
        moved = [(theirs[n][expert] - own[n][expert]).double() for n in own if n.startswith(PATH)]
        norm = float(sum(delta.square().sum() for delta in moved)) ** 0.5
        row = found.loc[f"blocks.{LAYER}.mlp.expert.{expert}"]
        assert row["fro_norm"] == pytest.approx(norm, rel=1e-6)
        assert (row["part"], row["index"]) == ("expert", expert)
        assert row["n"] == sum(delta.numel() for delta in moved)


def zeroed(vlm: HookedVLM, prompt: Any) -> list[int]:
    """Eight greedy tokens with the expert's weight masked by a plain hook."""

    def mask(module: nn.Module, args: tuple) -> tuple:
        return args[0], args[1], args[2] * (args[1] != EXPERT)

    handle = vlm.model.get_submodule(PATH).register_forward_pre_hook(mask)
    try:
        out = vlm.generate(collate([prompt]).inputs, max_new_tokens=8, do_sample=False)
    finally:
        handle.remove()
    return out[0, len(prompt) :].tolist()


def test_an_expert_is_ablated_while_generating(given: Given) -> None:
    prompts = [given.pair.builder.build(example) for example in given.examples]
    address = f"blocks.{LAYER}.mlp.expert.{EXPERT}"
    names = [one.address for one in layers_of(given.in_, ("expert",), "zero")]
    assert address in names
    assert len(names) == 16
    settings = {"max_new_tokens": 8, "do_sample": False}
    apart = 0
    for prompt in prompts:
        batch = collate([prompt], "left")
        hooks = ablation_hooks(Ablation(address, "zero"), batch)
        ours, clean = (given.in_.generate(batch.inputs, some, **settings) for some in (hooks, []))
        assert ours[0, len(prompt) :].tolist() == zeroed(given.in_, prompt)
        apart += ours.tolist() != clean.tolist()
    assert apart
    found = ablate(
        given.in_, prompts, [Ablation(address, kind) for kind in ("zero", "mean", "resample")],
        grader=lambda answer, example: True, max_new_tokens=8, progress=False,
    )  # fmt: skip
    assert found["part"].to_numpy().tolist() == ["expert"] * 3
    assert found["head"].to_numpy().tolist() == [EXPERT] * 3
    with pytest.raises(FrankenlensError, match="experts 0-3"):
        ablate(given.in_, prompts, [Ablation(f"blocks.{LAYER}.mlp.expert.4", "zero")], progress=False)
    with pytest.raises(FrankenlensError, match="no experts"):
        ablate(given.in_, prompts, [Ablation("blocks.1.mlp.expert.0", "zero")], progress=False)


def test_an_expert_moves_in_lockstep(given: Given) -> None:
    """All experts of a layer without a shared one moved together are its MLP moved."""
    prompts = [given.pair.builder.build(example) for example in given.examples]
    each, whole, none = (
        [one.tokens for one in lockstep(given.rl, given.in_, prompts, moved, max_new_tokens=6)]
        for moved in (Moved("blocks.0.mlp.expert.0-3"), Moved("blocks.0.mlp"), ())
    )
    assert each == whole
    assert each != none
