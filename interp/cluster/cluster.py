"""A run on Ray: workers started, watched and replaced, one bar, and one result."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from hooks.errors import FrankenlensError, one_line, shown
from hooks.extras import require_installed
from hooks.memory import limit
from interp.cluster.coordinator import MOST_LOST, Coordinator
from interp.cluster.worker import Place, Worker, plain_error

Models = TypeVar("Models")
Result = TypeVar("Result")
LOCAL = "local"
"""In place of an address: this machine alone, for the length of a run."""
_SAME = (
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "TOKENIZERS_",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
)
_VERSIONS = ("frankenlens", "torch", "transformers", "numpy")
_OFTEN = 0.2
"""Seconds between two looks at how far a run is."""
_LONG = 10
"""Seconds that the coordinator has for letting go of folders, and a cluster for answering."""


class WorkerLost(FrankenlensError):
    """Workers end again and again; what they had finished is kept where the run keeps anything."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that works are done on.

    Every worker opens models of its own and does the whole work, but for its long parts (batches of prompts, shards of
    interventions, variants, pairs), each of which one worker does for all (`hooks.shared`). A worker that ends before
    its time is replaced, and what it had finished is kept; the part that it was at is done again.

    Attributes:
        address: "auto" (the cluster that this machine belongs to), host:port of one, or "local" (this machine alone,
            for the length of a run; no cluster is left behind).
        gpus_per_model: GPUs of every worker, 0 for none. A worker sees its own alone, so that the pair is opened with
            device_map "cuda", or "auto" where it is spread over several.
        workers: at most; None: as many as there are GPUs for, or, without any, cores (a worker has as many threads as
            this process, since numbers may depend on how many).
        memory: bytes of main memory that the models of a worker without GPUs take; 0: not known.

    Example:
        >>> cluster = fl.Cluster("10.0.0.1:6379", gpus_per_model=1)  # doctest: +SKIP
        >>> opened = partial(fl.Pair.from_pretrained, "IN", "RL", device_map="cuda")  # doctest: +SKIP
        >>> cluster.run(opened, lambda pair: fl.sweep(pair.rl, *asked(pair)))  # doctest: +SKIP
    """

    address: str = "auto"
    gpus_per_model: int = 0
    workers: int | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        least = {"workers": (self.workers, 1), "gpus_per_model": (self.gpus_per_model, 0)}
        for name, (given, lowest) in (least | {"memory": (self.memory, 0)}).items():
            if given is not None and given < lowest:  # nobody would ever do a part
                raise FrankenlensError(f"{name}={given}: give at least {lowest}")

    def run(
        self, open_models: Callable[[], Models], work: Callable[[Models], Result], progress: bool = True
    ) -> Result:
        """What the work returns of the models; the numbers are those of one process.

        Args:
            open_models: opens them, in every worker: a function that can be sent, such as a partial of
                `Pair.from_pretrained` with paths that all machines have.
            work: does it, in every worker; it must do the same in each, and return what can be sent.
            progress: show one bar for all workers.

        Raises:
            FrankenlensError: no cluster, too few GPUs in it, or models that are open already among what is to be sent;
                and whatever opening and the work raise.
            WorkerLost: a part has ended several workers, or they end outside of any.
        """
        with _connected(self.address) as ray:
            size = self._sizes(ray)
            sent = _sent(open_models), _sent(work)
            return _Run(ray, self, size, sent, progress).result()

    def _sizes(self, ray: Any) -> list[int]:
        """How many workers there is room for, machine by machine.

        Raises:
            FrankenlensError: for none.
        """
        names = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
        needs = {names[name]: n for name, n in self.each.items() if n}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        found = [min(int(node.get(name, 0) // n) for name, n in needs.items()) for node in nodes]
        if any(found):
            return found
        words = {
            "GPU": "{:g} GPUs (--gpus-per-model)",
            "CPU": "{:g} cores (as many as PyTorch has threads here: OMP_NUM_THREADS)",
            "memory": "{:,.0f} bytes of memory for the models",
        }
        wanted = ", ".join(words[name].format(n) for name, n in needs.items())
        have = "; ".join(", ".join(f"{node.get(name, 0):,g} {name}" for name in needs) for node in nodes)
        raise FrankenlensError(f"no machine of the cluster has {wanted}; they have {have}.")

    @property
    def each(self) -> dict[str, Any]:
        """What every worker takes, as Ray counts it."""
        if self.gpus_per_model:
            return {"num_cpus": 1, "num_gpus": self.gpus_per_model}
        return {"num_cpus": torch.get_num_threads(), "memory": self.memory}


class _Run:
    """One work on a cluster, from its first worker to its result."""

    def __init__(
        self, ray: Any, cluster: Cluster, sizes: Sequence[int], sent: tuple[Any, Any], progress: bool
    ) -> None:
        self._ray, self._cluster, self._sent = ray, cluster, sent
        self._size = sum(sizes) if cluster.workers is None else min(sum(sizes), cluster.workers)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._coordinator = ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=here).remote()
        versions = {name: version(name) for name in _VERSIONS}
        together = min(self._size, max(sizes))
        self._place = Place(os.getcwd(), torch.get_num_threads(), versions, together)
        self._bar = tqdm(desc="ray", unit="part", disable=not progress)
        self._actors: dict[Any, tuple[str, Any]] = {}  # of what a worker will return: its name, and itself
        self._idle_losses, self._finished = 0, -1

    def result(self) -> Any:
        """What the first worker to finish has; all have the same."""
        try:
            for _ in range(self._size):
                self._start()
            while True:
                ready, _ = self._ray.wait(list(self._actors), timeout=_OFTEN)
                self._show()
                for one in ready:
                    done, found = self._taken(one)
                    if done:
                        self._show()
                        return found
        except self._ray.exceptions.ActorDiedError as error:
            raise WorkerLost(f"the coordinator of the run has ended: {one_line(error)}") from error
        finally:
            self._bar.close()
            with suppress(Exception):
                self._ray.get(self._coordinator.close.remote(), timeout=_LONG)
            for actor in [*(actor for _, actor in self._actors.values()), self._coordinator]:
                with suppress(Exception):
                    self._ray.kill(actor)

    def _start(self) -> None:
        name = uuid.uuid4().hex[:8]
        variables = {name: value for name, value in os.environ.items() if name.startswith(_SAME)}
        options = {**self._cluster.each, "runtime_env": {"env_vars": variables}}
        actor = self._ray.remote(Worker).options(**options).remote(name, self._coordinator, self._place)
        self._actors[actor.run.remote(*self._sent, limit())] = name, actor

    def _taken(self, one: Any) -> tuple[bool, Any]:
        """Whether a worker has finished, and with what; one that was lost is replaced."""
        name, _ = self._actors.pop(one)
        try:
            return True, self._ray.cloudpickle.loads(self._ray.get(one))
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError) as error:
            self._replace(name, error)
            return False, None
        except self._ray.exceptions.RayTaskError as error:
            raise plain_error(error) from error

    def _replace(self, name: str, error: Exception) -> None:
        had_part, too_often = self._ray.get(self._coordinator.lost.remote(name))
        if too_often:
            raise WorkerLost(
                f"{MOST_LOST} workers have ended at the same part, {too_often}; the last was {_who(error)}. Where a "
                "machine has no memory left its workers are killed: give less of --batch-size or --max-memory."
            )
        done = self._ray.get(self._coordinator.progress.remote()).done
        self._idle_losses = 0 if had_part or done > self._finished else self._idle_losses + 1
        self._finished = done
        if self._idle_losses >= MOST_LOST:
            raise WorkerLost(f"workers end before they take any part: {one_line(error)}")
        tqdm.write(f"a worker has ended, and another takes its place: {_who(error)}", file=sys.stderr)
        self._start()

    def _show(self) -> None:
        now = self._ray.get(self._coordinator.progress.remote())
        for line in now.told:
            tqdm.write(line, file=sys.stderr)
        self._bar.set_description(now.what, refresh=False)
        self._bar.total, self._bar.n = now.total, now.done
        self._bar.refresh()


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster for as long; a connection that there is already is used, and left as it is.

    Raises:
        FrankenlensError: there is no such cluster.
    """
    require_installed("a run on Ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        yield ray
        return
    if "://" in address:
        raise FrankenlensError(
            f"{shown(address)} is an address of Ray's client; start the run on a machine of the cluster: --ray auto."
        )
    _require_reachable(address)
    quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            ray.init(_node_ip_address="127.0.0.1", **quiet)  # nobody else reaches it
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Somebody answers at host:port; Ray would try for minutes.

    Raises:
        FrankenlensError: nobody does.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_LONG).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> FrankenlensError:
    return FrankenlensError(
        f"there is no Ray cluster at {shown(address)}: {one_line(error)}. Start one (ray start --head) and join it, "
        f"or give --ray {LOCAL} for this machine alone."
    )


def _who(error: Exception) -> str:
    """Which worker Ray says has ended."""
    found = re.search(r"pid: (\d+).*?ip: (\S+)", str(error), re.DOTALL)
    return f"process {found[1]} on {found[2]}" if found else one_line(error)


def _sent(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, once it is seen that it can be sent.

    Raises:
        FrankenlensError: it cannot.
    """
    from ray import cloudpickle

    try:
        cloudpickle.dumps(function)
    except FrankenlensError:
        raise
    except Exception as error:
        raise FrankenlensError(f"{function!r} cannot be sent to a worker: {one_line(error)}") from error
    return function
