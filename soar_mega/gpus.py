"""What GPUs can do at most."""

import re

# TFLOP/s without sparsity, from NVIDIA's data sheets; names are words of torch.cuda.get_device_name, special ones first
PEAKS: dict[tuple[str, ...], dict[str, float]] = {
    ("A100",): {"fp32": 19.5, "bf16": 312},
    ("H100", "PCIe"): {"fp32": 51, "bf16": 756, "fp8": 1513},
    ("H100", "NVL"): {"fp32": 60, "bf16": 835, "fp8": 1671},
    ("H100",): {"fp32": 67, "bf16": 989, "fp8": 1979},
    ("H200", "NVL"): {"fp32": 60, "bf16": 835, "fp8": 1671},
    ("H200",): {"fp32": 67, "bf16": 989, "fp8": 1979},
    ("GH200",): {"fp32": 67, "bf16": 989, "fp8": 1979},
    ("B200",): {"fp32": 75, "bf16": 2250, "fp8": 4500},
    ("GB200",): {"fp32": 80, "bf16": 2500, "fp8": 5000},
    ("B300",): {"fp32": 75, "bf16": 2250, "fp8": 4500},
    ("GB300",): {"fp32": 80, "bf16": 2500, "fp8": 5000},
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense TFLOP/s of a GPU by its name in torch, at fp32, bf16 or fp8; None where it is unknown.

    A part of a GPU (MIG) is unknown: how large it is, is not in its name alone.
    """
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    known = (peaks for name, peaks in PEAKS.items() if words.issuperset(name))
    return next(known, {}).get(precision)


# GiB that torch finds on GPUs; of those that nobody here has asked, the sold GB less a hundredth
MEMORY: dict[str, float] = {
    "a100-40": 39.4,
    "a100-80": 79.1,
    "h100": 79.1,
    "h200": 139.8,
    "b200": 178.0,
    "gb300": 268.0,
}
HOPPER = ("h100", "h200")
OUTSIDE = 1.5  # GiB that CUDA, NCCL and libraries take beside torch's allocator
SPOILT = 0.05  # share that the allocator loses to pieces of memory too small for what is asked


def usable_memory(gpu: str) -> int:
    """Bytes for tensors on a GPU of MEMORY."""
    return int((MEMORY[gpu] - OUTSIDE) * (1 - SPOILT) * 2**30)
