"""Two hosts that are network namespaces, a Ray node on each; and how much faster two workers are than one process."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import frankenlens as fl
from interp.cluster import Cluster
from tests.interp.cluster.test_cluster import opened

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HOSTS = {"fl-one": "10.231.7.1", "fl-two": "10.231.7.2"}
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Only who has it may use the cluster."""
SCRIPT = """
from tests.interp.cluster.test_hosts import where
from tests.interp.cluster.test_cluster import opened
from interp.cluster import Cluster
found = Cluster("auto").run(opened, where, progress=False)
print("HOSTS", sorted(set(found)))
"""


def where(pair: fl.Pair) -> list[str]:
    """The address of who does each of some parts, which is the same work on every host."""
    import ray

    from hooks.shared import shared

    def step(i: int) -> str:
        time.sleep(1)
        return ray.util.get_node_ip_address()

    return [found for _, found in shared("steps", range(12), step)]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


def _inside(host: str, command: Sequence[str], **how: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(fl.__file__).parent)
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **TOKEN}
    return subprocess.run(
        ["ip", "netns", "exec", host, *command], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[None]:
    """One network between two namespaces, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here, and two hosts cannot be made")
    made: list[str] = []
    try:
        try:
            for host in HOSTS:
                _ip("netns", "add", host)
                made.append(host)
            _ip(
                "link",
                "add",
                "fl-a",
                "netns",
                "fl-one",
                "type",
                "veth",
                "peer",
                "name",
                "fl-b",
                "netns",
                "fl-two",
            )
            for (host, address), link in zip(HOSTS.items(), ("fl-a", "fl-b"), strict=True):
                _ip("-n", host, "addr", "add", f"{address}/24", "dev", link)
                _ip("-n", host, "link", "set", link, "up")
                _ip("-n", host, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield
    finally:
        for host in made:
            for pid in subprocess.run(
                ["ip", "netns", "pids", host], capture_output=True, text=True
            ).stdout.split():
                subprocess.run(["kill", "-9", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_two_hosts_share_one_work(two_hosts: None, tmp_path: Path) -> None:
    quiet = ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    first, second = HOSTS.values()
    # one temporary folder each, as two machines have; short, since sockets are in it
    folders = [Path("/tmp") / f"fl-ray-{os.getpid()}-{i}" for i in range(2)]
    try:
        head = [*RAY, "start", "--head", f"--node-ip-address={first}", "--port=6391", *quiet]
        done = _inside("fl-one", [*head, f"--temp-dir={folders[0]}"])
        assert done.returncode == 0, done.stderr + done.stdout
        join = [*RAY, "start", f"--address={first}:6391", f"--node-ip-address={second}", "--num-cpus=1"]
        done = _inside("fl-two", join)
        assert done.returncode == 0, done.stderr + done.stdout
        script = SCRIPT.replace('"auto"', f'"{first}:6391"')
        found = _inside("fl-one", [sys.executable, "-c", script])
        assert f"HOSTS ['{first}', '{second}']" in found.stdout, found.stdout + found.stderr
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_are_faster_where_two_cores_are_idle() -> None:
    """On a job of about a minute; starting is part of it."""
    if (os.cpu_count() or 1) < 2 or os.getloadavg()[0] > 0.5:
        pytest.skip(f"two cores are not idle here: load {os.getloadavg()[0]:.2f} of {os.cpu_count()}")
    torch.set_num_threads(1)
    begun = time.perf_counter()
    pair = opened()
    one = minute(pair)
    pair.close()
    alone = time.perf_counter() - begun
    begun = time.perf_counter()
    two = Cluster("local", workers=2).run(opened, minute, progress=False)
    together = time.perf_counter() - begun
    print(f"one process {alone:.1f} s, two workers {together:.1f} s", file=sys.__stdout__)
    assert one.identical(two)
    assert alone >= 60 and alone / together >= 1.7


def minute(pair: fl.Pair):
    """A component map that takes about a minute on one core."""
    examples = [one for task in fl.tasks.REASONING for one in fl.tasks.sample(task, 40, seed=0, split="map")]
    decisions = fl.find_decisions(pair, examples, "first", max_new_tokens=40, batch_size=8)
    return fl.component_map(pair, decisions, batch_size=8, progress=False)
