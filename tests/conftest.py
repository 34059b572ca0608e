"""One thread per process, no GPU, and the CPU stand-ins, before any test imports megatron.

tests/gpu is a run of its own (`make test-gpu`): its pytest.ini keeps pytest from reading this file there.
"""

import importlib.util
import os
import pkgutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# The same tests on every machine. It must be said before the first use of CUDA, and the processes of a test inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

if importlib.util.find_spec("triton"):
    # Triton decides when a function is read whether it can be interpreted: its own when megatron imports it, ours at
    # the first launch, in whichever test that is. All are read here. Without the variable in the environment the
    # kernels run as their eager twins; tests/kernels sets it where it interprets.
    os.environ["TRITON_INTERPRET"] = "1"
    import soar_mega.kernels.source

    for module in pkgutil.iter_modules(soar_mega.kernels.source.__path__):
        importlib.import_module(f"soar_mega.kernels.source.{module.name}")
    del os.environ["TRITON_INTERPRET"]

from soar_mega import platform

torch.set_num_threads(1)
platform.install()

collect_ignore = ["gpu"]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up training data for the tiny model, which nobody changes."""
    from tiny_runs import make_shards

    return make_shards(tmp_path_factory.mktemp("data") / "train", 48, seed=1)
