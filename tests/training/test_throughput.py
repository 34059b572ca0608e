"""TFLOP/s and MFU: of each step's own bucket, against the peak of the GPU that is there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soar_mega.config import LoggingConfig, ModelConfig, Recipe, TrainConfig
from soar_mega.data.batch import Batch
from soar_mega.gpus import PEAKS, peak_tflops
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.stages import SoarConfig
from soar_mega.training.throughput import Throughput, least_seconds, peaks

MEDIUM = PRESETS["sd35_medium"]


def batch(height: int, width: int) -> Batch:
    return Batch(
        seed=0,
        position=torch.arange(2),
        valid=torch.ones(2, dtype=torch.bool),
        latent_shape=(16, height, width),
        text_length=154,
    )


def throughput(monkeypatch: pytest.MonkeyPatch, gpu: str | None, world: int, **logging: Any) -> Throughput:
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    recipe = Recipe(
        model=ModelConfig(dtype="bf16"),
        train=TrainConfig(global_batch_size=16),
        stage=SoarConfig(num_auxiliary_points=6),
        logging=LoggingConfig(**logging),
    )
    return Throughput(recipe, MEDIUM)


def test_what_was_measured_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """7.24 samples per second of 23 forwards of 2.138 TFLOP: 356 TFLOP/s, 36 % of 989."""
    counted = throughput(monkeypatch, "NVIDIA H100 80GB HBM3", 1)
    counted.add(batch(64, 64), 16 / 7.24)
    found = counted.take()
    assert found["tflops-per-gpu"] == pytest.approx(356, rel=2e-3)
    assert found["mfu"] == pytest.approx(0.36, rel=2e-3)


def test_buckets_are_counted_by_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = throughput(monkeypatch, "NVIDIA H200", 4)
    by_bucket = []
    for size in [(64, 64), (48, 80)]:
        counted.add(batch(*size), 2.0)
        by_bucket.append(counted.take()["tflops-per-gpu"])
    assert by_bucket[0] > by_bucket[1]
    for size in [(64, 64), (48, 80), (48, 80)]:
        counted.add(batch(*size), 2.0)
    assert counted.take()["tflops-per-gpu"] == pytest.approx((by_bucket[0] + 2 * by_bucket[1]) / 3)


def test_mfu_is_left_out_where_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, settings, names in [
        (None, {}, {"tflops-per-process"}),
        (None, {"peak_tflops": 1.0}, {"tflops-per-process"}),
        ("NVIDIA GeForce RTX 4090", {}, {"tflops-per-gpu"}),
        ("NVIDIA GeForce RTX 4090", {"peak_tflops": 165.0}, {"tflops-per-gpu", "mfu"}),
    ]:
        counted = throughput(monkeypatch, gpu, 1, **settings)
        counted.add(batch(64, 64), 1.0)
        found = counted.take()
        assert set(found) == names
        if "mfu" in names:
            assert found["mfu"] == pytest.approx(found["tflops-per-gpu"] / 165)


def test_each_precision_has_its_peak() -> None:
    work: Any = SimpleNamespace(token_linears=3e12, total=5e12)
    assert least_seconds(work, 3.0, 2.0) == 2.0
    assert peaks(Recipe(stage=SoarConfig(), model=ModelConfig(dtype="bf16")), "NVIDIA H100 PCIe") == (
        756,
        756,
    )
    assert peaks(Recipe(stage=SoarConfig(), model=ModelConfig(dtype="fp32")), "NVIDIA H100 PCIe") == (51, 51)
    fp8 = Recipe(stage=SoarConfig(), model=ModelConfig(dtype="bf16", fp8="hybrid"))
    assert peaks(fp8, "NVIDIA H100 80GB HBM3") == (1979, 989)
    assert peaks(fp8, "NVIDIA A100-SXM4-80GB") is None


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_of_devices(name: str, bf16: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    if bf16 == 312 or bf16 is None:
        assert peak_tflops(name, "fp8") is None
    else:
        assert peak_tflops(name, "fp8") == pytest.approx(2 * bf16, rel=2e-3)


def test_every_gpu_is_found_by_its_own_name() -> None:
    for name, known in PEAKS.items():
        assert {precision: peak_tflops(" ".join(name), precision) for precision in known} == known
