"""What this library uses of torch, megatron-core and DeepSpeed that they do not promise to keep, in one place.

A release may rename any of it: tests/test_private_names.py names each name, so that a test says which one is gone, and
keeps private names out of all other files but platform.py, whose stand-ins have guards of their own. Libraries are
imported where they are needed: this file is for everyone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

# -- torch


def default_store() -> Any:
    """The store that torch.distributed was started with."""
    return dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]


def forward_pre_hooks(module: Module) -> Iterable[Callable[..., Any]]:
    """What is called with a module and its arguments before its forward."""
    return module._forward_pre_hooks.values()


def nccl_trace() -> bytes:
    """What NCCL's flight recorder has recorded, pickled."""
    from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

    return _dump_nccl_trace()


def processes_of_data_loader(iterator: Any) -> list[BaseProcess]:
    """Those that a DataLoader's iterator has started."""
    return getattr(iterator, "_workers", [])


def end_data_loader(iterator: Any) -> None:
    """Tells the processes of a DataLoader's iterator to end, and waits for each some seconds."""
    if processes_of_data_loader(iterator):
        iterator._shutdown_workers()


def is_data_loader_timeout(error: Exception) -> bool:
    """Whether a DataLoader says that its timeout is over; it may be asked again."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")


def shared_storage(size: int) -> torch.UntypedStorage:
    """Bytes that go to another process as they are."""
    return torch.UntypedStorage._new_shared(size)


def wrapped_exception(error: Exception) -> Any:
    """An exception in the form in which torch's checkpoints send it to other ranks."""
    from torch.distributed.checkpoint.api import _wrap_exception

    return _wrap_exception(error)


def write_item(writer: Any, file: Any, data: Any, item: Any, name: str) -> Any:
    """Writes a tensor or bytes as a torch.distributed.checkpoint.FileSystemWriter does, and says where they lie."""
    from torch.distributed.checkpoint.filesystem import _write_item

    return _write_item(writer.transforms, file, data, item, name, writer.serialization_format)


# -- megatron-core


@dataclass(frozen=True)
class MainCopy:
    """Where a megatron optimizer keeps its part of a parameter's float32 main copy."""

    parameter: Parameter
    main: Tensor
    start: int  # its first element in the flat parameter


@contextmanager
def capturing() -> Iterator[None]:
    """While CUDA work is recorded as a graph: megatron's hooks then leave it alone.

    Transformer Engine is not told: its attention would choose a form that keeps all scores.
    """
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


def with_sharded_keys(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state dict for torch's planner: flat, under the names that tensors have in the checkpoint."""
    from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys

    return _replace_state_dict_keys_with_sharded_keys(state, True)[0]


def distributed_main_copies(optimizer: Any) -> Iterator[MainCopy]:
    """Those of a DistributedOptimizer."""
    pairs = [
        *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
        *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
    ]
    for parameters, mains in pairs:
        for parameter, main in zip(parameters, mains, strict=True):
            yield MainCopy(parameter, main, optimizer._get_model_param_range_map(parameter)["param"].start)


def float16_main_copies(optimizer: Any) -> Iterator[MainCopy]:
    """Those of a Float16OptimizerWithFloat16Params."""
    for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        yield from (MainCopy(p, main, 0) for p, main in zip(parameters, mains, strict=True))
    for parameters in optimizer.fp32_from_fp32_groups:
        yield from (MainCopy(p, p, 0) for p in parameters)


def distributed_state(optimizer: Any, parameter: Parameter) -> dict[str, Tensor]:
    """A DistributedOptimizer's part of a parameter's main copy (`param`), exp_avg and exp_avg_sq."""
    return optimizer._get_main_param_and_optimizer_states(parameter)


# -- DeepSpeed


@dataclass(frozen=True)
class ZeroPart:
    """This rank's part of a parameter inside the flat tensor that ZeRO's optimizer updates."""

    owner: Tensor
    offset: int  # its first element in the owner
    start: int  # its first element in the flat parameter
    count: int


def zero_part(engine: Any, stage: int, p: Any, groups: list[dict[str, Any]]) -> ZeroPart | None:
    """At the stages 1 to 3; None where the parameter lies in other ranks' ranges.

    Args:
        engine: DeepSpeed's.
        groups: the optimizer's parameter groups.
    """
    if stage == 3:
        optimizer = engine.optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        return ZeroPart(optimizer.fp32_partitioned_groups_flat[group], offset, *partition(p))
    mapping = p._hp_mapping
    if mapping is None:
        return None
    ours, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    return ZeroPart(groups[mapping.param_group_index]["params"][0], ours.start, whole.start, whole.numel)


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """At the stages 1 and 2: the vectors that the parameters are views of, one for each group."""
    is_bf16_at_stage_1 = hasattr(optimizer, "bf16_groups_flat")
    return optimizer.bf16_groups_flat if is_bf16_at_stage_1 else optimizer.bit16_groups_flat


def partition(p: Any) -> tuple[int, int]:
    """At stage 3: first element and number of elements of this rank's part of a parameter, without padding."""
    start = p.ds_tensor.ds_numel * dist.get_rank(p.ds_process_group)
    return start, max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))


def zero_gradient(p: Any) -> Tensor:
    """At the stages 1 and 2: the gradient of this rank's part of a parameter, or of more than that."""
    return p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)


def forget_gradients(optimizer: Any, stage: int) -> None:
    """At the stages 1 to 3: forget what earlier backwards have accumulated, as ZeRO does after a step that it skips."""
    optimizer.zero_grad()
    if not hasattr(optimizer, "averaged_gradients"):  # bf16 at stage 1: all is in buffers that are zero now
        return
    optimizer.micro_step_id = 0 if stage == 3 else -1
    offloaded = optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload
    if offloaded:
        optimizer.reset_cpu_buffers()
    elif stage == 3:
        optimizer.averaged_gradients.clear()
    else:
        for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in held:
                held[group] = None


def without_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication at the first use, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
