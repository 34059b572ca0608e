"""The process world: torch.distributed, megatron's parallel groups, and this process's place in them."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from soar_mega.config import ParallelConfig

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=10)  # until all processes are there; also of collectives without a watchdog
_timeout = START_TIMEOUT  # of the world that runs


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # srun may show each process its own GPU alone (--gpus-per-task)
    is_only_one = torch.cuda.device_count() == 1
    return torch.device("cuda", 0 if is_only_one else int(os.environ.get("LOCAL_RANK", "0")))


def start_world(parallel: ParallelConfig, timeout: timedelta = START_TIMEOUT) -> None:
    """Start torch.distributed (from torchrun's environment, or a world of one) and megatron's groups in it.

    Does nothing when the same layout has been started before.

    Args:
        timeout: how long a rank waits for others in a collective. That all processes start is waited for 10 minutes.

    Raises:
        ValueError: the layout does not fit the number of processes, or another layout is running in this process.
    """
    from megatron.core import parallel_state

    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    wanted = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if parallel_state.model_parallel_is_initialized():
        running = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        )
        if running != (*wanted, chunks):
            raise ValueError(
                f"this process already runs with TP x PP x CP x VPP = {_product(running)} and cannot change to "
                f"{_product((*wanted, chunks))}: call stop_world() first"
            )
        return
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(world_size, *wanted)
    _init_process_group(timeout)
    with _made_like_ours():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
    # megatron's random generators are left unseeded: a model draws from none, and with seeded ones Transformer Engine's
    # attention would restore a state at each call, which no CUDA graph can hold


def stop_world() -> None:
    """Undo `start_world`; does nothing when nothing is running."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_layout(world_size: int, tensor: int, pipeline: int, context: int = 1) -> None:
    """Raise a ValueError with the nearest possible layouts unless TP x PP x CP divides the number of processes."""
    sizes = (tensor, pipeline, context)
    if min(sizes) < 1:
        raise ValueError(
            f"parallel.tensor_model_parallel_size ({tensor}), parallel.pipeline_model_parallel_size ({pipeline}) and "
            f"parallel.context_parallel_size ({context}) must be at least 1"
        )
    if world_size % math.prod(sizes) == 0:
        return
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    possible = [x for x in itertools.product(divisors, repeat=3) if world_size % math.prod(x) == 0]
    t, p, c = min(
        possible, key=lambda x: (sum(abs(a - b) for a, b in zip(x, sizes, strict=True)), -x[0], -x[1])
    )
    processes = max(1, round(world_size / math.prod(sizes))) * math.prod(sizes)
    raise ValueError(
        f"TP x PP x CP = {_product(sizes)} does not divide the {world_size} process(es) of this run. Nearest for "
        f"{world_size}: parallel.tensor_model_parallel_size={t} parallel.pipeline_model_parallel_size={p} "
        f"parallel.context_parallel_size={c}; or start {processes} processes (torchrun --nproc-per-node)"
    )


def _product(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _init_process_group(timeout: timedelta) -> None:
    global _timeout
    if dist.is_initialized():
        return
    _timeout = timeout
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
        # torch ends a process whose NCCL thread is stuck in a call of CUDA for 8 minutes, without a word about others
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout.total_seconds())))
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    store.set_timeout(timeout)  # in which a rank waits for another one's address
    store = dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def new_group(ranks: list[int]) -> dist.ProcessGroup | None:
    """A group of ranks for tensors on their devices; it waits as long as the world does. Collective over the world.

    On GPUs the world alone also has gloo, for tensors on the CPU: a group of its own would connect all of its members
    once more, each with each.
    """
    with _made_like_ours():
        return dist.new_group(ranks)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _made_like_ours() -> Iterator[None]:
    """megatron cannot be told the backend of its groups, and forgets the timeout of some."""
    make = dist.new_group

    def make_for_device(*args: Any, **kwargs: Any) -> Any:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        return make(*args, **(kwargs | {"backend": backend, "timeout": _timeout}))

    dist.new_group = make_for_device
    try:
        yield
    finally:
        dist.new_group = make


def is_first_stage() -> bool:
    """Whether this rank holds the first pipeline stage."""
    from megatron.core import parallel_state

    return bool(parallel_state.is_pipeline_first_stage())


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage."""
    from megatron.core import parallel_state

    return bool(parallel_state.is_pipeline_last_stage())


def data_rank() -> int:
    """This rank's place among the data-parallel replicas."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_size() -> int:
    """The number of data-parallel replicas; the ranks of a CP group belong to the same one."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def is_first_of_replica() -> bool:
    """Whether this rank speaks for its replica of the model: the first of its tensor, pipeline and context ranks."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank()
        == parallel_state.get_pipeline_model_parallel_rank()
        == parallel_state.get_context_parallel_rank()
        == 0
    )


def is_rank_zero() -> bool:
    """Whether this process speaks for the run; also true where no world has been started."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_on_rank_zero(mine: T) -> list[T]:
    """The objects of all ranks in order on rank 0, an empty list on the others. Collective over the world."""
    gathered: list[T | None] | None = [None] * dist.get_world_size() if is_rank_zero() else None
    dist.gather_object(mine, gathered)
    return gathered or []  # type: ignore[return-value]
