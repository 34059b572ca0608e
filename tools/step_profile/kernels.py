"""Which kernels the GPU spends a step in, by name and by kind. Those within a CUDA graph are seen as all others."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Json = dict[str, Any]

TOP = 30
REST = "rest"

# The first whose pattern is found in a kernel's name. Names are those of torch 2.11, cuDNN, cuBLAS, flash-attn,
# Transformer Engine and NCCL; nvjet's first letters are the types of its operands, t for bf16, q and r for FP8.
KINDS = {
    "collectives": r"nccl",
    "attention, forward": r"flash_fwd|FlashAttnFwd|sdpa\w*fprop|fmha_cutlassF",
    "attention, backward": r"flash_bwd|FlashAttnBwd|sdpa\w*bprop|fmha_cutlassB|compute_dot_do_o|convert_dq",
    "adaLN and QK norm, forward": r"(adaln|qk_norm)_forward",
    "adaLN and QK norm, backward": r"(adaln|qk_norm)_backward",
    "GELU, biases and gated adds": r"bias_gelu|gated_add|[Gg]elu",
    "SOAR's own": r"rollout_renoise|correction_loss",
    "optimizer": r"multi_tensor_apply|[Aa]dam",
    "casts to FP8": r"transformer_engine.*(cast|quantize|amax|transpose|scal)|transformer_engine::unary_kernel|"
    r"transpose_(optimized|fusion)_kernel",
    "matrix products in FP8": r"nvjet_(sm\d+_)?[qr][qr]|(gemm|cutlass).*(e4m3|e5m2)",
    "matrix products": r"nvjet|gemm|gemv|cublas|splitKreduce|cutlass",
    "sums": r"reduce_kernel|sum_kernel|reduce_dbias",
    "elementwise and copies": r"elementwise|Memcpy|Memset|CatArray|copy|index|scatter|gather|fill",
}


@dataclass(frozen=True)
class Ran:
    """A kernel, or a copy, that ran on the GPU; start and end in seconds."""

    name: str
    start: float
    end: float


@dataclass
class Total:
    """Of kernels with one name, or of one kind."""

    name: str
    kind: str
    seconds: float = 0.0
    launches: int = 0
    share: float = 0.0  # of the step

    def add(self, seconds: float) -> None:
        """One more launch."""
        self.seconds += seconds
        self.launches += 1


def of_a_step(ran: Iterable[Ran], step_seconds: float) -> Json:
    """The kernels of one step, those that took most first.

    Args:
        step_seconds: of a step that is not profiled.

    Returns:
        "busy_seconds", for how long at least one kernel ran; "launches"; and with seconds, launches and share of the
        step "kinds", and the largest of all names, "top".
    """
    ran = list(ran)
    names: dict[str, Total] = {}
    kinds: dict[str, Total] = {}
    for one in ran:
        kind = kind_of(one.name)
        for totals, name in ((names, one.name), (kinds, kind)):
            totals.setdefault(name, Total(name, kind)).add(one.end - one.start)
    for total in (*names.values(), *kinds.values()):
        total.share = total.seconds / step_seconds
    return {
        "busy_seconds": covered((one.start, one.end) for one in ran),
        "launches": len(ran),
        "kinds": [asdict(total) for total in _largest(kinds)],
        "top": [asdict(total) for total in _largest(names)[:TOP]],
    }


def _largest(totals: dict[str, Total]) -> list[Total]:
    return sorted(totals.values(), key=lambda total: -total.seconds)


def kind_of(name: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def short(name: str) -> str:
    """A name that fits in a table: C++ without return type, namespaces of torch and arguments."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|c10::|cutlass::", "", name)
    return name if len(name) <= 80 else f"{name[:77]}..."


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
