"""What the processes of torchrun can do on a CPU, by torch's calls alone; `validate` starts it, tools/ on PYTHONPATH.

python -m torch.distributed.run --nproc-per-node 4 -m plan.calibrate OUT

All processes work at once, as in a step: where they share cores, each number is a share.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from plan.gloo import POINTS, SIZES, TOKENS

SMALL, LARGE = 2**16, 2**22  # bytes of the two messages, whose difference is a link's speed
OFTEN, SELDOM = 300, 30


def main(out: Path) -> None:
    """Rank 0 writes what `validate` makes a Hardware of."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    left, right = operands()
    product = seconds(lambda: left @ right, OFTEN)
    forward, backward = attention_speeds()
    latency, link = link_of(dist.get_world_size(), product)
    found = {
        "gemm": 2 * left.numel() * right.shape[1] / product,
        "attention": (forward, backward),
        "copy": copy_speed(),
        "link": link,
        "link_latency": latency,
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def seconds(work: Callable[[], object], times: int) -> float:
    """One call, until the last process is through."""
    work()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        work()
    dist.barrier()
    return (time.perf_counter() - start) / times


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """An MLP's first product on a micro-batch."""
    hidden = SIZES.hidden_size
    return torch.randn(POINTS * sum(TOKENS), hidden), torch.randn(hidden, 4 * hidden)


def attention_speeds() -> tuple[float, float]:
    """FLOP/s of forward and backward, the backward counted as twice the forward."""
    shape = (POINTS, SIZES.num_attention_heads, sum(TOKENS), SIZES.attention_head_dim)
    q = torch.randn(shape, requires_grad=True)
    work = 4 * q.numel() * shape[2]
    forward = seconds(lambda: scaled_dot_product_attention(q, q, q), OFTEN)
    both = seconds(lambda: scaled_dot_product_attention(q, q, q).sum().backward(), OFTEN)
    return work / forward, 2 * work / (both - forward)


def copy_speed() -> float:
    """Bytes/s that an elementwise call reads and writes."""
    left, _ = operands()
    other = torch.randn_like(left)
    return 3 * left.nbytes / seconds(lambda: left + other, OFTEN)


def link_of(ranks: int, product: float) -> tuple[float, float]:
    """Latency in seconds of one step of a gather and bytes/s of a link, in gathers between products as a layer has.

    Args:
        product: seconds of one.
    """
    left, right = operands()

    def gather(size: int) -> float:
        mine, all_of_them = torch.randn(size // 4 // ranks), torch.empty(size // 4)

        def work() -> None:
            torch.matmul(left, right)
            dist.all_gather_into_tensor(all_of_them, mine)

        return seconds(work, SELDOM) - product

    small, large = gather(SMALL), gather(LARGE)
    if not 0 < small < large:
        raise RuntimeError("a small gather took as long as a large one: measure on an idle machine")
    link = (LARGE - SMALL) * (ranks - 1) / ranks / (large - small)
    steps = (ranks - 1).bit_length()  # the planner's: the logarithm of the ranks
    return small / steps, link


if __name__ == "__main__":
    main(Path(sys.argv[1]))
