"""Lenses: what each layer would say, what each component adds to a logit, and how IN and RL differ in both."""

from interp.lens.attribution import direct_logit_attribution, grouped
from interp.lens.compare import answer_layers, compare_lenses
from interp.lens.head import OutputHead
from interp.lens.image_grid import ImageGrid, image_grids
from interp.lens.logit_lens import logit_lens
from interp.lens.tuned_lens import TunedLens, train_tuned_lens

__all__ = [
    "ImageGrid",
    "OutputHead",
    "TunedLens",
    "answer_layers",
    "compare_lenses",
    "direct_logit_attribution",
    "grouped",
    "image_grids",
    "logit_lens",
    "train_tuned_lens",
]
