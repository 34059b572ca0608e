"""The file in which a reward worker says where it is: there while the worker is.

    http://node-7:41207
    # token: /shared/reward/token
    # soar-mega serve-reward is there while this file is

A `failure.txt` in the same folder says that the worker does not come back, and why: chains and their job scripts write
it.
"""

from dataclasses import dataclass
from pathlib import Path

MARK = b"# soar-mega serve-reward is there while this file is\n"
FAILURE = "failure.txt"
_TOKEN = "# token: "


@dataclass(frozen=True, kw_only=True)
class Said:
    """Where a worker is, the file of its token ("": there is none), or why it is gone for good."""

    url: str = ""
    token_file: str = ""
    gone: str = ""


def url_file_content(url: str, token_file: str = "") -> bytes:
    """What a worker writes into its file."""
    token = f"{_TOKEN}{Path(token_file).absolute()}\n" if token_file else ""
    return f"{url}\n{token}".encode() + MARK


def read_url_file(path: Path) -> Said:
    """What a file says. OSError: it is not there, and the worker may come back."""
    failure = path.parent / FAILURE
    if failure.is_file():
        return Said(gone=failure.read_text().strip())
    url, *more = path.read_text().splitlines() or [""]
    token = next((line.removeprefix(_TOKEN) for line in more if line.startswith(_TOKEN)), "")
    return Said(url=url.strip(), token_file=token.strip())
