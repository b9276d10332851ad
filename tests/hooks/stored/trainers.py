"""Two processes that save a model as trainers do: run as `python trainers.py RANK PORT MODEL OUT`.

MODEL is a folder; OUT gets `fsdp2/`, `fsdp1/` and `meshes/` (a file a process, as verl, EasyR1 and SkyRL write them),
and `dcp/` (`torch.distributed.checkpoint`, with an optimizer beside the model).
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def save(rank: int, port: str, model: str, out: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedStateDictConfig,
        StateDictType,
        fully_shard,
    )
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from transformers import AutoModelForImageTextToText

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def opened() -> Any:
        return AutoModelForImageTextToText.from_pretrained(model, local_files_only=True)

    def keep(state: Any, name: str) -> None:
        (out / name).mkdir(parents=True, exist_ok=True)
        torch.save(state, out / name / f"model_world_size_2_rank_{rank}.pt")

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    sharded = opened()
    blocks = sharded.model.language_model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    keep(sharded.state_dict(), "fsdp2")

    moments = {"state": {"exp_avg": torch.ones(3)}}
    dcp.save({"model": sharded.state_dict(), "optim": moments, "step": 7}, checkpoint_id=str(out / "dcp"))

    wrapped = FullyShardedDataParallel(opened(), device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(
        wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        keep(wrapped.state_dict(), "fsdp1")

    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ddp", "fsdp"))
    columns = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ddp", "tp"))
    placed = {}
    for i, (key, tensor) in enumerate(opened().state_dict().items()):
        if i % 3 == 0:
            placed[key] = distribute_tensor(tensor, hybrid, [Replicate(), Shard(0)])
        elif i % 3 == 1 and tensor.ndim == 2:
            placed[key] = distribute_tensor(tensor, columns, [Replicate(), Shard(1)])
        else:
            placed[key] = tensor
    keep({f"module._orig_mod.{key}": tensor for key, tensor in placed.items()}, "meshes")
    dist.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    save(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always let the interpreter end
