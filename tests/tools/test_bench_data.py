"""The measurement of feeding runs, on sets that take no time."""

import json
import sys

import bench_data


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
