"""Where an operation runs, at which size it is launched, and what its arguments must be.

A tensor on CUDA goes to the Triton source, a tensor on the CPU to plain torch calls, or, with TRITON_INTERPRET=1 in the
environment, to the same Triton source read by Triton's interpreter. On the meta device, which stands for a GPU where
work is counted, the launching code runs and launches nothing. The sources (`soar_mega.kernels.source`) are imported at
the first launch only: a process that never launches never needs Triton.

A call costs the host little more than a torch call: arguments are checked once for each layout of them.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_ROW = 2**31 - 2**16  # offsets inside one sample are 32 bits wide, with room for the last block
MOST_LAYOUTS = 4096  # that are kept: more than a run has shapes

Found = TypeVar("Found")


def define(
    name: str,
    *,
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    outputs: int | None = None,
) -> Callable[..., Any]:
    """An operation with a backward pass of its own, called with positional arguments.

    Where no gradient is asked for, autograd is not touched.

    Args:
        name: what a profile calls it.
        forward: launches the Triton source; its outputs are made by torch.empty.
        setup_context: of (ctx, arguments, results): keeps what `backward` reads.
        backward: of (ctx, a gradient for each output): a gradient or None for each argument. It has no second one.
        outputs: how many of the results the caller gets, the rest being for setup_context alone; None: all of them.
    """

    def with_context(ctx: Any, *args: Any) -> Any:
        results = forward(*args)
        setup_context(ctx, args, results)
        return results if outputs is None else results[:outputs]

    methods = {"forward": staticmethod(with_context), "backward": staticmethod(once_differentiable(backward))}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def operation(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return function.apply(*args)
        results = forward(*args)
        return results if outputs is None else results[:outputs]

    return operation


def launches(device: torch.device) -> bool:
    """Whether tensors there go to the Triton source."""
    return device.type != "cpu" or interpreted()


def interpreted() -> bool:
    """Whether CPU tensors go to Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def once_per_layout(work: Callable[..., Found]) -> Callable[..., Found]:
    """`work` of tensors, done once for each layout of them: shapes, strides, dtypes and devices. Other arguments, which
    are hashable, count by value.

    `work` checks the arguments of an operation and finds the size of its launches. What it raises is not kept.
    """
    known: dict[tuple[Any, ...], Found] = {}

    def known_or_done(*tensors: Any) -> Found:
        key = tuple(
            [(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in tensors]
        )
        found = known.get(key)
        if found is None:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            found = known[key] = work(*tensors)
        return found

    known_or_done.known = known  # type: ignore[attr-defined]  # for a test that changes the launch tables
    return known_or_done


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Starts `kernel`[grid](*args, **options) on `device`; on the meta device nothing.

    Raises:
        RuntimeError: the interpreter was asked for after Triton had been imported without it.
    """
    if device.type == "cuda":
        if device.index == torch.cuda.current_device():
            kernel[grid](*args, **options)
            return
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    elif device.type == "cpu":
        if type(kernel).__name__ != "InterpretedFunction":
            raise RuntimeError(
                "Triton was imported before TRITON_INTERPRET=1 was set: set it in the environment of the process"
            )
        kernel[grid](*args, **options)


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90 and the like on CUDA, "interpreter" on the CPU: the key of the launch tables."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def empty(like: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, type and device, for a kernel to fill."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
    strided: bool = False,
) -> None:
    """Refuses what a kernel cannot index.

    Args:
        shape: sizes that must hold; a string names a free one, as in ("B", 16, "H", "W").
        device: where it must be; None: anywhere.
        strided: only the last dimension must be contiguous, as in a slice of a larger tensor.

    Raises:
        ValueError: wrong number of dimensions, size, dtype or device, no elements, or not contiguous.
    """
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be of shape [{wanted}], not {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors are, not on {tensor.device}")
    if strided:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous along its last dimension, not of strides {list(tensor.stride())}: "
                "call .contiguous()"
            )
    elif not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, not of strides {list(tensor.stride())}: call .contiguous()"
        )
