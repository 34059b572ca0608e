"""Sources that are not files of images or tars on this machine: each is copied into a tar first.

These are tars behind urls (read by fsspec, as s3://bucket/0.tar) and behind commands (pipe:COMMAND, as webdataset has
them), and parquet files as Hugging Face's datasets has them.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand

from soar_mega.data.caption_lists import CAPTION_KEYS, PUBLISHED_KEY
from soar_mega.data.captions import WEIGHTS_KEY
from soar_mega.data.picture_kinds import IMAGE_SUFFIXES

PIPE = "pipe:"
SHELL = ("bash", "-o", "pipefail", "-c")  # in `aws ... | zstd -d` the first may fail
PARQUET_FOLDERS = (".", "data")  # of a data set of Hugging Face's


def expand(sources: Sequence[str]) -> list[str]:
    """Sources one by one: braces as in s3://b/{000..031}.tar are many, and so is a folder of parquet files."""
    result: list[str] = []
    for source in sources:
        is_pattern = "{" in source and not Path(source).exists()
        for one in braceexpand(source) if is_pattern else [source]:
            result += _parquet_files(Path(one)) or [one]
    return result


def is_remote(source: str) -> bool:
    """Whether it is no path of this machine."""
    return source.startswith(PIPE) or "://" in source


def is_copied(source: str) -> bool:
    """Whether a source is copied before it can be read."""
    return is_remote(source) or source.endswith(".parquet")


def copy_of(source: str, folder: Path) -> Path:
    """Where the copy of a source is, or will be; another place when a local file has changed."""
    state = "" if is_remote(source) else str(Path(source).stat().st_mtime_ns)
    return folder / f"{hashlib.sha256(f'{source} {state}'.encode()).hexdigest()[:16]}.tar"


def fetch(source: str, path: Path) -> None:
    """Copy a source to `path`, which is there only when it is complete.

    ValueError: it cannot be read, or a package is missing.
    """
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        if source.startswith(PIPE):
            _run(source, file)
        elif is_remote(source):
            _download(source, file)
        else:
            _repack(Path(source), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parquet_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(str(path) for name in PARQUET_FOLDERS for path in (folder / name).glob("*.parquet"))


def _run(source: str, file: BinaryIO) -> None:
    command = source.removeprefix(PIPE)
    done = subprocess.run([*SHELL, command], stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()[-300:]
        raise ValueError(f"{source} ended with code {done.returncode}: {words}")


def _download(source: str, file: BinaryIO) -> None:
    import fsspec

    try:
        with fsspec.open(source, "rb") as remote:
            shutil.copyfileobj(remote, file, 2**20)
    except ImportError as error:  # of the package for this kind of url
        raise ValueError(f"{source} cannot be read: {error}") from error
    except Exception as error:  # each kind of url has errors of its own
        raise ValueError(f"{source} cannot be read: {error!r}") from error


def _repack(source: Path, file: BinaryIO) -> None:
    """The rows of a parquet file as samples of a tar, one after the other."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{source} cannot be read without the package pyarrow: pip install pyarrow"
        ) from error
    try:
        table = parquet.ParquetFile(source)
        columns = set(table.schema_arrow.names)
        caption = next((key for key in (*CAPTION_KEYS, PUBLISHED_KEY) if key in columns), None)
        if "image" not in columns or caption is None:
            raise ValueError(f"it has the columns {', '.join(sorted(columns))}: image and text are expected")
        with tarfile.open(fileobj=file, mode="w") as tar:
            number = 0
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    _add_row(tar, f"{number:09d}", row, caption)
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read as parquet: {error}") from error


def _add_row(tar: tarfile.TarFile, key: str, row: dict[str, Any], caption: str) -> None:
    image = row["image"]
    content = image.get("bytes") if isinstance(image, dict) else image
    # its kind is told by its content; a row without an image is one that cannot be read
    _add(tar, f"{key}{IMAGE_SUFFIXES[0]}", content if isinstance(content, bytes) else b"")
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    said = {CAPTION_KEYS[0]: row[caption], WEIGHTS_KEY: row.get(WEIGHTS_KEY)}
    _add(tar, f"{key}.json", json.dumps({**numbers, **said}, default=str).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
