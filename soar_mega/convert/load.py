"""From a diffusers folder into any layout: each rank reads its own rows and columns."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert.checks import check_shapes, diffusers_shapes, listed
from soar_mega.convert.finite_tensors import is_finite
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.distributed import start_world
from soar_mega.models.common.build import build_model
from soar_mega.models.common.chunks import ModelChunks
from soar_mega.models.common.gather import partition_dim
from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.tensor_map import Entry, parts
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import config_file, read_sizes


def load_diffusers(folder: str | Path, dtype: str = "fp32") -> Transformer:
    """A pipeline's transformer as a single-process module:

    model(latents [B, C, H, W], timesteps [B] in 0..1000, text [B, S, D], pooled [B, P], guidance=None) -> velocity
    [B, C, H, W]; guidance [B] for a guidance-distilled model.

    Starts a process world of one where there is none.

    Args:
        folder: a diffusers pipeline folder or its transformer folder.
        dtype: fp32 or bf16.

    Raises:
        ValueError: not a transformer of a known family, or its weights do not fit its configuration.
    """
    config = read_sizes(folder)
    parallel = ParallelConfig()
    start_world(parallel)
    model = build_model(config, ModelConfig(dtype=dtype), parallel)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: Transformer | ModelChunks, folder: str | Path) -> None:
    """Fill this rank's part of a model from a diffusers folder, each tensor straight into its place.

    Raises:
        ValueError: keys that are missing, unknown or of another shape, each with its file, or weights that are not
            finite; on every rank.
    """
    path = config_file(Path(folder)).parent
    table = model.sizes.family.entries(model.sizes)
    local = named_tensors(model)
    with Reader(path) as reader:
        check_shapes(diffusers_shapes(model.sizes), reader, "config.json")
        for entry in table:
            if entry.name in local:
                _fill(local[entry.name], entry, reader, model.sizes.num_attention_heads)
        broken = [
            f"{key} in {reader.files[key].name}"
            for entry in table
            if entry.name in local and not is_finite(local[entry.name])
            for key in entry.keys
        ]
    assert not set(local) - {entry.name for entry in table}
    refuse_broken(broken, path)


@torch.no_grad()
def exact_shards(
    model: Transformer | ModelChunks, folder: str | Path, names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of those tensors that a diffusers folder holds in float32, by global name and in float32.

    One at a time, in the same order on all ranks. The folder is one that `load_weights` has read.

    Args:
        model: of this rank's shapes.
        names: what is wanted.
    """
    local = named_tensors(model)
    with Reader(config_file(Path(folder)).parent) as reader:
        for entry in model.sizes.family.entries(model.sizes):
            if entry.name not in names or entry.name not in local:
                continue
            if all(reader.dtype(key) == torch.float32 for key in entry.keys):
                like = local[entry.name]
                shard = torch.empty(like.shape)
                _fill(shard, entry, reader, model.sizes.num_attention_heads, like)
                yield entry.name, shard


def refuse_broken(broken: list[str], folder: Path) -> None:
    """ValueError on all ranks where any of them holds NaN: its pictures would be black. Collective.

    Args:
        broken: names of this rank's tensors with NaN or infinite numbers.
    """
    gathered = [broken]
    if dist.is_initialized():
        gathered = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, broken)
    names = list(dict.fromkeys(name for part in gathered for name in part))
    if names:
        raise ValueError(f"the weights in {folder} hold NaN or infinite numbers: {listed(names)}")


def _fill(target: Tensor, entry: Entry, reader: Reader, heads: int, like: Tensor | None = None) -> None:
    """Read this rank's rows or columns of a tensor; `like` is the parameter that says which, if not the target."""
    dim, group = partition_dim(target if like is None else like), tensor_parallel_group()
    cut: tuple[int, ...] = ()
    if dim is not None and group is not None and group.size() > 1:
        width = entry.shape[dim] // group.size()
        start = width * group.rank() + (entry.columns.start if entry.columns is not None else 0)
        cut = dim, start, start + width
        heads //= group.size()
    elif entry.columns is not None:
        cut = 1, entry.columns.start, entry.columns.stop
    for key, place in zip(entry.keys, parts(target, entry, heads), strict=True):
        place.copy_(reader.read(key, *cut).reshape(place.shape))
