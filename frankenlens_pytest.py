"""Claims as tests: `*.claims.yaml` files, and Python tests with the marker `claim`, run by pytest on any pair.

    pytest claims/ --frankenlens-in path/of/IN --frankenlens-rl path/of/RL --frankenlens-options "--n 400"

    @pytest.mark.claim(component="blocks.8.attn.head.2", role="reasoning", at_least=0.2, found_on=())
    def test_head_2(claim_verdict):
        claim_verdict.require()

A claim that is supported passes. The claims of a file, or those of a module (`family=` names another), are one family
and corrected together, whichever of them are selected. Nothing of torch is imported before a claim is collected.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from interp.hypotheses import Claim, Family, Verdict

SUFFIXES = (".claims.yaml", ".claims.yml")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("frankenlens", "claims about a pair of checkpoints")
    group.addoption("--frankenlens-in", help="IN, a folder or a repository id; default: the pair that ships")
    group.addoption("--frankenlens-rl", help="RL")
    group.addoption("--frankenlens-options", default="", help="further options, as of `frankenlens test`")
    group.addoption(
        "--frankenlens-undecided",
        choices=("fail", "skip"),
        default="fail",
        help="what an undecided claim does",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "claim(component, at_least=, at_most=, ..., family=): a claim about a pair, as interp.hypotheses.Claim; its "
        "verdict is the fixture claim_verdict",
    )
    config.stash[_BENCH] = Bench(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_BENCH].close()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.name.endswith(SUFFIXES):
        return ClaimsFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Register the marked tests' claims before any of them is deselected."""
    for item in items:
        marker = None if isinstance(item, ClaimItem) else item.get_closest_marker("claim")
        if marker is not None:
            config.stash[_BENCH].register(item, marker)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_BENCH].lines
    if lines:
        terminalreporter.section("claims")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def claim_verdict(request: pytest.FixtureRequest) -> Verdict:
    """What became of the claim in this test's marker `claim`: an `interp.hypotheses.Verdict`."""
    if request.node.get_closest_marker("claim") is None:
        pytest.fail("claim_verdict needs @pytest.mark.claim(component=..., at_least=...)", pytrace=False)
    from hooks.errors import FrankenlensError

    try:
        return request.config.stash[_BENCH].marked(request.node)
    except FrankenlensError as error:
        pytest.fail(str(error), pytrace=False)


class ClaimsFile(pytest.File):
    """A file of claims, one item each."""

    def collect(self) -> Iterator[ClaimItem]:
        from hooks.errors import FrankenlensError
        from interp.hypotheses import read_claims

        try:
            family = read_claims(self.path)
        except FrankenlensError as error:
            raise self.CollectError(str(error)) from None
        for claim in family.claims:
            yield ClaimItem.from_parent(self, name=claim.name, family=family)


class ClaimItem(pytest.Item):
    """One claim; passes where it is supported."""

    def __init__(self, *, family: Family, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.family = family
        self.add_marker(pytest.mark.claim)

    def runtest(self) -> None:
        verdict = self.config.stash[_BENCH].verdicts(str(self.path), self.family)[self.name]
        if verdict.verdict == "undecided" and self.config.getoption("--frankenlens-undecided") == "skip":
            pytest.skip(verdict.line)
        verdict.require()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from hooks.errors import FrankenlensError

        if isinstance(excinfo.value, AssertionError | FrankenlensError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        claim = next(claim for claim in self.family.claims if claim.name == self.name)
        return self.path, int(claim.where.rpartition(":")[2]) - 1, f"claim: {self.name}"


class Bench:
    """The pair and its prompts, opened when the first claim is run, and the verdicts of each family."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._opened: tuple[Any, Any] | None = None
        self._found: dict[str, dict[str, Verdict] | Exception] = {}
        self._claims: dict[str, dict[str, Claim | Exception]] = {}
        self.lines: list[str] = []

    def register(self, item: pytest.Item, marker: pytest.Mark) -> None:
        """A marked test's claim; what is wrong with it is told when the test runs."""
        from hooks.errors import FrankenlensError
        from interp.hypotheses import Claim

        given = dict(marker.kwargs)
        family = given.pop("family", str(item.path))
        given = {"name": item.nodeid, "where": item.nodeid, **given}
        if given.get("found_on") is not None:
            given["found_on"] = frozenset(given["found_on"])
        try:
            claim: Claim | Exception = Claim(*((given.pop("name"), *marker.args)), **given)
        except (FrankenlensError, TypeError) as error:
            claim = FrankenlensError(f"{item.nodeid}: {error}")
        self._claims.setdefault(family, {})[item.nodeid] = claim

    def marked(self, item: pytest.Item) -> Verdict:
        """The verdict on a marked test's claim."""
        from interp.hypotheses import Family

        name, own = next((name, own) for name, own in self._claims.items() if item.nodeid in own)
        wrong = [claim for claim in own.values() if isinstance(claim, Exception)]
        if wrong:
            mine = own[item.nodeid]
            raise mine if isinstance(mine, Exception) else wrong[0]
        claims = [claim for claim in own.values() if not isinstance(claim, Exception)]
        claim = own[item.nodeid]
        return self.verdicts(name, Family(name, tuple(claims)))[claim.name]  # type: ignore[union-attr]

    def verdicts(self, key: str, family: Family) -> dict[str, Verdict]:
        """Of a family by claim, tested once."""
        if key not in self._found:
            try:
                self._found[key] = self._test(key, family)
            except Exception as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _test(self, key: str, family: Family) -> dict[str, Verdict]:
        from experiments.commands import claims

        config = self._settings() if self._opened is None else self._opened[1]
        asked = claims.held_out(family, config)
        if self._opened is None:
            with _no_bars():
                self._opened = claims.load_pair(config), config
        own = replace(config, claims=Path(key))  # looks are counted beside the file or module of the claims
        outcome = claims.tested(self._opened[0], family, asked, own, progress=False)
        self.lines += [verdict.line for verdict in outcome.verdicts]
        return {verdict.claim.name: verdict for verdict in outcome.verdicts}

    def _settings(self) -> Any:
        from experiments.commands.claims import ClaimsConfig
        from experiments.options import from_command_line
        from experiments.settings import require_sound

        args = shlex.split(self._config.getoption("--frankenlens-options"))
        for name in ("in", "rl"):
            value = self._config.getoption(f"--frankenlens-{name}")
            args += [f"--{name}", value] if value is not None else []
        try:
            config = from_command_line(ClaimsConfig, args, "--frankenlens-options")
        except SystemExit as stop:
            raise pytest.UsageError("--frankenlens-options: see `frankenlens test --help`") from stop
        require_sound(config)
        return config

    def close(self) -> None:
        """Close the models."""
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars, which pytest would show below a claim that fails."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_BENCH: pytest.StashKey[Bench] = pytest.StashKey()
