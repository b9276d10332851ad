"""Updates of weights, random ones too: what was asked for, and what weights hold of it in their own type."""

from interp.updates.drawn import as_large, random_update
from interp.updates.realized import (
    LEAST_COSINE,
    LEAST_SHARE,
    NORM_WITHIN,
    Realized,
    dot,
    rounded,
    type_name,
    way_out,
    wide_type,
)

__all__ = [
    "LEAST_COSINE",
    "LEAST_SHARE",
    "NORM_WITHIN",
    "Realized",
    "as_large",
    "dot",
    "random_update",
    "rounded",
    "type_name",
    "way_out",
    "wide_type",
]
