"""Fine-grained metrics of 2602.12395: what an answer owes to the image, to a description of it, to reasoning alone.

With i the image, b a black one of the same size, d a description in words, p the problem and y its answer:

- vis: mean[f(i,p) = y and f(b,p) ≠ y]
- v2r: mean[f(i,p) = y and f(b,d,p) = y]
- rea: mean[f(p) = y], on problems without an image

`vis` counts lucky answers too, so it stands beside its mirror image, mean[f(b,p) = y and f(i,p) ≠ y], and `v2r` beside
mean[f(i,p) = y and f(b,p) = y], what it would be if the description said nothing.
"""

from interp.fine_grained.descriptions import MODEL, REQUEST, described_by_model, in_words, with_descriptions
from interp.fine_grained.measure import Judge, ask, fine_grained, metrics_of, table_2_metrics
from interp.fine_grained.plots import plot_metrics
from interp.fine_grained.questions import METRICS, PAPER, PAPER_N, TEMPLATE, VARIANTS, Questions, questions
from interp.fine_grained.table import change_table, fine_grained_table

__all__ = [
    "METRICS",
    "MODEL",
    "PAPER",
    "PAPER_N",
    "REQUEST",
    "TEMPLATE",
    "VARIANTS",
    "Judge",
    "Questions",
    "ask",
    "change_table",
    "described_by_model",
    "fine_grained",
    "fine_grained_table",
    "in_words",
    "metrics_of",
    "plot_metrics",
    "questions",
    "table_2_metrics",
    "with_descriptions",
]
