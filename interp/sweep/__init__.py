"""The sweep engine: many interventions on many prompts, never computing what an intervention cannot change."""

from interp.sweep.engine import sweep
from interp.sweep.intervention import Intervention
from interp.sweep.maps import head_map, residual_map
from interp.sweep.places import Where

__all__ = ["Intervention", "Where", "head_map", "residual_map", "sweep"]
