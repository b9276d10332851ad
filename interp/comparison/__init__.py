"""What training changed, straight from the checkpoints' files: energy, spectrum, sparsity, directions (2602.12395)."""

from hooks.stored.checkpoint import Checkpoint
from interp.comparison.adapted import Adapted, checkpoint_of
from interp.comparison.adapter import Adapter
from interp.comparison.adapter_table import adapter_by_address, adapter_table
from interp.comparison.addresses import by_address, every_address
from interp.comparison.aggregate import aggregate, layers, regions, trends, with_regions
from interp.comparison.alignment import align
from interp.comparison.controls import gaussian_spectrum
from interp.comparison.findings import energy_finding, headline, relative_finding, spectra_finding
from interp.comparison.singular_values import Spectrum, spectrum
from interp.comparison.subspace import Subspace, energy_outside, leading, principal_angles
from interp.comparison.table import compare, spectra

__all__ = [
    "Adapted",
    "Adapter",
    "Checkpoint",
    "Spectrum",
    "Subspace",
    "adapter_by_address",
    "adapter_table",
    "aggregate",
    "align",
    "by_address",
    "checkpoint_of",
    "compare",
    "energy_finding",
    "energy_outside",
    "every_address",
    "gaussian_spectrum",
    "headline",
    "layers",
    "leading",
    "principal_angles",
    "regions",
    "relative_finding",
    "spectra",
    "spectra_finding",
    "spectrum",
    "trends",
    "with_regions",
]
