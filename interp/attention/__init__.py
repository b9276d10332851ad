"""Where tokens look: the attention shift from IN to RL (2602.12395, section 2), and attention drawn on the image."""

from interp.attention.plots import plot_head_shift, plot_shift
from interp.attention.shift import attention_mass, attention_shift, shift, shifts
from interp.attention.view import AttentionView, attention_view

__all__ = [
    "AttentionView",
    "attention_mass",
    "attention_shift",
    "attention_view",
    "plot_head_shift",
    "plot_shift",
    "shift",
    "shifts",
]
