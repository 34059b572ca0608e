"""Where a measurement comes from: what its file says before the numbers."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def origin(tool: str) -> dict[str, str]:
    """The tool, the command that was given, the day, the commit, torch's version and the device."""
    return {
        "tool": tool,
        "command": shlex.join([*launcher(), *sys.argv]),
        "date": str(date.today()),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def launcher() -> list[str]:
    """What starts the processes that measure; with torchrun there are as many on each node as on this one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return ["python"]
    on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = processes // on_this_node
    of_nodes = ["--nnodes", str(nodes)] if nodes > 1 else []
    return ["torchrun", *of_nodes, "--nproc-per-node", str(on_this_node)]


def device_slug() -> str:
    """The device as a part of a file name: "h100-80gb-hbm3", or "cpu"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def commit() -> str:
    """Of this checkout, with a word where files differ from it; a copy is told by SOAR_MEGA_COMMIT."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if "SOAR_MEGA_COMMIT" in os.environ:
        return os.environ["SOAR_MEGA_COMMIT"]
    head = git("rev-parse", "--short", "HEAD") if shutil.which("git") else None
    if head is None:
        return "unknown"
    return f"{head} with changes" if git("status", "--porcelain", "--untracked-files=no") else head
