"""From logits to one number per prompt, and logits that are made where a metric reads them."""

from interp.metrics.kinds import (
    HELD,
    AnswerLogProbability,
    KLToReference,
    LogitDifference,
    SoftDifference,
    TraceLogLikelihood,
    evaluate,
)
from interp.metrics.reading import Metric, Reading, Rows, Summed

__all__ = [
    "HELD",
    "AnswerLogProbability",
    "KLToReference",
    "LogitDifference",
    "Metric",
    "Reading",
    "Rows",
    "SoftDifference",
    "Summed",
    "TraceLogLikelihood",
    "evaluate",
]
