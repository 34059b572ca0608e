"""One thread per process and the CPU stand-ins, before any test imports megatron."""

import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Triton decides when it is imported whether its own functions can be interpreted, and megatron imports it. Without
    # the variable in the environment the kernels run as their eager twins; tests/kernels sets it where it interprets.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

from soar_mega import platform

torch.set_num_threads(1)
platform.install()
