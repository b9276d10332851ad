"""A run over its steps: between IN and the embedded RL, in steps whose changes are known."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file

from experiments import embedded
from hooks.errors import FrankenlensError
from interp.comparison import by_address, compare
from interp.decision import find_decisions
from interp.map import component_map
from interp.pair.pair import Pair
from interp.pair.trajectory import Step, Trajectory, steps_of
from interp.questions.tasks import REASONING, sample
from interp.trajectory import head_survival, over_steps, step_table, update_energy
from interp.trajectory.heads import top_heads
from interp.trajectory.plots import plot_trajectory

IN, RL = embedded.path("in"), embedded.path("rl")
PARTS = {20: 0.25, 100: 0.5, 150: 1.0}
PLANTED = "model.layers.4.mlp.down_proj.weight"
EXAMPLES = [example for task in REASONING for example in sample(task, 4, seed=0, split="map")]
SETTINGS = {"max_new_tokens": 48, "progress": False, "choice": "first"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3 changes one MLP alone; the others lie on the line from IN to RL, the last is RL."""
    out = tmp_path_factory.mktemp("run")
    before, after = (load_file(folder / "model.safetensors") for folder in (IN, RL))
    steps = {n: {key: w + part * (after[key] - w) for key, w in before.items()} for n, part in PARTS.items()}
    steps[150] = after
    steps[3] = {**before, PLANTED: after[PLANTED]}
    for n, state in steps.items():
        shutil.copytree(RL, out / f"step-{n}")
        save_file(state, out / f"step-{n}" / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def trajectory(run: Path) -> Iterator[Trajectory]:
    found = Trajectory.from_pretrained(IN, str(run / "step-*"))
    yield found
    found.close()


class Counted:
    """How often a model's own forward is called."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.n = 0
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.n += 1

    def stop(self) -> int:
        self._handle.remove()
        return self.n


@pytest.fixture(scope="module")
def measured(trajectory: Trajectory) -> tuple[xr.Dataset, int]:
    """And how often IN ran."""
    count = Counted(trajectory.in_.model)
    data = over_steps(trajectory, EXAMPLES, **SETTINGS)  # type: ignore[arg-type]
    return data, count.stop()


def test_steps_are_in_the_order_of_their_numbers(run: Path) -> None:
    wanted = [3, 20, 100, 150]
    for given in ([run / "step-*"], [run], sorted(run.iterdir()), sorted(run.iterdir(), reverse=True)):
        assert [step.number for step in steps_of([str(one) for one in given])] == wanted
    named = [f"verl-7b/global_step_{n}/actor" for n in (100, 20)]
    assert [step.number for step in steps_of(named)] == [20, 100]
    assert steps_of(["first", "second"]) == (Step(1, "first"), Step(2, "second"))
    with pytest.raises(FrankenlensError, match=r"two checkpoints are of step 7: .*a/step-7 and .*b/step-7"):
        steps_of(["a/step-7", "b/step-7", "a/step-8"])
    with pytest.raises(FrankenlensError, match="no folder is called"):
        steps_of([str(run / "nothing-*")])


def test_in_s_runs_are_made_once(trajectory: Trajectory, measured: tuple[xr.Dataset, int]) -> None:
    data, ran = measured
    assert data.sizes["step"] == 4
    alone = Trajectory(trajectory.in_, IN, trajectory.steps[-1:])
    count = Counted(trajectory.in_.model)
    one = over_steps(alone, EXAMPLES, **SETTINGS)  # type: ignore[arg-type]
    assert ran == count.stop() > 0
    assert data.attrs["in_runs"] == one.attrs["in_runs"] > 0
    assert data.attrs["in_again"] == 0
    xr.testing.assert_identical(data["effect"].sel(step=150), one["effect"].sel(step=150))


def test_a_step_s_map_is_that_of_its_pair(run: Path, measured: tuple[xr.Dataset, int]) -> None:
    """Against maps of pairs that are opened by themselves, without anything that is shared."""
    last = Pair.from_pretrained(IN, run / "step-150")
    how = {"max_new_tokens": 48, "progress": False}
    decisions = find_decisions(last, EXAMPLES, "first", batch_size=16, **how)  # type: ignore[arg-type]
    last.close()
    pair = Pair.from_pretrained(IN, run / "step-20")
    points = ("attn_out", "mlp_out", "head")
    own = component_map(pair, decisions, ["rl_to_in"], points, ["all"], progress=False, further=())
    pair.close()
    found = measured[0].sel(step=20)
    for name in ("effect", "donor", "recipient"):
        a, b = (data[name].transpose(*own[name].dims).to_numpy() for data in (found, own))
        np.testing.assert_array_equal(a, b)
    difference = (decisions.rl_values - decisions.in_values).sum()
    share = own["effect"].sum("example") / difference
    wanted = share.transpose("direction", "component", "role").to_numpy()
    got = found["share"].transpose("direction", "component", "role").to_numpy()
    np.testing.assert_allclose(got, wanted, rtol=2e-6)


def test_what_was_planted_at_a_step_is_what_carries_it(measured: tuple[xr.Dataset, int]) -> None:
    first = measured[0].sel(step=3, direction="rl_to_in", role="all")
    assert first["fro_norm"].sel(address="blocks.4.mlp") > 0
    quiet = [a for a in first["address"].to_numpy() if a not in ("blocks.4", "blocks.4.mlp")]
    assert (first["fro_norm"].sel(address=quiet) == 0).all()
    inside = {c: float(abs(first["effect_mean"].sel(component=c))) for c in first["component"].to_numpy()}
    before = [c for c in inside if int(c.split(".")[1]) < 4 or c.startswith("blocks.4.attn")]
    assert all(inside[c] == 0 for c in before)  # nothing upstream of it differs
    assert inside["blocks.4.mlp"] > 0


def test_energy_is_what_the_files_say(run: Path, measured: tuple[xr.Dataset, int]) -> None:
    table = compare(IN, run / "step-150", spectra=False, progress=False)
    addresses = ["blocks.3.mlp", "blocks.2.attn", "blocks.2.attn.head.1", "vision.blocks.0", "embed"]
    wanted = by_address(table, IN, run / "step-150", addresses=addresses, progress=False).set_index("address")
    data = measured[0].sel(address=addresses)
    last = data.sel(step=150)
    np.testing.assert_allclose(last["fro_norm"], wanted.loc[addresses, "fro_norm"], rtol=1e-6)
    np.testing.assert_allclose(last["relative_norm"], wanted.loc[addresses, "relative_norm"], rtol=1e-6)
    half = data["fro_norm"].sel(step=100) / last["fro_norm"]
    np.testing.assert_allclose(half, PARTS[100], rtol=1e-3)  # half of the way, rounded to float32


def test_one_checkpoint_is_in_memory_at_a_time(trajectory: Trajectory) -> None:
    held = []
    for step in trajectory.steps[:2]:
        with trajectory.at(step) as pair:
            assert pair.in_ is trajectory.in_
            assert not any(weight.is_meta for weight in pair.rl.model.parameters())
        held.append(pair)  # as whoever keeps the pair does
        gc.collect()
        assert all(tensor.is_meta for one in held for tensor in one.rl.model.state_dict().values())
    assert not any(weight.is_meta for weight in trajectory.in_.model.parameters())
    with pytest.raises(FrankenlensError, match="no step of this trajectory"):
        over_steps(trajectory, EXAMPLES, reference=Step(7, "elsewhere"))


def planned(margins: list[list[float]], reference: int) -> xr.Dataset:
    """Heads with known margins [step head], beside an MLP that is stronger than all."""
    n = len(margins[0])
    values = np.array([[*row, 100.0] for row in margins])[:, None, :, None]
    return xr.Dataset(
        {"margin": (("step", "direction", "component", "role"), values)},
        coords={
            "step": list(range(1, len(margins) + 1)),
            "direction": ["rl_to_in"],
            "component": [*(f"blocks.0.attn.head.{i}" for i in range(n)), "blocks.0.mlp"],
            "role": ["all"],
            "point": ("component", [*["head"] * n, "mlp_out"]),
        },
        attrs={"reference": reference},
    )


def test_survival_of_heads_is_counted() -> None:
    data = planned([[5, 4, 0, 0], [5, 0, 4, 0], [0, 0, 4, 5]], reference=3)
    found = head_survival(data, k=2)
    assert found["of_reference"].tolist() == [0.0, 0.5, 1.0]
    assert found["of_last_step"].tolist()[1:] == [0.5, 0.5] and np.isnan(found["of_last_step"][0])
    assert found["entered"].tolist() == found["left"].tolist() == [0, 1, 1]
    assert set(found["chance"]) == {0.5}
    assert not top_heads(data, 2).sel(component=slice("blocks.0.mlp", None)).size
    with pytest.raises(FrankenlensError, match="k is 4; give 1 to 3"):
        head_survival(data, k=4)


def test_survival_by_chance_is_what_random_sets_have_in_common() -> None:
    margins = np.random.default_rng(0).normal(size=(2000, 12)).tolist()
    found = head_survival(planned(margins, reference=2000), k=3)
    assert found["of_last_step"].mean() == pytest.approx(found["chance"].iloc[0], abs=0.02)


def test_table_and_figure(measured: tuple[xr.Dataset, int]) -> None:
    data, _ = measured
    table = step_table(data)
    assert set(table["step"]) == {3, 20, 100, 150}
    heads = table[table["component"].str.contains("head") & table["direction"].notna()]
    assert (heads.groupby("step")["in_top"].sum() == 9).all()  # a quarter of 36
    one = table.set_index(["step", "component"]).loc[(100, "blocks.3.mlp")]
    assert float(one["share"]) == float(data["share"].sel(step=100, component="blocks.3.mlp").squeeze())
    figure = plot_trajectory(data)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "What carries the decision",
        "Energy of the update",
        "Heads in the top set",
        "Accuracy, and heads that stay",
    ]


def test_energy_of_a_model_and_itself_is_0(trajectory: Trajectory) -> None:
    found = update_energy(trajectory.in_, trajectory.in_, ["blocks.0", "blocks.1.attn.head.0"])
    assert found["fro_norm"].tolist() == [0.0, 0.0]
    assert (found["reference_norm"] > 0).all()


def test_steps_may_be_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from hooks.loading import load_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(IN), LoraConfig(r=2, lora_alpha=2, target_modules=r".*layers\.2.*q_proj")
    )
    updates = {}
    for n in (10, 5):
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
        folder = tmp_path / f"checkpoint-{n}"
        adapted.save_pretrained(str(folder))
        made = load_file(folder / "adapter_model.safetensors")
        a, b = (next(w for key, w in made.items() if part in key) for part in ("lora_A", "lora_B"))
        updates[n] = b @ a
    found = Trajectory.from_pretrained(IN, tmp_path)
    assert [step.number for step in found.steps] == [5, 10]
    path = "model.language_model.layers.2.self_attn.q_proj.weight"
    for step in found.steps:
        with found.at(step) as pair:
            change = pair.rl.model.get_parameter(path) - pair.in_.model.get_parameter(path)
            torch.testing.assert_close(change.detach(), updates[step.number], atol=1e-6, rtol=0)
    found.close()
