"""`frankenlens trajectory` on a run between IN and the embedded RL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from experiments import embedded
from experiments.cli import main
from experiments.commands import trajectory
from experiments.frame import Command
from experiments.planning import PlanSettings, planned
from interp.results import load_dataset
from tests.interp.plan.test_map_plans import counted

IN, RL = embedded.path("in"), embedded.path("rl")
CLAIMS = """
decision: first
claims:
  - {name: mlp, component: blocks.3.mlp, quantity: effect, at_least: 0.01}
  - {name: head, component: blocks.2.attn.head.1, quantity: effect, at_least: 50}
"""
FEW = ["--n", "24", "--decision", "first", "--points", "mlp_out", "head", "--max-new-tokens", "48"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints on the line from IN to RL."""
    out = tmp_path_factory.mktemp("run")
    before, after = (load_file(folder / "model.safetensors") for folder in (IN, RL))
    for n, part in {5: 0.1, 10: 0.4, 20: 0.7, 40: 1.0}.items():
        shutil.copytree(RL, out / f"checkpoint-{n}")
        state = {key: weight + part * (after[key] - weight) for key, weight in before.items()}
        save_file(state, out / f"checkpoint-{n}" / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_run_becomes_a_page_and_goes_on_where_it_was(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    out = tmp_path / "out"
    given = ["--in", str(IN), "--rl", str(run / "checkpoint-*"), *FEW, "--out", str(out)]
    given += ["--claims", str(tmp_path / "claims.yaml")]
    own, done = trajectory.over_steps, []

    def killed(*args, look, **settings):
        def stopped(step, pair, decisions):
            look(step, pair, decisions)
            done.append(step.number)
            if len(done) == 2:
                raise KeyboardInterrupt

        return own(*args, look=stopped, **settings)

    monkeypatch.setattr(trajectory, "over_steps", killed)
    assert main(["trajectory", *given]) == 130
    assert done == [40, 5] and not (out / "report.html").exists()
    first = {file: file.stat().st_mtime_ns for file in out.rglob("*.part")}
    assert first
    monkeypatch.undo()
    assert main(["trajectory", *given]) == 0
    again = {file: file.stat().st_mtime_ns for file in out.rglob("*.part")}
    assert first.items() <= again.items() and len(again) > len(
        first
    )  # nothing of the first two is made again
    told = capsys.readouterr().out
    assert "decisions of step 40, nats: step 5:" in told
    assert "Claim 'head': " in told and "supported" not in told.split("Claim 'head': ")[1].split("\n")[0]
    names = {"trajectory.csv", "trajectory_heads.csv", "trajectory_claims.csv", "trajectory.png"}
    assert names <= {file.name for file in out.iterdir()}
    data = load_dataset(out / "trajectory.nc")
    assert data["step"].to_numpy().tolist() == [5, 10, 20, 40]
    decided = data["decided"].to_numpy()
    assert (decided[1:] > decided[:-1]).all()  # along the line the models part ever further
    claims = pd.read_csv(out / "trajectory_claims.csv")
    assert claims.groupby("step").size().to_dict() == {5: 2, 10: 2, 20: 2, 40: 2}
    assert "step 40" in data.attrs["provenance"] and "checkpoint-5" in data.attrs["provenance"]


def test_what_makes_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*args: str) -> str:
        assert main(["trajectory", *args, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    pair = ["--in", str(IN), "--rl", str(run)]
    assert "--reference 7 is no step of the run; choose of 5, 10, 20, 40" in said(*pair, "--reference", "7")
    assert "no folder is called" in said("--in", str(IN), "--rl", str(run / "step-*"))
    assert "--in and --rl go together" in said("--rl", str(run))
    (tmp_path / "claims.yaml").write_text(
        CLAIMS.replace("quantity: effect", "body: weights, quantity: accuracy")
    )
    assert "claim 'mlp' is of accuracy" in said(*pair, "--claims", str(tmp_path / "claims.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_plan_is_what_is_computed(run: Path, tmp_path: Path) -> None:
    command: Command = trajectory.COMMAND
    config = trajectory.TrajectoryConfig(
        in_=str(IN),
        rl=(str(run),),
        n=4,
        max_new_tokens=8,
        decision="soft",
        points=("attn_out", "mlp_out"),
        unparsed=1.0,
        out=tmp_path,
    )
    measure, models = command.prepare(config), command.open(config)
    computed = counted(lambda: list(measure(models)))
    models.close()
    found = planned("trajectory", command, config, PlanSettings(trace_tokens=8, rate="1TFLOP/s"))
    assert computed <= found.flops <= 1.25 * computed  # IN's clean runs are counted with every step
