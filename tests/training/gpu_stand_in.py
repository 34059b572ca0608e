"""A device that is another one than the CPU, on a machine without: which tensors would be on the GPU is kept in mind.

A tensor is on the CPU where it was made there (no device given, or "cpu"), brought there (.cpu()), or computed from
such tensors alone. All others are on the device, which is "cpu:0" here. What NCCL cannot do is refused: a collective of
CPU tensors on any group but the world's, which has gloo beside it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soar_mega import distributed, platform

DEVICE = torch.device("cpu", 0)
MADE = {
    *(
        "tensor",
        "as_tensor",
        "from_numpy",
        "frombuffer",
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "linspace",
    ),
    *("rand", "randn", "randint", "randperm", "eye"),
}


def is_on_cpu(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_cpu", False)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]


def _is_cpu(device: Any) -> bool:
    return device is None or torch.device(device) == torch.device("cpu")


def _target(name: str, args: Any, kwargs: Any) -> Any:
    """The device that a tensor is brought to, None if to none."""
    if name == "cpu":
        return torch.device("cpu")
    if name != "to":
        return None
    given = [kwargs.get("device"), *args[1:2]]
    return next((d for d in given if isinstance(d, str | torch.device)), None)


class _KeepsPlaces(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu") if is_on_cpu(args[0]) else DEVICE
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        target = _target(name, args, kwargs)
        if target is not None and not args[0].is_meta:
            to_cpu = _is_cpu(target)
            if to_cpu != is_on_cpu(args[0]) and result.untyped_storage() is args[0].untyped_storage():
                result = result.clone()  # as between two devices
            result.untyped_storage().on_cpu = to_cpu
            return result
        inputs = _tensors((args, kwargs))
        if name in MADE:
            on_cpu = _is_cpu(kwargs.get("device"))
        else:
            on_cpu = bool(inputs) and all(map(is_on_cpu, inputs))
        mine = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in _tensors(result):
            if on_cpu and id(tensor.untyped_storage()) not in mine:
                tensor.untyped_storage().on_cpu = True
        return result


class _RefusesAsNcclDoes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.groups: set[str] = set()  # that collectives were done on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            (boxed,) = [each for each in objects if str(each._type()).endswith(".ProcessGroup")]
            group = dist.ProcessGroup.unbox(boxed)
            self.groups.add(group.group_desc)
            if group.group_name != dist.group.WORLD.group_name:  # type: ignore[union-attr]
                for tensor in _tensors(args):
                    assert not is_on_cpu(tensor), (
                        f"No backend type associated with device type cpu: {func} on {group.group_desc}"
                    )
        return func(*args, **(kwargs or {}))


@contextmanager
def nccl_alone() -> Iterator[set[str]]:
    """In it this process has a device, with NCCL; gives the groups that had collectives."""
    given = distributed.device.__code__  # the function itself has been imported everywhere
    distributed.device.__code__ = (lambda: torch.device("cpu", 0)).__code__
    try:
        with ExitStack() as stack:
            # tensors of objects are made where the group's backend wants them
            at = patch.object(dist.distributed_c10d, "_get_object_coll_device", lambda group=None: "cpu:0")
            stack.enter_context(at)
            stack.enter_context(patch.object(platform, "_CPU", DEVICE))
            stack.enter_context(patch.object(torch.cuda, "current_device", lambda: DEVICE))
            accelerator = type(get_accelerator())  # DeepSpeed's word for the device
            for name in ("device_name", "current_device_name"):
                stack.enter_context(patch.object(accelerator, name, lambda self, index=None: "cpu:0"))
            refuses = stack.enter_context(_RefusesAsNcclDoes())
            stack.enter_context(_KeepsPlaces())
            yield refuses.groups
    finally:
        distributed.device.__code__ = given
