"""One runnable experiment per question asked of a pair, the recipe of the embedded triple, the command line."""

import os

import interp  # noqa: F401  # before tqdm: it keeps its bars from warning

# Read when torch is first imported. OpenMP threads that wait by spinning stall a small model on cores that other
# work shares; threads that sleep cost it nothing measurable on idle ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
