"""The component map: every component's activation moved between IN and RL, one at a time (activation patching)."""

from interp.map.attribution import attribute, attribute_within, verify
from interp.map.component_map import DIRECTIONS, MAP_POINTS, component_map, patch
from interp.map.components import POINTS, Component, cached_names, components
from interp.map.noise import noise_cells
from interp.map.plots import plot_map, plot_strongest
from interp.map.report import map_section
from interp.map.summary import cell_table, now_and_before, strongest, summarise

__all__ = [
    "DIRECTIONS",
    "MAP_POINTS",
    "POINTS",
    "Component",
    "attribute",
    "attribute_within",
    "cached_names",
    "cell_table",
    "component_map",
    "components",
    "map_section",
    "noise_cells",
    "now_and_before",
    "patch",
    "plot_map",
    "plot_strongest",
    "strongest",
    "summarise",
    "verify",
]
