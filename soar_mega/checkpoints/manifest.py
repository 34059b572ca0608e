"""manifest.json of a checkpoint: the size and SHA-256 of every other file in its folder.

It is written last, so that a folder without one is no checkpoint, and it holds a SHA-256 of itself, so that a flipped
byte is noticed in whichever file it is.
"""

import hashlib
import json
from pathlib import Path

from soar_mega.checkpoints.run_folder import write_durably

MANIFEST = "manifest.json"

Facts = dict[str, int | str]  # {"size": bytes, "sha256": hexadecimal}


def write_manifest(folder: Path, known: dict[str, Facts]) -> None:
    """Writes the manifest of a folder that is otherwise finished.

    Args:
        known: files that were hashed when they were written, by name; the others are read.
    """
    names = sorted(file.name for file in folder.iterdir())
    lost = sorted(known.keys() - set(names))
    if lost:
        raise OSError(f"{folder / lost[0]} was written and is gone")
    files = {name: known[name] if name in known else file_facts(folder / name) for name in names}
    write_durably(folder / MANIFEST, _text(files))


def file_facts(path: Path) -> Facts:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one line per file; nothing for a good one.

    Args:
        part, parts: check the part-th share of its files; the shares hold about the same number of bytes.
    """
    if not folder.is_dir():
        return [f"{folder} is missing"]
    try:
        files = _read(folder / MANIFEST)
    except (OSError, ValueError) as error:
        return [str(error)]
    by_size = sorted(files, key=lambda name: (-int(files[name]["size"]), name))
    found = (_problem(folder / name, files[name]) for name in by_size[part::parts])
    return [said for said in found if said is not None]


def _problem(path: Path, expected: Facts) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path} has {size} bytes instead of {expected['size']}"
        if file_facts(path) != expected:
            return f"{path} is damaged: its SHA-256 is not the one of {MANIFEST}"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def _read(path: Path) -> dict[str, Facts]:
    if not path.exists():
        raise ValueError(f"{path} is missing: the save was not finished, or the folder was changed since")
    content = path.read_bytes()
    try:
        files: dict[str, Facts] = json.loads(content)["files"]
        intact = _text(files).encode() == content
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one it names")
    return files


def _text(files: dict[str, Facts]) -> str:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1, sort_keys=True) + "\n"
