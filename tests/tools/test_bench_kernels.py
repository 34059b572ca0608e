"""The table of the kernels without a GPU: counted bytes, predicted times, JSON and picture."""

import json
import sys

import bench_kernels
import pytest


def test_predictions_without_a_gpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--only", "512 px N=6", "--out", str(out)])
    bench_kernels.main()
    rows = {(row["name"], row["form"]): row for row in json.loads(out.read_text())["rows"]}
    elements = 4 * 16 * 64 * 64
    states = rows["rollout_renoise 512 px N=6", "fused"]
    # four float32 sources in, six bfloat16 states out; the rest are tables
    assert states["bytes"] == pytest.approx(elements * (4 * 4 + 6 * 2), rel=1e-3)
    assert all(
        rows[name, "eager"]["bytes"] > 2 * row["bytes"]
        for (name, form), row in rows.items()
        if form == "fused"
    )
    assert not states["measured"] and "predicted" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
