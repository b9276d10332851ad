"""`frankenlens test` on the embedded pair and on several pairs; claims as pytest items."""

import dataclasses
import json

import pandas as pd
import pytest
from transformers.utils import logging

from experiments import embedded
from experiments.cli import main
from experiments.commands import claims as command
from experiments.commands.claims import ClaimsConfig
from experiments.options import from_command_line
from interp.hypotheses import Claim, Verdict
from interp.hypotheses.judge import judge
from interp.questions.tasks import REASONING, sample
from interp.results.files import load_dataset

pytest_plugins = "pytester"

FILES = ["claims.csv", "claims.png", "report.html", "test.nc"]
SMALL = ["--n", "48", "--max-new-tokens", "48"]
TEXT = """\
decision: first
claims:
  - name: all weights carry it
    component: [blocks.0-8, vision, projector, embed, ln_final]
    body: weights
    at_least: 0.9
  - name: head 0 carries half
    component: blocks.8.attn.head.0
    role: template
    at_least: 0.5
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    seen = [sample(task, 2, 1, "map")[0].id for task in REASONING]
    text = TEXT.replace("decision", f"found_on: {json.dumps(seen)}\ndecision", 1)
    (folder / "mine.claims.yaml").write_text(text)
    same, rl = (str(embedded.path(stage)) for stage in ("in", "rl"))
    pairs = ["--pairs", same, rl, same, same]
    argv = ["test", str(folder / "mine.claims.yaml"), *pairs, *SMALL, "--out", str(folder / "out")]
    fresh = command.load(from_command_line(ClaimsConfig, argv[1:], "test"))
    assert not set(seen) & {example.id for example in fresh.examples}
    assert fresh.left_out == {"looked at when the claims were found": len(seen)}
    assert main([*argv, "--allow-reuse"]) == 0
    return folder / "out"


@pytest.mark.slow
def test_several_pairs_give_one_table_marked_exploratory(out) -> None:
    assert sorted(path.name for path in out.iterdir()) == FILES
    table = pd.read_csv(out / "claims.csv")
    assert list(table["verdict"]) == ["supported", "refuted", "refused", "refused"]
    assert table["pair"].nunique() == 2
    assert set(table["origin"]) == {"exploratory"}
    assert table["correction"].str.startswith("Holm over 2 claims").all()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "all weights carry it: SUPPORTED [EXPLORATORY: tested on prompts it was found on]" in page
    assert "same weights" in page
    dataset = load_dataset(out / "test.nc")
    assert dataset.sizes["looked_at"] == 48
    effect, total = (
        dataset[name].isel(pair=0).sel(claim="all weights carry it") for name in ("effect", "total")
    )
    assert float(effect.sum() / total.sum()) == pytest.approx(table["value"][0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "none.yaml. The nearest folder that exists is"),
        (["--pairs", "a", "b", "--in", "a", "--rl", "b"], "leave --in and --rl out"),
        (["--pairs", "a", "b", "a", "b"], "names a b twice"),
    ],
)
def test_a_mistake_is_one_line(argv, words, tmp_path, capsys) -> None:
    (tmp_path / "c.yaml").write_text(TEXT)
    file = [str(tmp_path / "c.yaml")] if argv else [str(tmp_path / "none.yaml")]
    assert main(["test", *file, *argv]) == 2
    assert words in capsys.readouterr().err


class _NoPair:
    def close(self) -> None:
        pass


@pytest.fixture
def verdicts_of(monkeypatch):
    """The pair stands aside: verdicts by the claim's name, families as they were registered."""
    families = []

    def load_pair(config):
        assert not logging.is_progress_bar_enabled()
        return _NoPair()

    def tested(pair, family, asked, config, progress):
        assert logging.is_progress_bar_enabled()  # as it was
        assert not progress  # pytest would show the bars with what was captured
        families.append(family)
        none = judge(family, {c.name: c for c in family.claims}, {}, {}, {})
        said = [
            _told(v, next(w for w in ("supported", "refuted", "undecided") if w in v.claim.name))
            for v in none
        ]
        return command.Outcome(tuple(said), (), None, {})

    monkeypatch.setattr(command, "tested", tested)
    monkeypatch.setattr(command, "load_pair", load_pair)
    return families


