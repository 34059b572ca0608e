"""A device that is another one than the CPU, on a machine without: which tensors would be on the GPU is kept in mind.

A tensor is on the CPU where it was made there (no device given, or "cpu"), brought there (.cpu()), or computed from
such tensors alone. All others are on the device, which is "cpu:0" here. What NCCL cannot do is refused: a collective of
CPU tensors on any group but the world's, which has gloo beside it. What the host would wait for is noted: a value of
the device that it reads, a shape that depends on one, a copy that is not told to go on by itself.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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
TORCH = os.path.dirname(torch.__file__)
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

# the host reads a value, or needs one to know a shape
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive", "allclose", "bincount"),
}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    what: str
    inside: tuple[str, ...]  # functions, the innermost last


@dataclass
class Seen:
    """What a process did that matters on a GPU."""

    collectives: list[tuple[str, str]] = field(default_factory=list)  # operation, group
    waits: list[Wait] = field(default_factory=list)

    @property
    def groups(self) -> set[str]:
        return {group for _, group in self.collectives}

    def wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith((TORCH, __file__))]
        self.waits.append(Wait(what, tuple(f"{f.name} ({Path(f.filename).name}:{f.lineno})" for f in frames)))


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


def _is_told_to_go_on(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy between places is one that nobody waits for."""
    return bool(kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))


class _KeepsPlaces(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu") if is_on_cpu(args[0]) else DEVICE
        name = getattr(func, "__name__", "")
        target = _target(name, args, kwargs)
        if name == "copy_":
            target = torch.device("cpu") if is_on_cpu(args[0]) else DEVICE
            crosses = is_on_cpu(args[0]) != is_on_cpu(args[1])
        else:
            crosses = target is not None and not args[0].is_meta and _is_cpu(target) != is_on_cpu(args[0])
        if crosses and not _is_told_to_go_on(name, args, kwargs):
            self.seen.wait(name)
        if name in ("tolist", "numpy") and not is_on_cpu(args[0]):
            self.seen.wait(name)
        if name in ("tensor", "as_tensor"):
            on_device = not all(map(is_on_cpu, _tensors(args)))
            if on_device or not _is_cpu(kwargs.get("device")):
                self.seen.wait(name)
        result = func(*args, **kwargs)
        if name == "copy_":
            return result
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
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "aten" and self._is_a_wait(name, func, args, kwargs or {}):
            self.seen.wait(name)
        if func.namespace == "c10d":
            objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            (boxed,) = [each for each in objects if str(each._type()).endswith(".ProcessGroup")]
            group = dist.ProcessGroup.unbox(boxed)
            self.seen.collectives.append((name, group.group_desc))
            if group.group_name != dist.group.WORLD.group_name:  # type: ignore[union-attr]
                for tensor in _tensors(args):
                    assert not is_on_cpu(tensor), (
                        f"No backend type associated with device type cpu: {func} on {group.group_desc}"
                    )
        return func(*args, **(kwargs or {}))

    def _is_a_wait(self, name: str, func: Any, args: Any, kwargs: Any) -> bool:
        if name in READS:
            knows = name == "repeat_interleave" and kwargs.get("output_size") is not None
            return not knows and not all(map(is_on_cpu, _tensors((args, kwargs))))
        if name not in INDEXES or is_on_cpu(args[0]):
            return False
        indices = _tensors(args[1])
        return any(is_on_cpu(index) or index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def nccl_alone() -> Iterator[Seen]:
    """In it this process has a device, with NCCL; gives what it did."""
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
            seen = Seen()
            stack.enter_context(_RefusesAsNcclDoes(seen))
            stack.enter_context(_KeepsPlaces(seen))
            yield seen
    finally:
        distributed.device.__code__ = given
