"""From any layout into a diffusers transformer folder, one tensor at a time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.convert.checks import diffusers_shapes
from soar_mega.convert.safetensors_reader import DTYPES
from soar_mega.convert.safetensors_writer import FolderWriter, Planned, Writer
from soar_mega.distributed import device
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.tensor_map import Entry, parts
from soar_mega.models.common.transformer import Transformer

MAX_SHARD_SIZE = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class WeightFiles:
    """How a transformer folder keeps its weights.

    Attributes:
        max_shard_size: bytes of tensors in one file.
        variant: part of the names of the files, such as fp16; diffusers loads it when asked for by this name.
        dtype: of the numbers; None leaves them as they are.
    """

    max_shard_size: int = MAX_SHARD_SIZE
    variant: str = ""
    dtype: torch.dtype | None = None

    @property
    def dtype_name(self) -> str | None:
        """fp32, bf16 or fp16."""
        return None if self.dtype is None else NAMES[self.dtype]


AS_STORED = WeightFiles()


def write_transformer(
    model: Transformer | ModelChunks,
    folder: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    files: WeightFiles = AS_STORED,
) -> None:
    """Write config.json and safetensors, to be loaded by diffusers. A collective over the whole world.

    Args:
        folder: the transformer folder, new or empty; made by rank 0, which does all the writing.
        tensors: as for `write_weights`.

    Raises:
        OSError: rank 0 could not write; raised on every rank.
    """
    config, shapes = model.sizes.to_diffusers(), diffusers_shapes(model.sizes)
    dtypes = dict.fromkeys(shapes, model.config.params_dtype)

    def start() -> FolderWriter:
        return start_folder(Path(folder), config, shapes, dtypes, files)

    write_weights(model, start, folder, tensors, files.dtype)


def start_folder(
    folder: Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    files: WeightFiles,
) -> FolderWriter:
    """Make a transformer folder with its config.json, whose tensors are to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    plan = [Planned(key, shape, files.dtype or dtypes[key]) for key, shape in shapes.items()]
    return FolderWriter(folder, plan, files.max_shard_size, files.variant)


def write_weights(
    model: Transformer | ModelChunks,
    start: Callable[[], Writer],
    place: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give all tensors of a model to a writer under diffusers' names. A collective over the whole world.

    Beside its part of the model a rank holds one whole tensor at a time, and a shard or a third (of q, k, v) of it.

    Args:
        start: makes the writer, on rank 0 alone; place: where that writes, for messages.
        tensors: this rank's shard by global name, to be written in place of the model's own tensor (an EMA). Asked for
            each in turn, in the same order by all data-parallel ranks, so that it may be collective over them.
        dtype: of the numbers that the writer keeps; None is the model's.

    Raises:
        OSError: rank 0 could not write; raised on every rank.
        ValueError: a number that the type to be written cannot hold; likewise.
    """
    table = model.sizes.family.entries(model.sizes)
    local = named_tensors(model)
    owners = _owners(local)
    # rounded by the writer alone
    sent = torch.float32 if dtype == torch.float32 else model.config.params_dtype
    failure: OSError | ValueError | None = None
    writer: Writer | None = None
    if dist.get_rank() == 0:
        try:
            writer = start()
        except OSError as error:
            failure = error
    heads = model.sizes.num_attention_heads
    for _, same_keys in groupby(table, key=lambda entry: entry.keys):
        group = list(same_keys)
        collected = [
            _collect(entry, model, owners[entry.name], local, tensors or local.__getitem__, sent)
            for entry in group
        ]
        whole = [full for full in collected if full is not None]
        if whole and writer is not None and failure is None:
            try:
                _write(writer, group[0], whole, heads)
            except (OSError, ValueError) as error:
                failure = error  # the peers still send: take part until the end
        del collected, whole  # before the next one comes
    _finish(writer, failure, place)


def _write(writer: Writer, entry: Entry, found: list[Tensor], heads: int) -> None:
    """The keys of an entry; `found`: our tensor, or the ones that hold the columns of its one key."""
    if entry.columns is not None:
        writer.write(entry.keys[0], torch.cat(found, dim=1))
        return
    for key, part in zip(entry.keys, parts(found[0], entry, heads), strict=True):
        writer.write(key, part.reshape(entry.shape))


def _collect(
    entry: Entry,
    model: Transformer | ModelChunks,
    owner: int,
    local: dict[str, Tensor],
    tensors: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Tensor | None:
    """The whole tensor on rank 0, None elsewhere."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    full: Tensor | None = None
    if pipeline.rank() == owner:
        # all data-parallel ranks take part; what is kept on the CPU must leave it, where NCCL takes nothing
        full = tensors(entry.name).detach().to(device(), dtype)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return None
    if full is not None:
        full = full_tensor(full, like=local[entry.name])
    if owner == 0 or parallel_state.get_tensor_model_parallel_rank() != 0:
        return full if dist.get_rank() == 0 else None
    if pipeline.rank() == owner:
        assert full is not None
        dist.send(full.contiguous(), group=pipeline, group_dst=0)
        return None
    if pipeline.rank() != 0:
        return None
    rows = entry.shape[0] * len(entry.keys)
    full = torch.empty(rows, *entry.shape[1:], dtype=dtype, device=device())
    dist.recv(full, group=pipeline, group_src=owner)
    return full


def _owners(local: dict[str, Tensor]) -> dict[str, int]:
    """By name: the pipeline rank that holds a tensor."""
    group = parallel_state.get_pipeline_model_parallel_group()
    held: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(held, list(local), group=group)
    return {name: rank for rank, names in enumerate(held) for name in names}


def _finish(writer: Writer | None, failure: OSError | ValueError | None, folder: str | Path) -> None:
    def finish() -> None:
        if failure is not None:
            raise failure
        assert writer is not None
        writer.close()

    try:
        on_rank_zero(finish, folder)
    finally:
        if writer is not None:
            writer.abandon()


def on_rank_zero(action: Callable[[], None], path: str | Path) -> None:
    """Let rank 0 do `action`; its OSError, or a ValueError, is raised on every rank. Waits for it everywhere."""
    failure: OSError | ValueError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, ValueError) as error:
            failure = error
    told = [None if failure is None else (isinstance(failure, OSError), str(failure))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        is_os_error, message = told[0]
        raise (OSError if is_os_error else ValueError)(f"rank 0 could not write {path}: {message}")
