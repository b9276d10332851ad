"""The command `frankenlens`: one subcommand per experiment, its settings a dataclass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

import tyro

from hooks.errors import FrankenlensError, nearest

# command -> module with `run(settings)`, its settings, what it does; imported only when asked for
COMMANDS = {
    "map": ("experiments.commands.map", "MapConfig", "which components carry what RL changed in a pair"),
    "suite": ("experiments.commands.suite", "SuiteConfig", "all analyses of a pair on one page"),
    "metrics": (
        "experiments.commands.metrics",
        "MetricsConfig",
        "what answers owe to image, description, reasoning",
    ),
    "transfer": (
        "experiments.commands.transfer",
        "TransferConfig",
        "which of RL's weights bring its gains to IN",
    ),
    "train-triple": ("experiments.triple.train", "TrainTriple", "make the embedded Base, IN and RL again"),
    "freeze": ("experiments.commands.freeze", "FreezeConfig", "what RL loses with a component frozen"),
    "compare": (
        "experiments.commands.compare",
        "CompareConfig",
        "what each stage of training changed in the weights",
    ),
    "localize": ("experiments.commands.localize", "LocalizeConfig", "which layers carry a visual function"),
    "attention": (
        "experiments.commands.attention",
        "AttentionConfig",
        "how much reasoning looks at the image, IN and RL",
    ),
    "lens": (
        "experiments.commands.lens",
        "LensConfig",
        "what each layer of IN and RL would say, and which parts write it",
    ),
    "knockout": (
        "experiments.commands.knockout",
        "KnockoutConfig",
        "which information routes RL opened or closed",
    ),
    "lockstep": (
        "experiments.commands.lockstep",
        "LockstepConfig",
        "RL's components moved into IN while both generate",
    ),
    "test": (
        "experiments.commands.claims",
        "ClaimsConfig",
        "whether claims in a file hold on held-out prompts",
    ),
    "planted": (
        "experiments.commands.planted",
        "PlantedConfig",
        "which method finds a change that was planted",
    ),
    "paths": (
        "experiments.commands.paths",
        "PathsConfig",
        "by which paths RL's components act on the decision",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0, or 2 after a mistake of the user's, told in one line on standard error.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"frankenlens {version('frankenlens')}")
        return 0
    try:
        return _run(name, rest)
    except FrankenlensError as error:
        print(f"frankenlens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("frankenlens: interrupted; nothing unfinished was left in --out as a result", file=sys.stderr)
        return 130


def _run(name: str, rest: Sequence[str]) -> int:
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        raise FrankenlensError(f"there is no command {name!r}, only {', '.join(COMMANDS)}. {hint}".strip())
    module_name, settings, _ = COMMANDS[name]
    module = import_module(module_name)
    config = tyro.cli(getattr(module, settings), prog=f"frankenlens {name}", args=list(rest))
    module.run(config)
    return 0


def _help() -> str:
    lines = [f"  {name:<14}{what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: frankenlens COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "frankenlens COMMAND --help lists the options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
