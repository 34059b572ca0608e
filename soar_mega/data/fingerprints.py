"""Which encoders and tokenizers a pipeline folder holds, told apart without loading them.

Reading all of a 10 GB encoder at every start would take longer than the start: of each tensor its name, type and shape
and blocks of its bytes are taken, which any training of the encoder changes. In which files tensors lie is not seen.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from soar_mega.data.encoder_facts import read_config

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SAMPLES, SAMPLE_BYTES = 3, 1024  # of a tensor
FILE_SAMPLES, FILE_SAMPLE_BYTES = 16, 4096  # of a file whose tensors are not known
VERSION_KEYS = ("_name_or_path", "_diffusers_version", "transformers_version")
VOCABULARIES = ("vocab.json", "merges.txt", "spiece.model")
TOKENIZER_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "do_lower_case")


def fingerprints(pipeline_dir: Path) -> dict[str, str]:
    """SHA-256 of each encoder and each tokenizer whose files are in the folder.

    ValueError: a file is damaged, by name.
    """
    result = {}
    for part in ENCODERS:
        files = _weight_files(pipeline_dir / part)
        if files and (pipeline_dir / part / "config.json").is_file():
            result[part] = _hash(_encoder(pipeline_dir / part, files))
    for part in TOKENIZERS:
        if (pipeline_dir / part / "tokenizer_config.json").is_file():
            result[part] = _hash(_tokenizer(pipeline_dir / part))
    return result


def _hash(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _encoder(folder: Path, files: list[Path]) -> Iterator[bytes]:
    config = {k: v for k, v in read_config(folder / "config.json").items() if k not in VERSION_KEYS}
    yield json.dumps(config, sort_keys=True).encode()
    tensors: dict[str, tuple[str, BinaryIO, int, int]] = {}
    with contextlib.ExitStack() as stack:
        for path in files:
            # once, for all of its tensors: every rank of a run does this, and an encoder has hundreds of them
            file: BinaryIO = stack.enter_context(open(path, "rb"))
            if path.suffix == ".safetensors":
                tensors.update(_tensors(path, file))
            else:
                yield path.name.encode()
                yield from _blocks(file, 0, path.stat().st_size, FILE_SAMPLES, FILE_SAMPLE_BYTES)
        for name in sorted(tensors):
            kind, file, start, end = tensors[name]
            yield f"{name} {kind}".encode()
            yield from _blocks(file, start, end, SAMPLES, SAMPLE_BYTES)


def _tokenizer(folder: Path) -> Iterator[bytes]:
    """Its vocabulary and the settings that change tokens; not what else a version of transformers writes."""
    config = read_config(folder / "tokenizer_config.json")
    settings = {key: _content(config.get(key)) for key in TOKENIZER_KEYS}
    yield json.dumps(settings, sort_keys=True).encode()
    files = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    for path in files or [folder / "tokenizer.json"]:
        yield path.name.encode()
        yield path.read_bytes() if path.is_file() else b""


def _content(value: Any) -> Any:
    """A special token is written as its text or as an object around it."""
    return value.get("content") if isinstance(value, dict) else value


def _tensors(path: Path, file: BinaryIO) -> Iterator[tuple[str, tuple[str, BinaryIO, int, int]]]:
    """(name, (type and shape, file, first byte, last byte)) of the tensors of a safetensors file."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, (f"{entry['dtype']} {entry['shape']}", file, start, end)
    except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _blocks(file: BinaryIO, start: int, end: int, count: int, size: int) -> Iterator[bytes]:
    """`count` blocks of the bytes start..end of a file, the first and the last among them, and how many these are."""
    yield str(end - start).encode()
    for i in range(count):
        file.seek(start + i * max(0, end - start - size) // (count - 1))
        yield file.read(min(size, end - start))


def _weight_files(folder: Path) -> list[Path]:
    """The weights that loading takes: safetensors before .bin, and no fp16 or other variants."""
    for pattern in ("*.safetensors", "*.bin"):
        plain = [path for path in sorted(folder.glob(pattern)) if path.name.count(".") == 1]
        if plain:
            return plain
    return sorted(folder.glob("*.safetensors"))
