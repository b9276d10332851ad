"""The analyses: one module per method a paper would name."""

import warnings

with warnings.catch_warnings():  # the first import of it warns in a notebook without ipywidgets
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401
