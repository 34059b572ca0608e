"""A tool's work as steps in one folder: what is finished is not repeated, unless something before it was."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from walk.commands import end_on_sigterm


class Steps:
    """The steps of a tool, in order.

    Attributes:
        seconds: that each finished step took; kept in <folder>/steps.json.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._names = names
        self._record = folder / "steps.json"
        self.seconds: dict[str, float] = json.loads(self._record.read_text()) if self._record.exists() else {}
        self._repeat = False

    def take(self, name: str, words: str, action: Callable[[], None]) -> None:
        """Runs a step, unless it was finished before and nothing ahead of it was repeated."""
        number = f"[{self._names.index(name) + 1}/{len(self._names)}]"
        if name in self.seconds and not self._repeat:
            print(f"{number} {words}: done before", flush=True)
            return
        print(f"{number} {words} ...", flush=True)
        self._repeat = True
        started = time.monotonic()
        action()
        self.seconds[name] = time.monotonic() - started
        self._record.write_text(json.dumps(self.seconds, indent=1) + "\n")
        print(f"    {self.seconds[name]:.0f} s", flush=True)


class Tool(Protocol):
    """What takes its steps, and leaves report.html and metrics.json in its folder."""

    folder: Path

    def run(self) -> None: ...


def run_tool(name: str, make: Callable[[], Tool]) -> int:
    """Makes a tool and runs it, from the root of the repository, where recipes name their files from; its exit code."""
    end_on_sigterm()
    os.chdir(Path(__file__).parents[2])
    try:
        tool = make()
        tool.run()
    except (RuntimeError, ValueError) as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    print(f"\nDone. Open {tool.folder}/report.html; the numbers are in {tool.folder}/metrics.json.")
    return 0
