"""Weights of some addresses from a donor: grafts, merges, and what they bring of RL's gains to IN (2602.12395)."""

from interp.transfer.adapted import AdaptedReport, save_adapted
from interp.transfer.answers import answers
from interp.transfer.grafts import Graft, grafted, measured_graft, save_grafted
from interp.transfer.merging import MergeReport, Recipe, merge
from interp.transfer.outcomes import Together
from interp.transfer.table import POOLED, as_table_2, shown_cells, transfer_table, unmeasured
from interp.transfer.transfer import transfer
from interp.transfer.variants import Variant, addressed, controls, doses, factors, orders, parts

__all__ = [
    "POOLED",
    "AdaptedReport",
    "Graft",
    "MergeReport",
    "Recipe",
    "Together",
    "Variant",
    "addressed",
    "answers",
    "as_table_2",
    "controls",
    "doses",
    "factors",
    "grafted",
    "measured_graft",
    "merge",
    "orders",
    "parts",
    "save_adapted",
    "save_grafted",
    "shown_cells",
    "transfer",
    "transfer_table",
    "unmeasured",
]
