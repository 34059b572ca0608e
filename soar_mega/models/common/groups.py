"""The process groups that a model lives in."""

import torch.distributed as dist
from megatron.core import parallel_state


def tensor_parallel_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group, or None where no process world has been started."""
    return parallel_state.get_tensor_model_parallel_group(check_initialized=False)


def context_parallel_group() -> dist.ProcessGroup | None:
    """The context-parallel group, or None where no process world has been started."""
    return parallel_state.get_context_parallel_group(check_initialized=False)
