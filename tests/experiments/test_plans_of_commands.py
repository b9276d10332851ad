"""What whole commands are planned to compute, against what is counted while they run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import embedded, planning
from experiments.cli import COMMANDS
from experiments.options import from_command_line
from experiments.settings import Questions, load_pair
from interp.decision import find_decisions
from interp.pair.pair import Pair
from interp.questions.tasks import sample
from tests.interp.plan.test_map_plans import counted

pytestmark = pytest.mark.slow
WIDE = "--dtype float32"


@pytest.fixture(scope="module")
def triple() -> Pair:
    return Pair.from_pretrained(*(embedded.path(one) for one in ("in", "rl", "base")))


def configured(name: str, args: list[str]) -> tuple[Any, Any]:
    command = import_module(COMMANDS[name][0]).COMMAND
    return command, from_command_line(command.settings, args, name)


def planned(name: str, command: Any, config: Any, tokens: int, **more: Any) -> Any:
    settings = planning.PlanSettings(trace_tokens=tokens, rate="1TFLOP/s", **more)
    return planning.planned(name, command, config, settings)


@pytest.mark.parametrize(
    ("name", "n", "tokens", "args"),
    [
        ("attention", 4, 13, ""),
        ("metrics", 4, 8, ""),
        ("transfer", 4, 8, f"--variants factors --ranks --scales 0.5 --controls {WIDE}"),
        ("transfer", 4, 8, f"--variants orders parts --ranks --scales --controls layers {WIDE}"),
        ("map", 3, 8, "--batch-size 2 --points attn_out --decision soft --direction rl_to_in"),
        ("localize", 2, 2, "--modes single --parts block attn --model base"),
        ("lockstep", 3, 8, "--components blocks.4.mlp blocks.5.attn.head.1 --n-random 1"),
        ("paths", 3, 8, "--decision soft --batch-size 2 --senders blocks.5.attn.head.1 --direction rl_to_in"),
        ("paths", 3, 8, "--decision soft --top 1 --receivers logits --where decision"),
        ("planted", 3, 6, "--kinds rl --pairs 1 --noise-pairs 1 --changed 2"),
        ("suite", 4, 13, f"--parts metrics attention {WIDE}"),
    ],
)
def test_flops_of_whole_commands(
    triple: Pair, tmp_path: Path, name: str, n: int, tokens: int, args: str
) -> None:
    given = ["--n", str(n), "--max-new-tokens", str(tokens), "--unparsed", "1", *args.split()]
    command, config = configured(name, [*given, "--out", str(tmp_path)])
    measure = command.prepare(config)
    run = counted(lambda: list(measure(triple)))
    assert planned(name, command, config, tokens).flops == pytest.approx(run, rel=0.1)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("knockout", "--routes 'image -> question' 'reasoning -> last'"),
        ("knockout", "--layers suffixes --mass lost --routes 'question -> reasoning' --batch-size 2"),
        ("lens", "--tuned-steps 3"),
    ],
)
def test_flops_of_commands_that_read_whole_traces(triple: Pair, name: str, args: str) -> None:
    """A plan knows one length: those that both models write with the same length, and of which they differ."""
    asked = sample("sum", 24, seed=0, split="map")
    found = find_decisions(triple, asked, "first", max_new_tokens=32, batch_size=24)
    lengths = {len(trace.trace_ids) for trace in (*found.rl_traces, *found.in_traces)}
    assert len(lengths) == 1
    (tokens,), some = lengths, list(found.decisions)[:4]
    at = sum(one.index or 0 for one in some) / len(some) / tokens
    command, config = configured(name, ["--n", "4", *shlex.split(args)])
    command = replace(command, load=lambda config: Questions([asked[one.row] for one in some]))
    measure = command.prepare(config)
    run = counted(lambda: list(measure(triple)))
    assert planned(name, command, config, tokens, decided_at=at).flops == pytest.approx(run, rel=0.1)


CLAIMS = """\
decision: soft
claims:
  - {name: head, component: blocks.4.attn.head.1, at_least: 0.2}
  - {name: mlp, component: blocks.3.mlp, quantity: effect, at_least: 0.1, direction: in_to_rl, role: question}
  - {name: both, component: [blocks.3.mlp, blocks.5.attn.head.0], quantity: effect, at_least: 0.1}
  - {name: late, component: Late, body: weights, quantity: accuracy, at_least: 0.1}
  - {name: early, component: Early, body: weights, at_least: 0.1}
"""


def test_flops_of_a_test_of_claims(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    args = [str(tmp_path / "claims.yaml"), *"--n 4 --unparsed 1 --max-new-tokens 8".split()]
    command, config = configured("test", args)
    measure, pairs = command.prepare(config), command.open(config)
    run = counted(lambda: list(measure(pairs))) - counted(
        lambda: load_pair(config)
    )  # as opened, it is checked
    assert planned("test", command, config, 8).flops == pytest.approx(run, rel=0.1)


def trained(run: Any) -> int:
    """As `counted`, with gradients."""
    with torch.enable_grad():
        return counted(lambda: torch.enable_grad()(run)())


def test_flops_of_making_the_triple(tmp_path: Path) -> None:
    small = "--align.steps 2 --align.batch 4 --perception.steps 2 --perception.batch 4 --cold-start.steps 2"
    small += " --cold-start.batch 4 --rl.steps 2 --rl.prompts 2 --rl.samples 4 --n 2 --threads 1"
    command, config = configured("train-triple", ["--out", str(tmp_path / "triple"), *small.split()])
    run = trained(lambda: command.run(config))
    assert planned("train-triple", command, config, 16).flops == pytest.approx(run, rel=0.1)


def test_flops_of_freezing(tmp_path: Path) -> None:
    few = "--steps 2 --prompts 2 --samples 4 --regions Late --random 0 --reruns 0 --n 2"
    command, config = configured("freeze", ["--out", str(tmp_path), *few.split()])
    run = trained(lambda: command.run(config)) - 2 * counted(lambda: load_pair(config))
    assert planned("freeze", command, config, 12).flops == pytest.approx(run, rel=0.1)
