"""From any layout into a diffusers transformer folder, one tensor at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from soar_mega.convert.safetensors_file import Writer
from soar_mega.distributed import device
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.gather import full_tensor
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.tensor_map import Entry, parts
from soar_mega.models.common.transformer import Transformer

MAX_SHARD_SIZE = 5 * 10**9


def write_transformer(
    model: Transformer | ModelChunks,
    folder: str | Path,
    tensors: Callable[[str], Tensor] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write config.json and safetensors, to be loaded by diffusers. A collective over the whole world.

    Beside its part of the model a rank holds one whole tensor at a time, and a shard or a third (of q, k, v) of it.

    Args:
        folder: the transformer folder, new or empty; made by rank 0, which does all the writing.
        tensors: this rank's shard by global name, to be written in place of the model's own tensor (an EMA). Asked for
            each in turn, in the same order by all data-parallel ranks, so that it may be collective over them.
        max_shard_size: bytes of tensors in one file.

    Raises:
        OSError: rank 0 could not write; raised on every rank.
    """
    table = model.sizes.family.entries(model.sizes)
    local = named_tensors(model)
    owners = _owners(local)
    failure: OSError | None = None
    writer: Writer | None = None
    if dist.get_rank() == 0:
        try:
            writer = _start_folder(model, table, Path(folder), max_shard_size)
        except OSError as error:
            failure = error
    heads = model.sizes.num_attention_heads
    for entry in table:
        full = _collect(entry, model, owners[entry.name], local, tensors or local.__getitem__)
        if full is not None and writer is not None and failure is None:
            try:
                _write(writer, entry, full, heads)
            except OSError as error:
                failure = error  # the peers still send: take part until the end
        del full  # before the next one comes
    _finish(writer, failure, folder)


def _start_folder(
    model: Transformer | ModelChunks, table: list[Entry], folder: Path, max_shard_size: int
) -> Writer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.sizes.to_diffusers(), indent=2) + "\n")
    plan = [(key, entry.shape) for entry in table for key in entry.keys]
    return Writer(folder, plan, model.config.params_dtype, max_shard_size)


def _write(writer: Writer, entry: Entry, full: Tensor, heads: int) -> None:
    for key, part in zip(entry.keys, parts(full, entry, heads), strict=True):
        writer.write(key, part.reshape(entry.shape))


def _collect(
    entry: Entry,
    model: Transformer | ModelChunks,
    owner: int,
    local: dict[str, Tensor],
    tensors: Callable[[str], Tensor],
) -> Tensor | None:
    """The whole tensor on rank 0, None elsewhere."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    full: Tensor | None = None
    if pipeline.rank() == owner:
        # all data-parallel ranks take part; what is kept on the CPU must leave it, where NCCL takes nothing
        full = tensors(entry.name).detach().to(device(), model.config.params_dtype)
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
    full = torch.empty(rows, *entry.shape[1:], dtype=model.config.params_dtype, device=device())
    dist.recv(full, group=pipeline, group_src=owner)
    return full


def _owners(local: dict[str, Tensor]) -> dict[str, int]:
    """By name: the pipeline rank that holds a tensor."""
    group = parallel_state.get_pipeline_model_parallel_group()
    held: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(held, list(local), group=group)
    return {name: rank for rank, names in enumerate(held) for name in names}


def _finish(writer: Writer | None, failure: OSError | None, folder: str | Path) -> None:
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
