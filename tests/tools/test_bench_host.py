"""The host's share of a step is measured in three forms, of which the third takes the way of CUDA tensors."""

import json
import sys

import bench_host
import torch

from soar_mega.kernels import adaln


def test_every_form_is_measured(tmp_path, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(bench_host, "nothing", lambda kernel, *args, **options: launched.append(kernel))
    threads, out = torch.get_num_threads(), tmp_path / "host.json"
    small = ["--layers", "2", "--dual", "1", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_host.py", *small, "--out", str(out)])
    launch = adaln.launch
    bench_host.main()
    torch.set_num_threads(threads)
    # per forward a launch for each adaLN (4 in a layer, 1 more in a dual one, 1 fewer in the last, 1 at the end)
    assert len(launched) >= 2 * 4 * (4 + 4 + 1) and adaln.launch is launch
    said = json.loads(out.read_text())
    assert said["forms"].keys() == {"plain", "fused", "launching"} and said["layers"] == 2
    for row in said["forms"].values():
        assert 0 < row["forward_ms"] < row["both_ms"]
        assert row["both_ratio"] > 0
    assert said["forms"]["plain"]["both_ratio"] == 1
    assert capsys.readouterr().out.startswith("2 layers, 1 of them dual")


def test_a_ratio_is_that_of_a_round():
    """The machine was three times as slow from the second round on, and no form is to blame."""
    plain, fused, both = [1.0, 3.0, 3.3], [1.5, 3.6, 3.3], [2.0, 4.5, 3.3]
    times = {"plain": {"forward": plain, "both": plain}, "fused": {"forward": fused, "both": both}}
    assert bench_host.summary(times)["fused"] == {
        "forward_ms": 1500.0,
        "both_ms": 2000.0,
        "forward_ratio": 1.2,
        "both_ratio": 1.5,
    }
