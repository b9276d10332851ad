"""Which components' paths are worth following: the strongest of a map, or of its estimate by gradients."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hooks.errors import FrankenlensError


def strongest_senders(effects: xr.Dataset, k: int, role: str = "all") -> list[str]:
    """Heads and MLPs with the largest |mean effect| of a direction, in the order of the layers.

    Args:
        effects: a component map (`interp.map.component_map`), or `interp.map.attribution.attribute`'s estimate of one.
        k: how many.
        role: of the tokens at which they act.

    Raises:
        FrankenlensError: the map has no such role, or neither heads nor MLPs.
    """
    roles = effects["role"].to_numpy()
    if role not in roles:
        raise FrankenlensError(f"the map has no role {role!r}, only {', '.join(roles)}.")
    some = effects.isel(component=np.isin(effects["point"].to_numpy(), ["head", "mlp_out"]))
    if not some.sizes["component"]:
        raise FrankenlensError("the map has neither heads nor MLPs; make it with --points head mlp_out.")
    size = np.abs(some["effect"].sel(role=role).mean("example")).max("direction")
    best = size.fillna(0).argsort().to_numpy()[::-1][:k]
    return some["component"].to_numpy()[np.sort(best)].tolist()
