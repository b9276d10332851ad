"""The README's Python runs as it stands, block after block, through the front door alone."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    assert re.findall(r"^\s*(?:from|import) .*", "".join(blocks), re.MULTILINE) == [
        "import frankenlens as fl"
    ]
    names: dict = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"  # nnsight reads the source of a trace
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), names)
    assert names["result"].value.shape == (1, 3, 4)
    assert np.isfinite(names["result"].value.values[0, 0]).all()
    assert (tmp_path / "out" / "sweep").is_dir()
