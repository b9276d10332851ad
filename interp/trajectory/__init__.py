"""One RL run over its steps: what carries its decision when, where its update lies, which heads stay."""

from interp.trajectory.energy import update_energy
from interp.trajectory.heads import head_survival
from interp.trajectory.over_steps import over_steps
from interp.trajectory.table import step_table

__all__ = ["head_survival", "over_steps", "step_table", "update_energy"]
