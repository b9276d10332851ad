"""Options that know whether they were given.

`--paper` replaces our defaults by a paper's definition, and some options mean something only beside another. An option
that was given is never overridden or ignored without a word: `default` says what holds where it was not given and when
it means anything, and `require_agreement` refuses the rest by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from hooks.errors import FrankenlensError, nearest, shown

_SPEC = "default"
_PATHS = ("in_", "rl", "base")  # or names of repositories
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name, and characters of a path, on the file systems that are common."""


@dataclass(frozen=True)
class Only:
    """When an option means anything.

    Attributes:
        needs: what it needs, in words: "--steer", "a --temperature above 0".
        holds: whether the settings have it.
    """

    needs: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class _Default:
    ours: Any
    paper: Any
    only: Only | None

    def papers(self, config: Any) -> Any:
        """The paper's value for these settings; None where it has none."""
        if not getattr(config, "paper", False):
            return None
        return self.paper(config) if callable(self.paper) else self.paper

    def value(self, config: Any) -> Any:
        """What an option is that was not given."""
        papers = self.papers(config)
        return self.ours if papers is None else papers


def default(ours: Any, *, paper: Any = None, only: Only | None = None) -> Any:
    """The default of a setting for which it matters whether it was given.

    Args:
        ours: its value where it is not given.
        paper: the same with `paper`, or a function of the settings that returns it; None: as without.
        only: when it means anything; by default always.
    """
    return field(default=None, metadata={_SPEC: _Default(ours, paper, only)})


def either(name: str, *papers: Any) -> Callable[[Any], Any]:
    """For `default`: any of several values that a paper has; the first where none of them was given."""
    return lambda config: getattr(config, name) if getattr(config, name) in papers else papers[0]


def a_task(n: int, tasks: Sequence[str]) -> Callable[[Any], int]:
    """For `default`: n questions of every synthetic task, or of one's own data."""
    return lambda config: n * len(tasks) if config.data is None else n


@dataclass(frozen=True)
class Options:
    """Settings some of which have a `default`.

    Attributes:
        filled: what those came to that were not given; `dataclasses.replace` takes it along, so that they are not given
            to its copy either.
    """

    filled: Annotated[Mapping[str, Any], tyro.conf.Fixed, tyro.conf.Suppress] = field(
        default_factory=dict, repr=False, compare=False, kw_only=True
    )

    def __post_init__(self) -> None:
        before, filled = self.filled, {}
        for name, spec in _specs(type(self)).items():
            value = getattr(self, name)
            if value is None or (name in before and value == before[name]):
                filled[name] = spec.value(self)
                object.__setattr__(self, name, filled[name])
        object.__setattr__(self, "filled", filled)

    @property
    def given(self) -> frozenset[str]:
        """Those with a `default` that were given."""
        return frozenset(_specs(type(self))).difference(self.filled)

    @property
    def options(self) -> dict[str, Any]:
        """Every setting and what it is, for the provenance."""
        return {name: value for name, value in asdict(self).items() if name != "filled"}


Config = TypeVar("Config")


def from_command_line(settings: type[Config], args: Sequence[str], prog: str) -> Config:
    """What a command line says, and no more: an option that is not on it is not given to the settings either."""
    if not issubclass(settings, Options):
        own = tyro.cli(settings, prog=prog, args=list(args))
        require_names(own)
        return own
    defaults = settings().options
    found = tyro.cli(settings, prog=prog, args=list(args), default=settings(**defaults))
    named = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    named |= {name.removeprefix("no_") for name in named}
    values = {name: getattr(found, name) for name in defaults}
    return settings(**{k: v for k, v in values.items() if k in named or v != defaults[k]})


def require_known(name: str, given: Iterable[str], choices: Iterable[str]) -> None:
    """Refuse what an option does not offer.

    Raises:
        FrankenlensError: names the nearest choice, and all of them.
    """
    known = list(choices)
    for one in given:
        if one not in known:
            hint = nearest(one, known)
            raise FrankenlensError(
                f"{as_option(name)} has {shown(one)}; choose of {', '.join(known)}. {hint}".strip()
            )


def require_names(config: Any) -> None:
    """Refuse what can be no file, folder or repository: names that no file system takes.

    Raises:
        FrankenlensError: quotes the first.
    """
    for name, value in asdict(config).items():
        if not isinstance(value, Path) and (name not in _PATHS or not isinstance(value, str)):
            continue
        text = str(value)
        parts = Path(text).parts
        if (
            "\0" in text
            or len(text) > LONGEST_PATH
            or any(len(os.fsencode(part)) > LONGEST_NAME for part in parts)
        ):
            raise FrankenlensError(
                f"{as_option(name)} is {shown(text)}; no file is called that (at most {LONGEST_NAME} bytes a name)."
            )


def require_agreement(config: Options) -> None:
    """Refuse options that were given and would be overridden by `--paper`, or mean nothing.

    Raises:
        FrankenlensError: names them, and the way out.
    """
    for name, spec in _specs(type(config)).items():
        if name in config.given:
            _require_agreement(config, name, spec)


def _require_agreement(config: Options, name: str, spec: _Default) -> None:
    value, papers = getattr(config, name), spec.papers(config)
    if papers is not None and value != papers:
        raise FrankenlensError(
            f"--paper is the paper's definition, which has {_as_given(name, papers)}, not {_as_given(name, value)}: "
            f"leave out {as_option(name)}, or --paper."
        )
    asks_for_nothing = isinstance(value, tuple | bool) and not value
    if spec.only is not None and not asks_for_nothing and not spec.only.holds(config):
        raise FrankenlensError(
            f"{_as_given(name, value)} needs {spec.only.needs}: give that, or leave out {as_option(name)}."
        )


def as_option(name: str) -> str:
    """A setting's name as it stands on the command line."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def _as_given(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return as_option(name) if value else as_option(f"no_{name}")
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text.strip().replace("\n", "\\n")  # a refusal is one line
    return f"{as_option(name)} {text}" if text else f"no {as_option(name)}"


def _specs(settings: type) -> dict[str, _Default]:
    return {one.name: one.metadata[_SPEC] for one in fields(settings) if _SPEC in one.metadata}
