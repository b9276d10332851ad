"""The sweep engine: many interventions on many prompts, never computing what an intervention cannot change."""

from interp.sweep.engine import sweep
from interp.sweep.intervention import Intervention, Where
from interp.sweep.maps import head_map, residual_map

__all__ = ["Intervention", "Where", "head_map", "residual_map", "sweep"]
