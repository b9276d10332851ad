"""The costs that the comparison promises for 7B, on checkpoints of 6.3 GB each (19 GB of disk, some minutes)."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interp.comparison.comparison_size import write


@pytest.mark.slow
def test_memory_speed_and_accuracy_at_the_size_of_7b(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 25e9:
        pytest.skip("needs 25 GB of disk")
    try:
        write(tmp_path)
        single = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.interp.comparison.comparison_size", str(tmp_path)]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, capture_output=True, text=True, env=single, cwd=root, check=True)
        found = json.loads(done.stdout)
    finally:
        for stage in tmp_path.iterdir():
            shutil.rmtree(stage)
    print(done.stdout)
    assert found["gigabytes each"] >= 6
    assert found["VmHWM, subspaces, one at once (GB)"] <= 1.5
    assert statistics.median(found["energy / reading, cold"]) >= 0.7
    assert min(found["times faster (wall, CPU)"]) >= 2
    assert found["largest relative error of the top 50"] <= 1e-4