def _told(verdict: Verdict, said: str) -> Verdict:
    return dataclasses.replace(verdict, verdict=said, n=31, p=0.2, p_against=0.3, origin="held out")


ARGS = [
    "-p",
    "no:frankenlens",
    "-p",
    "frankenlens_pytest",
    "-p",
    "no:jaxtyping",
    "-p",
    "no:cacheprovider",
]


def test_a_claims_file_is_collected_and_fails_readably(pytester, verdicts_of) -> None:
    names = "\n".join(
        f"  - {{name: is {said}, component: blocks.3.mlp, at_least: 0.2}}"
        for said in ("supported", "refuted", "undecided")
    )
    pytester.makefile(".claims.yaml", mine=f"claims:\n{names}\n")
    ran = pytester.runpytest_inprocess(*ARGS, "--frankenlens-options", "--n 4")
    ran.assert_outcomes(passed=1, failed=2)
    ran.stdout.fnmatch_lines(
        [
            "*is undecided: UNDECIDED at n = 31",
            "*recovery of blocks.3.mlp (activation, at all, RL into IN) >= 0.2",
        ]
    )
    ran.stdout.fnmatch_lines(["*= claims =*", "supported: is supported*", "refuted: is refuted*"])
    assert "Traceback" not in ran.stdout.str()
    pytester.runpytest_inprocess(*ARGS, "--frankenlens-undecided", "skip").assert_outcomes(
        passed=1, failed=1, skipped=1
    )
    ran = pytester.runpytest_inprocess(*ARGS, "-k", "refuted")
    ran.assert_outcomes(failed=1, deselected=2)
    assert [len(family.claims) for family in verdicts_of] == [
        3,
        3,
        3,
    ]  # the correction does not see what is selected


def test_a_mistake_in_a_claims_file_is_told_with_its_line(pytester, verdicts_of) -> None:
    pytester.makefile(".claims.yaml", bad="claims:\n  - {name: a, component: blocks.3.mpl, at_least: 0.2}\n")
    ran = pytester.runpytest_inprocess(*ARGS)
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(["*bad.claims.yaml:2: claim 'a': 'blocks.3.mpl' is not an address*"])


def test_the_marker_registers_the_claims_of_a_module_as_a_family(pytester, verdicts_of) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.claim(component="blocks.3.mlp", role="reasoning", at_least=0.2, found_on=())
        def test_supported(claim_verdict):
            claim_verdict.require()

        @pytest.mark.claim(component="blocks.4.mlp", at_least=0.2)
        def test_refuted(claim_verdict):
            claim_verdict.require()

        def test_none(claim_verdict):
            pass
        """
    )
    ran = pytester.runpytest_inprocess(*ARGS, "--strict-markers", "-k", "supported")
    ran.assert_outcomes(passed=1, deselected=2)
    assert [claim.component for claim in verdicts_of[0].claims] == [("blocks.3.mlp",), ("blocks.4.mlp",)]
    assert verdicts_of[0].claims[0] == Claim(
        verdicts_of[0].claims[0].name, "blocks.3.mlp", at_least=0.2, role="reasoning", found_on=frozenset()
    )
    ran = pytester.runpytest_inprocess(*ARGS)
    ran.assert_outcomes(passed=1, failed=1, errors=1)
    ran.stdout.fnmatch_lines(["*claim_verdict needs @pytest.mark.claim*", "*REFUTED*"])


def test_pytest_starts_without_torch(pytester) -> None:
    pytester.makepyfile("import sys\n\ndef test_none():\n    assert 'torch' not in sys.modules\n")
    pytester.runpytest_subprocess(*ARGS).assert_outcomes(passed=1)


def test_pairs_whose_paths_end_alike_keep_their_names_apart() -> None:
    alike = ClaimsConfig(pairs=(("x/a/in", "x/a/rl"), ("y/a/in", "y/a/rl")))
    other = ClaimsConfig(pairs=(("x/a/in", "x/a/rl"), ("x/b/in", "x/b/rl")))
    names = [[command.pair_name(own) for own in command.each_pair(config)] for config in (alike, other)]
    assert names == [["x/a/in → x/a/rl", "y/a/in → y/a/rl"], ["a/in → a/rl", "b/in → b/rl"]]


def test_the_default_seed_is_not_that_of_the_map() -> None:
    assert ClaimsConfig().seed == 1
