"""The tests are the same on a machine with GPUs: neither they nor their processes see one."""

import os
import subprocess
import sys

import torch
from multirank import run_ranks


def seen() -> tuple[str | None, bool]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()


def test_neither_a_test_nor_a_rank_nor_a_command_sees_a_gpu() -> None:
    assert seen() == ("", False)
    assert run_ranks(seen, 2) == [("", False)] * 2
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "''"
