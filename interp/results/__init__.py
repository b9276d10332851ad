"""Results on disk and on one page: provenance, tables, figures, datasets, all or none."""

from interp.results.files import load_dataset, provenance, publishing, save_dataset
from interp.results.lock import locked
from interp.results.page import Account, Section, save_sections
from interp.results.store import Store

__all__ = [
    "Account",
    "Section",
    "Store",
    "load_dataset",
    "locked",
    "provenance",
    "publishing",
    "save_dataset",
    "save_sections",
]
