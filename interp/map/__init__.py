"""The component map: every component's activation moved between IN and RL, one at a time (activation patching)."""

from interp.map.attribution import attribute, attribute_within, verify
from interp.map.component_map import DIRECTIONS, MAP_POINTS, component_map, patch
from interp.map.components import POINTS, Component, cached_names, components
from interp.map.plots import plot_map, plot_strongest
from interp.map.summary import now_and_before, strongest, summarise

__all__ = [
    "DIRECTIONS",
    "MAP_POINTS",
    "POINTS",
    "Component",
    "attribute",
    "attribute_within",
    "cached_names",
    "component_map",
    "components",
    "now_and_before",
    "patch",
    "plot_map",
    "plot_strongest",
    "strongest",
    "summarise",
    "verify",
]
