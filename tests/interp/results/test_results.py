import json

import numpy as np
import pytest
import xarray as xr

from hooks.errors import FrankenlensError
from interp.results.files import load_dataset, provenance, publishing, save_dataset
from tests.interp.map.synthetic import synthetic_result


@pytest.fixture(scope="module")
def summary():
    return synthetic_result(layers=3, heads=2, examples=12)


def test_a_dataset_comes_back_as_it_was(summary, tmp_path):
    with publishing(tmp_path / "new" / "out") as staging:
        save_dataset(summary, staging / "map.nc")
    xr.testing.assert_identical(load_dataset(tmp_path / "new" / "out" / "map.nc"), summary)
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["map.nc"]


def test_a_failure_publishes_nothing_and_leaves_what_was_there(tmp_path):
    (tmp_path / "map.csv").write_text("old")

    def fail_halfway():
        with publishing(tmp_path) as staging:
            (staging / "map.csv").write_text("new")
            (staging / "map.nc").write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"map.csv": "old"}


def test_files_appear_together_and_replace_older_ones(tmp_path):
    (tmp_path / "map.csv").write_text("old")
    with publishing(tmp_path) as staging:
        (staging / "map.csv").write_text("new")
        assert (tmp_path / "map.csv").read_text() == "old"
    assert (tmp_path / "map.csv").read_text() == "new"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FrankenlensError, match="Choose another --out"), publishing(tmp_path / "file" / "out"):
        pass


def test_loading_what_is_no_result(tmp_path):
    with pytest.raises(FrankenlensError, match="no such file"):
        load_dataset(tmp_path / "map.nc")
    (tmp_path / "map.nc").write_text("nothing of the kind")
    with pytest.raises(FrankenlensError, match="not a NetCDF"):
        load_dataset(tmp_path / "map.nc")
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(
        FrankenlensError, match=r"no provenance.*provenance\(\.\.\.\)\), both of interp.results"
    ):
        load_dataset(tmp_path / "other.nc")


def test_a_dataset_saved_from_python_is_a_result(tmp_path):
    own, made = xr.Dataset({"x": 1}), provenance({}, {"seed": 3}, {"examples": 5}, {})
    save_dataset(own, tmp_path / "own.nc", made)
    assert not own.attrs
    assert json.loads(load_dataset(tmp_path / "own.nc").attrs["provenance"]) == made


def test_provenance_is_json_and_names_the_versions():
    found = provenance(
        {"in": {"weights_sha256": "ab"}}, {"seed": 3, "out": np.float32(1)}, {"prompts": 5}, {"no image": 2}
    )
    assert json.loads(json.dumps(found)) == found
    assert {"frankenlens", "torch", "transformers", "python"} <= set(found["versions"])
    assert found["settings"]["seed"] == 3
    assert found["checkpoints"]["in"]["weights_sha256"] == "ab"
