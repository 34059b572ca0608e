"""What the text encoders make of a set of prompts, made once and kept on disk.

A set lies in a folder of its own, whose name says what it depends on: the prompts, the encoders, the length and the
type. It has files of a few hundred prompts each, written one after another, so that memory holds those of one file,
and a start that was killed goes on where it stopped.

    <prompts folder>/0f3a9c.../00000.safetensors     text, pooled: rows of the first prompts; and of the empty prompt
"""

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from soar_mega.data.encoder_facts import encoder_facts
from soar_mega.data.fingerprints import fingerprints
from soar_mega.data.prompts import EncodedPrompts, prompt_encoders
from soar_mega.models.common.conditions import Conditions
from soar_mega.outputs import in_place_of, sync

log = logging.getLogger(__name__)

PER_FILE = 512  # prompts: a gigabyte of SD3's
MARK = b"soar-mega prompts"
FORMAT = 1


class PromptCache:
    """The folder of a set of prompts.

    Args:
        parent: where sets lie.
        name: of this one, as `cache_name` makes it.
        prompts: how many it has.
    """

    def __init__(self, parent: str | Path, name: str, prompts: int) -> None:
        self._folder = Path(parent, name)
        self._prompts = prompts

    def fill(
        self,
        pipeline_dir: str | Path,
        prompts: list[str],
        dtype: torch.dtype,
        max_sequence_length: int | None,
    ) -> None:
        """Encode what is not there yet, on this process's device; on one process.

        Raises:
            ValueError: an encoder cannot be loaded, or the folder holds what this program did not write.
            OSError: it cannot be written.
        """
        absent = [n for n in range(0, self._prompts, PER_FILE) if not self._file(n).exists()]
        if not absent:
            return
        log.info("encoding %d prompts into %s", self._prompts, self._folder)
        with prompt_encoders(pipeline_dir, dtype, max_sequence_length) as encode:
            for first in absent:
                self._write(first, encode(prompts[first : first + PER_FILE]))

    def rows(self, index: Tensor) -> Conditions:
        """Those of the prompts `index` [K] int64, on the CPU. ValueError: a file is missing or damaged."""
        text, pooled = zip(*(self._row(i) for i in index.tolist()), strict=True)
        return Conditions(torch.stack(text), torch.stack(pooled))

    def empty(self) -> Conditions:
        """That of the empty prompt, [1]."""
        text, pooled = self._read(0, "empty_", 0)
        return Conditions(text[None], pooled[None])

    def _write(self, first: int, encoded: EncodedPrompts) -> None:
        tensors = {
            "text": encoded.conditions.text,
            "pooled": encoded.conditions.pooled,
            "empty_text": encoded.empty.text,
            "empty_pooled": encoded.empty.pooled,
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with in_place_of(self._file(first), MARK) as new:
            # not save_file: what that writes only its owner can read, whatever the umask
            new.write_bytes(save(tensors, {"about": MARK.decode()}))
            sync(new)

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        return self._read(index, "", index % PER_FILE)

    def _read(self, index: int, prefix: str, row: int) -> tuple[Tensor, Tensor]:
        file = self._file(index)
        try:
            with safe_open(file, framework="pt") as opened:
                text, pooled = (opened.get_slice(f"{prefix}{name}")[row] for name in ("text", "pooled"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{file} is missing: data.prompt_cache must be a folder that all nodes see"
            ) from error
        except (OSError, SafetensorError, IndexError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): remove it, and the next start makes it again"
            ) from error
        return text, pooled

    def _file(self, index: int) -> Path:
        return self._folder / f"{index // PER_FILE:05d}.safetensors"


def cache_name(
    pipeline_dir: str | Path, prompts: list[str], dtype: torch.dtype, max_sequence_length: int | None
) -> str:
    """A name for what `encode_prompts` makes of these arguments, from the bytes that it depends on.

    ValueError: a part of the pipeline folder is missing or damaged.
    """
    folder = Path(pipeline_dir)
    facts = encoder_facts(folder, max_sequence_length)
    encoders = {part: value for part, value in fingerprints(folder).items() if part != "vae"}
    said = [
        FORMAT,
        prompts,
        encoders,
        facts.text_shape,
        facts.pooled_size,
        facts.max_sequence_length,
        str(dtype),
        PER_FILE,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]
