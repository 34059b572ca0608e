"""What verbs that compute do first."""

import faulthandler
import logging
import os
import sys
import warnings


def start_process() -> None:
    """Logging to the terminal, quiet libraries, and the CPU stand-ins where there is no GPU."""
    start_logging()

    from soar_mega import platform

    platform.install()


def start_logging() -> None:
    """Logging to the terminal and quiet libraries: all that a verb needs which has nothing to do with megatron."""
    # tensor parallelism overlaps communication with computation only when kernels start in order (megatron asks for it)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # loading a local folder needs no progress bar per encoder
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # a crash in native code shows where Python was, on stderr whatever stands for it
    faulthandler.enable(file=2)
    # when a rank dies, torch's C++ parts would warn with forty frames of theirs where one message says what happened
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = os.environ.get("RANK", "0")
    out, err = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    err.setLevel(logging.WARNING)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", handlers=[out, err])
    logging.getLogger("soar_mega").setLevel(logging.INFO if rank == "0" else logging.WARNING)
