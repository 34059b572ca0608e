"""The measurement of checkpoints runs, on a model that takes no time."""

import json
import sys

import bench_checkpoint
import pytest

from soar_mega import distributed


@pytest.fixture(autouse=True)
def no_world():
    yield
    distributed.stop_world()


def test_both_modes_are_measured_from_the_second_save_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "checkpoint.json"
    small = ["--layers", "2", "--heads", "1", "--saves", "3", "--steps", "2"]
    monkeypatch.setattr(
        sys, "argv", ["bench_checkpoint.py", *small, "--out", str(out), "--folder", str(tmp_path / "runs")]
    )
    bench_checkpoint.main()
    said = json.loads(out.read_text())
    for mode in said["modes"].values():
        assert len(mode["blocked_seconds"]) == 2 and min(mode["blocked_seconds"]) > 0.0
        assert mode["megabytes"] > 1.0
    sync, background = (said["modes"][name]["median_blocked_seconds"] for name in ("sync", "async"))
    assert said["ratio"] == pytest.approx(background / sync)
    assert f"asynchronous / synchronous: {said['ratio']:.3f}" in capsys.readouterr().out
    assert not list((tmp_path / "runs").iterdir())
