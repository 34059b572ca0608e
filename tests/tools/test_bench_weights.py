"""The measurement of swapped weights runs, on a model that takes no time."""

import contextlib
import json
import sys

import bench_weights
import pytest

from soar_mega import distributed


@pytest.fixture(autouse=True)
def no_world():
    yield
    distributed.stop_world()


def watched(way, seen):
    @contextlib.contextmanager
    def swapped(engine):
        kept = engine.weights[bench_weights.NAME].pieces
        with way(engine):
            shown = all(p.flatten().equal(kept[name].to(p.dtype)) for name, p in engine.parameters.items())
            yield
        left = not any(p.any() for p in engine.parameters.values())
        seen.append(shown and left)

    return swapped


def test_both_ways_do_it_and_are_measured_for_both_types(tmp_path, monkeypatch, capsys):
    seen = []
    for name, way in bench_weights.WAYS.items():
        monkeypatch.setitem(bench_weights.WAYS, name, watched(way, seen))
    out = tmp_path / "weights.json"
    monkeypatch.setattr(sys, "argv", ["bench_weights.py", "--smoke", "--out", str(out)])
    bench_weights.main()
    assert len(seen) == 2 * 2 * 3 and all(seen)
    said, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert said["types"].keys() == {"fp32", "bf16"} and said["processes"] == 1
    for one in said["types"].values():
        old, new = (one["median_seconds"][name] for name in ("parameter_by_parameter", "parts"))
        assert len(one["seconds"]["parts"]) == 2 and one["ratio"] == pytest.approx(old / new)
        assert f"ratio {one['ratio']:.2f}" in printed
