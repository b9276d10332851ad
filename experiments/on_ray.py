"""Which commands several processes can do together, and where: `--ray` and `--gpus-per-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError
from hooks.extras import require_installed

ON_RAY = ("knockout", "lens", "lockstep", "map", "metrics", "planted", "transfer")
"""Commands whose parts are shared (`experiments.frame.Command.on_ray`)."""
OF_CLUSTER = ("ray", "gpus_per_model")
"""Settings that no number depends on: they are no part of a result's provenance."""


def require_on_ray(config: Any, can: bool) -> None:
    """Refuse to do in one process what was asked of many, and GPUs that nothing is put on.

    Args:
        config: the settings.
        can: whether the command's parts can be shared.

    Raises:
        FrankenlensError: names the commands that can, or the options that do not go together; Ray is not installed.
    """
    if getattr(config, "ray", None) is None:
        return
    if not can:
        raise FrankenlensError(
            f"--ray is of {', '.join(ON_RAY)}; the parts of this command cannot be shared: leave --ray out."
        )
    require_installed("--ray", "ray")
    gpus, devices = config.gpus_per_model, config.device_map
    if gpus < 0:
        raise FrankenlensError(f"--gpus-per-model is {gpus}; give 0 for none, or how many a pair takes.")
    if gpus and devices is None:
        raise FrankenlensError(
            f"--gpus-per-model {gpus} without --device-map leaves the models on the CPU: give --device-map "
            f"{'cuda' if gpus == 1 else 'auto'} as well."
        )
    if not gpus and devices not in (None, "cpu"):
        raise FrankenlensError(
            f"--device-map {devices} with --ray needs --gpus-per-model: how many GPUs each pair takes."
        )


def cluster_for(config: Any) -> Any:
    """The `interp.cluster.Cluster` that a command is run on; None where it is run here."""
    if getattr(config, "ray", None) is None:
        return None
    from interp.cluster import Cluster

    return Cluster(config.ray, config.gpus_per_model, memory=_bytes_of(config))


def _bytes_of(config: Any) -> int:
    """What the models' files take, which is about what the models do; 0 where they are not here."""
    folders = [Path(one) for one in (config.in_, config.rl, config.base) if one is not None]
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
