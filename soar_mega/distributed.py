"""The process world: torch.distributed, megatron's parallel groups, and this process's place in them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from soar_mega import platform
from soar_mega.config import ParallelConfig


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_world(parallel: ParallelConfig, seed: int = 42) -> None:
    """Start torch.distributed (from torchrun's environment, or a world of one) and megatron's groups in it.

    Does nothing when the same layout has been started before.

    Raises:
        ValueError: the layout does not fit the number of processes, or another layout is running in this process.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel_state.model_parallel_is_initialized():
        running = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if running != (tensor, pipeline):
            raise ValueError(
                f"this process already runs with TP x PP = {running[0]} x {running[1]} and cannot change to "
                f"{tensor} x {pipeline}: call stop_world() first"
            )
        return
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(world_size, tensor, pipeline)
    _init_process_group(timedelta(minutes=parallel.distributed_timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    # a plain Python process on the CPU has no stand-ins; its model draws nothing from megatron's generators
    if torch.cuda.is_available() or platform.is_installed():
        model_parallel_cuda_manual_seed(seed)


def stop_world() -> None:
    """Undo `start_world`; does nothing when nothing is running."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_layout(world_size: int, tensor: int, pipeline: int) -> None:
    """Raise a ValueError with the nearest possible layouts unless TP x PP divides the number of processes."""
    if tensor < 1 or pipeline < 1:
        raise ValueError(
            f"parallel.tensor_model_parallel_size ({tensor}) and parallel.pipeline_model_parallel_size ({pipeline}) "
            "must be at least 1"
        )
    if world_size % (tensor * pipeline) == 0:
        return
    candidates = [(t, p) for t in range(1, world_size + 1) for p in range(1, world_size // t + 1)]
    possible = [(t, p) for t, p in candidates if world_size % (t * p) == 0]
    t, p = min(possible, key=lambda layout: (abs(layout[0] - tensor) + abs(layout[1] - pipeline), -layout[0]))
    processes = max(1, round(world_size / (tensor * pipeline))) * tensor * pipeline
    raise ValueError(
        f"TP x PP = {tensor} x {pipeline} does not divide the {world_size} process(es) of this run. Nearest for "
        f"{world_size}: parallel.tensor_model_parallel_size={t} parallel.pipeline_model_parallel_size={p}; or start "
        f"{processes} processes (torchrun --nproc-per-node)"
    )


def _init_process_group(timeout: timedelta) -> None:
    if dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


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
    """The number of data-parallel replicas."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def is_rank_zero() -> bool:
    """Whether this process speaks for the run; also true where no world has been started."""
    return not dist.is_initialized() or dist.get_rank() == 0
