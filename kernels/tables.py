"""At which size each kernel is launched: one static entry per operation, class of shapes and architecture.

Nothing is tuned while a job runs: the first step is as fast as any other, and no rank waits for another one's search.
Entries are what tools/tune_kernels.py found best on an H100, or within 2 % of it; those of rollout_renoise,
correction_loss and sums come from what the compiler reports for sm_90 (registers, width of loads).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """block: elements that one program works on. num_warps: 32 threads each."""

    block: int
    num_warps: int


# operation -> class of shapes -> architecture ("any": those without an entry of their own) -> launch
LAUNCHES: dict[str, dict[str, dict[str, Launch]]] = {
    # "16 bit": a tensor in play has elements of two bytes, and 128 bits are eight of them for each thread
    "rollout_renoise": {
        "16 bit": {"any": Launch(1024, 4)},
        "32 bit": {"any": Launch(1024, 8)},
        "tokens": {"any": Launch(1024, 8)},  # block: elements of a tile of C x patch x width
    },
    "correction_loss": {"16 bit": {"any": Launch(1024, 4)}, "32 bit": {"any": Launch(1024, 8)}},
    # block: tokens, backward the least for a program; the classes end in the power of two that holds a hidden size
    "adaln": {
        "forward 2048": {"any": Launch(1, 8)},
        "forward 4096": {"any": Launch(1, 8)},
        "backward 2048": {"any": Launch(8, 8)},
        "backward 4096": {"any": Launch(8, 8)},
    },
    "qk_norm_rope": {
        "forward": {"any": Launch(1024, 4)},
        "forward rotary": {"any": Launch(1024, 2)},
        "backward": {"any": Launch(1024, 8)},
        "backward rotary": {"any": Launch(1024, 8)},
    },
    # block: columns; 16 bit as above
    "gated_add": {"16 bit": {"any": Launch(512, 2)}, "32 bit": {"any": Launch(512, 4)}},
    "bias_gelu": {"16 bit": {"any": Launch(1024, 4)}, "32 bit": {"any": Launch(1024, 8)}},
    "sum_lines": {"columns": {"any": Launch(32, 4)}},
}


def launch_of(operation: str, shape_class: str, architecture: str) -> Launch:
    """The entry for an architecture such as "sm_90", or the one for any."""
    by_architecture = LAUNCHES[operation][shape_class]
    return by_architecture.get(architecture, by_architecture["any"])


def width_class(*tensors: Tensor | None) -> str:
    """The launch table's class of a kernel that streams these."""
    return "16 bit" if any(t is not None and t.element_size() == 2 for t in tensors) else "32 bit"
