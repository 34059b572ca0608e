"""Where an operation runs, at which size it is launched, and what its arguments must be.

A tensor on CUDA goes to the Triton source, a tensor on the CPU to the eager twin, or, with TRITON_INTERPRET=1 in the
environment, to the same Triton source read by Triton's interpreter. The sources (`soar_mega.kernels.source`) are
imported at the first launch only: a process that never launches never needs Triton.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # by operation: the function that launches its Triton source
LARGEST_ROW = 2**31 - 2**16  # offsets inside one sample are 32 bits wide, with room for the last block


def define(
    name: str,
    *,
    triton: Callable[..., Any],
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers soar_mega::`name` with all that torch.library wants; `triton` states the schema by its annotations.

    Args:
        triton: launches the Triton source, on CUDA and in the interpreter.
        eager: the same function on CPU tensors by plain torch calls.
        fake: empty outputs of the right shape, dtype and device.
        setup_context, backward: see torch.library.register_autograd; None for what is itself part of a backward pass.
    """

    def on_cpu(*args: Any) -> Any:
        return triton(*args) if interpreted() else eager(*args)

    LAUNCHERS[name] = triton
    operation = torch.library.custom_op(f"soar_mega::{name}", triton, mutates_args=(), device_types="cuda")
    operation.register_kernel("cpu")(on_cpu)
    operation.register_fake(fake)
    if backward is not None:
        operation.register_autograd(backward, setup_context=setup_context)
    return operation


def interpreted() -> bool:
    """Whether CPU tensors go to Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Starts `kernel`[grid](*args, **options) on `device`.

    Raises:
        RuntimeError: the interpreter was asked for after Triton had been imported without it.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
        return
    if type(kernel).__name__ != "InterpretedFunction":
        raise RuntimeError(
            "Triton was imported before TRITON_INTERPRET=1 was set: set it in the environment of the process"
        )
    kernel[grid](*args, **options)


def architecture(device: torch.device) -> str:
    """sm_90 and the like on CUDA, "interpreter" on the CPU: the key of the launch tables."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


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
