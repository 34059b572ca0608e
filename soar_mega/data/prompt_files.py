"""Files of prompts as the trainers of reinforcement learning have them (flow_grpo, DiffusionNFT, Flow-Factory).

train.txt                one prompt a line
train_metadata.jsonl     one JSON object a line, with `prompt` and whatever a reward reads beside it
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar_mega.data.text_files import NO_TEXT, decode
from soar_mega.distributed import is_rank_zero
from soar_mega.user_files import is_text, lfs_advice

log = logging.getLogger(__name__)

PROMPT = "prompt"  # the key of a line
NAMED = 3  # places in a message


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts that differ from each other, what their file says beside each, and the numbers of its lines."""

    path: Path
    prompts: list[str]
    metadata: list[dict[str, Any]]
    places: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def hash(self) -> str:
        """SHA-256 of all that the file says."""
        said = json.dumps([self.prompts, self.metadata], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def read_prompts(path: str | Path, split: str = "train", repeats: bool = False) -> PromptSet:
    """The prompts of a file, or of a split of a folder.

    Empty lines are left out and prompts that come again are kept once; both are told of, with their number and place.

    Args:
        path: a .txt or .jsonl file, or a folder with <split>_metadata.jsonl (which goes first) or <split>.txt.
        repeats: a prompt that comes again is meant, and told of only where something else is beside it.

    Raises:
        ValueError: there is no such file, a line is no prompt, or all are empty; names file and line.
    """
    file = _file(Path(path), split)
    places: dict[str, list[int]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    empty: list[int] = []
    repeated: list[int] = []
    otherwise: list[int] = []
    for number, line in _lines(file):
        if not line:
            empty.append(number)
            continue
        where = f"{file}:{number}"
        prompt, beside = _object(line, where) if file.suffix == ".jsonl" else (line, {})
        if not prompt:
            empty.append(number)
        elif prompt in places:
            (repeated if beside == metadata[prompt] else otherwise).append(number)
            places[prompt].append(number)
        else:
            places[prompt] = [number]
            metadata[prompt] = beside
    if not places:
        raise ValueError(f"{file} holds no prompt: write one a line")
    for what, numbers in (
        ("without a prompt, left out", empty),
        ("with a prompt again, kept once", [] if repeats else repeated),
        ("with a prompt again and something else beside it, judged by what is beside the first", otherwise),
    ):
        if numbers and is_rank_zero():
            log.warning("%s: %d lines %s (%s)", file, len(numbers), what, _named(file, numbers))
    return PromptSet(
        path=file, prompts=list(places), metadata=list(metadata.values()), places=list(places.values())
    )


def _file(path: Path, split: str) -> Path:
    if path.is_dir():
        names = (f"{split}_metadata.jsonl", f"{split}.txt")
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path} holds neither {' nor '.join(names)}: give a folder with one, or a file")
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a .txt or .jsonl file of prompts, or a folder with one")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: name it .txt (one prompt a line) or .jsonl (one object with {PROMPT!r} a line)"
        )
    return path


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Each line without the space around it, with its number from 1; nothing behind the last end of a line."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    if advice := lfs_advice(file):
        raise ValueError(f"{file}: {advice}")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            yield number, decode(line).strip()
        except ValueError as error:
            raise ValueError(f"{file}:{number} {error}") from error


def _object(line: str, where: str) -> tuple[str, dict[str, Any]]:
    """The prompt of a JSON line, and what else it says."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get(PROMPT), str):
        raise ValueError(f"{where} is not a JSON object with {PROMPT!r}, a text")
    if not is_text(values[PROMPT]):
        raise ValueError(f"{where}: {PROMPT} {NO_TEXT}")
    return values.pop(PROMPT).strip(), values


def _named(file: Path, numbers: list[int]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return ", ".join(f"{file.name}:{number}" for number in numbers[:NAMED]) + more
