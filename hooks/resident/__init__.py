"""Two models in the memory of one, of which the second is the entries in which it differs from the first."""

from hooks.resident.away import Away, here
from hooks.resident.changes import Change, Comparing, as_bits, change, piece_size, pieces_of, size_of
from hooks.resident.turns import Turns

__all__ = [
    "Away",
    "Change",
    "Comparing",
    "Turns",
    "as_bits",
    "change",
    "here",
    "piece_size",
    "pieces_of",
    "size_of",
]
