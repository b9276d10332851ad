"""Claims about a pair as objects: registered, tested on held-out prompts, answered with interval and power."""

from interp.hypotheses.claim import ALPHA, Claim, ClaimError, Family
from interp.hypotheses.file import read_claims
from interp.hypotheses.held_out import examples_of, fingerprint, origins, population_of
from interp.hypotheses.judge import judge, scores, unseen
from interp.hypotheses.ledger import Ledger, Looks
from interp.hypotheses.measure import Measured, measure, resolved
from interp.hypotheses.one_sided import MIN_TESTED, one_sided
from interp.hypotheses.plots import plot_claims
from interp.hypotheses.run import Outcome, put_to_test
from interp.hypotheses.verdict import Verdict, verdict_table

__all__ = [
    "ALPHA",
    "MIN_TESTED",
    "Claim",
    "ClaimError",
    "Family",
    "Ledger",
    "Looks",
    "Measured",
    "Outcome",
    "Verdict",
    "examples_of",
    "fingerprint",
    "judge",
    "measure",
    "one_sided",
    "origins",
    "plot_claims",
    "population_of",
    "put_to_test",
    "read_claims",
    "resolved",
    "scores",
    "unseen",
    "verdict_table",
]
