"""The hook names inside nnsight's traces. nnsight itself is imported when a trace is first opened."""
