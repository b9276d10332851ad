"""Steering: what RL added to the activations at a site, added to a model while it generates."""

from interp.steering.both import pair_directions, steer_both
from interp.steering.directions import (
    Direction,
    differences,
    mean_difference,
    principal_directions,
    random_directions,
)
from interp.steering.dose import dose_response, dose_table
from interp.steering.steer import Steering, steer, steer_hooks

__all__ = [
    "Direction",
    "Steering",
    "differences",
    "dose_response",
    "dose_table",
    "mean_difference",
    "pair_directions",
    "principal_directions",
    "random_directions",
    "steer",
    "steer_both",
    "steer_hooks",
]
