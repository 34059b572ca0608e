"""What a machine can do: every constant of the planner's model, and where it comes from."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """A GPU (or a process on a CPU), its links, and the price of asking it for work.

    Attributes:
        memory: key of soar_mega.gpus.MEMORY; empty for a process on a CPU.
        gemm: FLOP/s of a matrix product that fills it.
        tile: (rows, columns) of the output that one multiprocessor works on at a time.
        units: multiprocessors.
        attention: FLOP/s of forward and backward (counted as soar_mega.models.common.flops does) at head size 64.
        attention_128: how much faster it is at head size 128.
        copy: bytes/s that elementwise kernels read and write.
        optimizer: bytes moved per parameter by clipping and AdamW.
        link: bytes/s that a GPU sends inside a node, and network: to another one; both reached, not promised.
        link_latency, network_latency: seconds of a message, and of each step of a collective: log2 of its ranks.
        layer_host: seconds of Python for a layer's forward and for its backward, hidden where the GPU takes longer.
        layer_host_graphs: the same with train.cuda_graphs=layers.
    """

    memory: str
    gemm: float
    tile: tuple[int, int]
    units: int
    attention: tuple[float, float]
    attention_128: float
    copy: float
    optimizer: float
    link: float
    network: float
    link_latency: float
    network_latency: float
    layer_host: tuple[float, float]
    layer_host_graphs: tuple[float, float]


# Measured on one H100 (benchmarks/results/2026-11-26-h100-first-run.json and the run's kernel times):
#   gemm: 675 to 763 TFLOP/s for 9,424 tokens at hidden 1536, whose last wave of tiles is not full: 790 where it is.
#   attention: .12 s forward and .22 s backward of a step of 16 samples; at head size 128 419 against 308 TFLOP/s.
#   copy: 3.0 TB/s, of which the kernels of a step together reach about three quarters.
#   optimizer: .067 s for 2.24 G parameters, in several passes.
#   layer_host: 4 and 8 points per forward take .23 s per micro-batch of 24 layers, forward, backward and its answers.
# Not measured here: link (NVLink 4, 450 GB/s each way, of which NCCL is known to reach about four fifths), network
# (400 Gbit/s a GPU, likewise), latencies (orders of magnitude), layer_host_graphs (a launch and copies).
H100 = Hardware(
    memory="h100",
    gemm=790e12,
    tile=(128, 256),
    units=132,
    attention=(346e12, 293e12),
    attention_128=419 / 308,
    copy=0.75 * 3.0e12,
    optimizer=90,
    link=360e9,
    network=40e9,
    link_latency=10e-6,
    network_latency=20e-6,
    layer_host=(1.9e-3, 7.1e-3),
    layer_host_graphs=(30e-6, 60e-6),
)
# Not measured: an H100's numbers times the ratio of the data sheets' (bf16 peak, memory bandwidth, NVLink, network
# cards). The sheets do not say how many multiprocessors a GB300 has: those of B200 stand here.
H100_TFLOPS, H100_TERABYTES = 989, 3.35


def by_data_sheet(memory: str, tflops: float, terabytes: float, **others: Any) -> Hardware:
    """A GPU of which the sheet says dense bf16 TFLOP/s and TB/s of its memory; `others` are as they will be."""
    return replace(
        H100,
        memory=memory,
        gemm=H100.gemm * tflops / H100_TFLOPS,
        attention=(H100.attention[0] * tflops / H100_TFLOPS, H100.attention[1] * tflops / H100_TFLOPS),
        copy=H100.copy * terabytes / H100_TERABYTES,
        **others,
    )


A100: dict[str, Any] = {
    "tile": (128, 128),
    "units": 108,
    "link": H100.link * 300 / 450,
    "network": H100.network / 2,
}
HARDWARE: dict[str, Hardware] = {
    "h100": H100,
    "h200": by_data_sheet("h200", 989, 4.8),
    "b200": by_data_sheet("b200", 2250, 8.0, units=148, link=H100.link * 2),
    "gb300": by_data_sheet("gb300", 2500, 8.0, units=148, link=H100.link * 2, network=H100.network * 2),
    "a100-80": by_data_sheet("a100-80", 312, 2.0, **A100),
    "a100-40": by_data_sheet("a100-40", 312, 1.555, **A100),
}
