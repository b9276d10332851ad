"""Traces that were written elsewhere: by vLLM, SGLang, lm-eval, a trainer's log, or a script of one's own."""

from interp.pair.elsewhere.given import Traces, read_traces
from interp.pair.elsewhere.rows import TraceRow, trace_rows

__all__ = ["TraceRow", "Traces", "read_traces", "trace_rows"]
