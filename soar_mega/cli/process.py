"""What every verb that computes does first."""

import logging
import os
import sys
import warnings


def start_process() -> None:
    """Logging to the terminal, quiet libraries, and the CPU stand-ins where there is no GPU."""
    # loading a local folder needs no progress bar per encoder
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    speaks = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s" if speaks else f"[rank {os.environ.get('RANK')}] %(message)s",
        stream=sys.stdout,
    )
    logging.getLogger("soar_mega").setLevel(logging.INFO if speaks else logging.WARNING)

    from soar_mega import platform

    platform.install()
