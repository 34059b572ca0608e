"""soar-mega commands in processes of their own, on the GPU that they find or with it hidden."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 200  # seconds of one command


class Verb:
    """A command that was started, with its output in a file."""

    def __init__(self, *words: object, log: Path, on_cpu: bool = False) -> None:
        self.words, self._log = [str(word) for word in words], log
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "soar_mega", *self.words],
                cwd=ROOT,
                env=os.environ | hidden,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def is_running(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Waits for it; an AssertionError with the end of its output where it has failed or takes too long."""
        try:
            code = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            code = f"none after {LIMIT} s"
        assert code == 0, f"{' '.join(self.words)}: exit code {code}\n{self.output()[-3000:]}"

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait()

    def output(self) -> str:
        return self._log.read_text(errors="replace")


def run(*words: object, log: Path, on_cpu: bool = False) -> None:
    """A command from beginning to end."""
    Verb(*words, log=log, on_cpu=on_cpu).finish()
