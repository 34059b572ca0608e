"""The measurement of feeding runs, on sets that take no time."""

import json
import sys

import bench_data
import pytest


def test_opening_is_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    out = tmp_path / "index.json"
    arguments = ["index", "--smoke", "--repetitions", "1", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", *arguments])
    bench_data.main()
    said = json.loads(out.read_text())
    assert said["samples"] == 4000 and said["index_bytes"] > 4000 * bench_data.RECORD.itemsize
    (run,) = said["processes"]
    assert run["open"]["seconds"] > 0 and "more_own_mb" in run["first_batch"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_feeding_is_measured_both_ways(tmp_path, monkeypatch, capsys):
    out = tmp_path / "feed.json"
    arguments = ["feed", "--smoke", "--repetitions", "1", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", *arguments])
    bench_data.main()
    said = json.loads(out.read_text())
    for row in said["workers"].values():
        speed = row["samples_per_second"]
        assert row["ratio"] == pytest.approx(speed["loader"] / speed["webdataset"])
        assert min(row["cpu_ms_per_sample"].values()) >= 0
        assert all(0 <= share < 1 for share in row["wait_share"].values())
    assert said["workers"].keys() == {"0", "1", "2"} and list(tmp_path.iterdir()) == [out]
