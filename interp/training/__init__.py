"""Training as it goes on: what each component's gradient and update are, step by step, in one's own trainer."""

from interp.training.component_log import COPY, ComponentLog

__all__ = ["COPY", "ComponentLog"]
