"""Results on disk and on one page: provenance, tables, figures, datasets, all or none."""

from interp.results.files import load_dataset, provenance, publishing, save_dataset
from interp.results.lock import locked
from interp.results.page import Account, Section, save_sections, told
from interp.results.picture import Picture, nothing
from interp.results.store import Store

__all__ = [
    "Account",
    "Picture",
    "Section",
    "Store",
    "load_dataset",
    "locked",
    "nothing",
    "provenance",
    "publishing",
    "save_dataset",
    "save_sections",
    "told",
]
