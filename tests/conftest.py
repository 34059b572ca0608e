"""One thread per process and the CPU stand-ins, before any test imports megatron."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from soar_mega import platform

torch.set_num_threads(1)
platform.install()
