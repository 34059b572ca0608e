"""The end of the log of a program that failed, for the message that says so."""

from pathlib import Path

SHOWN = 5


def with_last_lines(words: str, log: Path) -> str:
    """Words, and under them what the program said last."""
    return "\n  ".join([words, *log.read_text(errors="replace").splitlines()[-SHOWN:]])
