"""The command `frankenlens`: one subcommand per question, its settings a dataclass, its frame `experiments.frame`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from hooks.errors import FrankenlensError, nearest, shown

# command -> module with its `COMMAND`, what it asks; imported only when asked for
COMMANDS = {
    "map": ("experiments.commands.map", "which components carry what RL changed in a pair"),
    "suite": (
        "experiments.commands.suite",
        "metrics, localize, attention, compare and transfer, on one page",
    ),
    "metrics": ("experiments.commands.metrics", "what answers owe to image, description, reasoning"),
    "transfer": ("experiments.commands.transfer", "which of RL's weights bring its gains to IN"),
    "train-triple": ("experiments.triple.train", "make the embedded Base, IN and RL again"),
    "freeze": ("experiments.commands.freeze", "what RL loses with a component frozen"),
    "compare": ("experiments.commands.compare", "what each stage of training changed in the weights"),
    "localize": ("experiments.commands.localize", "which layers carry a visual function"),
    "attention": ("experiments.commands.attention", "how much reasoning looks at the image, IN and RL"),
    "lens": ("experiments.commands.lens", "what each layer of IN and RL would say, and which parts write it"),
    "knockout": ("experiments.commands.knockout", "which information routes RL opened or closed"),
    "lockstep": ("experiments.commands.lockstep", "RL's components moved into IN while both generate"),
    "test": ("experiments.commands.claims", "whether claims in a file hold on held-out prompts"),
    "planted": ("experiments.commands.planted", "which method finds a change that was planted"),
    "trajectory": ("experiments.commands.trajectory", "what carries RL's decision at which step of its run"),
    "traces": ("experiments.commands.traces", "what IN and RL write, into files that --traces reads"),
    "paths": ("experiments.commands.paths", "by which paths RL's components act on the decision"),
}


INTERRUPTED = "interrupted; what a command keeps of finished work is taken up when it is given again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0; 2 after a mistake of the user's or on a full disk, 130 after Ctrl-C, told in one line on standard error.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"frankenlens {version('frankenlens')}")
        return 0
    code, told = _outcome(name, rest)
    if told:
        _end_bars()
        print(f"frankenlens: {told}", file=sys.stderr)
    return code


def _end_bars() -> None:
    """Let the progress bars of what failed end their lines, so that an error has one of its own."""
    bars = getattr(
        getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ()
    )  # tqdm has no public list
    for bar in list(bars):
        bar.close()


def _outcome(name: str, rest: Sequence[str]) -> tuple[int, str]:
    """The exit code, and what is to be told."""
    try:
        _run(name, rest)
    except FrankenlensError as error:
        return 2, str(error)
    except Exception as error:
        from interp.results.whole import disk_full, is_full

        if is_full(error):
            return 2, str(disk_full("what is being written"))
        if not isinstance(error, OSError):
            raise
        place = (
            f"{error.filename}: " if error.filename else ""
        )  # that the user named, and that cannot be used
        return 2, f"{place}{error.strerror or error}"
    except KeyboardInterrupt:
        return 130, INTERRUPTED
    return 0, ""


def _run(name: str, rest: Sequence[str]) -> None:
    plans, rest = name == "plan" or "--plan" in rest, [arg for arg in rest if arg != "--plan"]
    if name == "plan":
        if not rest or rest[0] in ("-h", "--help"):
            print(_help_of_plan())
            return
        name, *rest = rest
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        raise FrankenlensError(
            f"there is no command {shown(name)}, only {', '.join(COMMANDS)}. {hint}".strip()
        )
    from experiments.options import from_command_line

    command = import_module(COMMANDS[name][0]).COMMAND
    if plans:
        from experiments.planning import plan

        plan(name, command, rest)
        return
    command.run(from_command_line(command.settings, rest, f"frankenlens {name}"))


def _help() -> str:
    lines = [f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: frankenlens COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "frankenlens COMMAND --help lists the options.",
            "frankenlens plan COMMAND [OPTIONS], or COMMAND --plan, says what it would take, and runs nothing.",
        ]
    )


def _help_of_plan() -> str:
    """Which commands can be planned; the others say so by themselves."""
    having = [
        name
        for name, (module, _) in COMMANDS.items()
        if getattr(import_module(module).COMMAND, "plan", None) is not None
    ]
    return "\n".join(
        [
            "usage: frankenlens plan COMMAND [OPTIONS OF THE PLAN] [OPTIONS OF THE COMMAND]",
            "",
            f"  planned: {', '.join(having)}",
            "",
            "frankenlens plan COMMAND --help lists the options of the plan.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
