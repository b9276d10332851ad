"""The sweep engine: many interventions on many prompts, never computing what an intervention cannot change."""

from interp.sweep.engine import sweep
from interp.sweep.intervention import Intervention, Where

__all__ = ["Intervention", "Where", "sweep"]
