"""Where a measurement comes from: what its file says before the numbers."""

import sys
from datetime import date

import torch


def origin(tool: str) -> dict[str, str]:
    """The tool, the command that was given, the day, torch's version and the device."""
    return {
        "tool": tool,
        "command": " ".join(["python", *sys.argv]),
        "date": str(date.today()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
