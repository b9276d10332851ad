"""Traces that were written elsewhere: by vLLM, SGLang, lm-eval, a trainer's log, or a script of one's own."""

from interp.pair.elsewhere.given import Traces, at_least_as_long, read_traces
from interp.pair.elsewhere.rows import TraceRow, trace_rows
from interp.pair.elsewhere.writers import Continuation, Here, Vllm, Writer

__all__ = [
    "Continuation",
    "Here",
    "TraceRow",
    "Traces",
    "Vllm",
    "Writer",
    "at_least_as_long",
    "read_traces",
    "trace_rows",
]
