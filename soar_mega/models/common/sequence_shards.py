"""Where the tokens of a stream are: cut over CP, and each part over TP under sequence parallelism.

The parts lie in rank order, padding at the end of the stream. Outside attention every rank works on its own tokens. In
attention the ranks of a CP group have all tokens and a part of the heads each (Ulysses, arXiv 2309.14509).
"""

import copy
import math
from collections.abc import Callable

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from soar_mega.models.common.groups import context_parallel_group, tensor_parallel_group

TILE = 16  # tokens of a rank that FP8's matrix products ask for a multiple of
MXFP8_TILE = 32
BLOCKWISE_TILE = 128  # of those that a rank casts before they are gathered


def sequence_shards(config: TransformerConfig) -> int:
    """How many ranks a stream is cut over."""
    tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return tensor * config.context_parallel_size


def padded_length(length: int, config: TransformerConfig) -> int:
    """Tokens of a stream between the embedders and the output; more than it has while it is cut, or FP8 is on."""
    shards = sequence_shards(config)
    if config.fp8:
        multiple = shards * fp8_tile(config)
    else:
        multiple = cut_multiple(shards)
    return -(-length // multiple) * multiple


def cut_multiple(shards: int) -> int:
    """What the length of a stream that is cut over so many ranks is padded to a multiple of."""
    return math.lcm(shards, TILE) if shards > 1 else 1


def fp8_tile(config: TransformerConfig) -> int:
    """What a rank's number of tokens must be a multiple of in FP8, at any batch size."""
    if config.fp8_recipe == "mxfp8":
        return MXFP8_TILE
    return BLOCKWISE_TILE if config.fp8_recipe == "blockwise" and config.sequence_parallel else TILE


def pad(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """[S, B, F] -> [padded length, B, F]; the same tensor where nothing is missing."""
    missing = padded_length(len(hidden), config) - len(hidden)
    return F.pad(hidden, (0, 0, 0, 0, 0, missing)) if missing else hidden


def scatter(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """A stream [S, B, H] that all ranks have -> this rank's tokens.

    Its gradient is complete over TP, and over CP the share of this rank's tokens: DDP adds up those of parameters.
    """
    hidden = pad(hidden, config)
    group = context_parallel_group()
    if config.context_parallel_size > 1:
        assert group is not None
        hidden = hidden.chunk(group.size())[group.rank()].clone()  # a view would keep the whole stream alive
    if config.sequence_parallel:
        hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=tensor_parallel_group())
    return hidden


def gather(shard: Tensor, length: int, config: TransformerConfig) -> Tensor:
    """This rank's tokens -> the stream [length, B, F] on every rank.

    Every rank of a TP x CP group goes on to compute the same: the gradient is cut, not added up.
    """
    if config.sequence_parallel:
        shard = _gather(shard, tensor_parallel_group())
    if config.context_parallel_size > 1:
        shard = _gather(shard, context_parallel_group())
    return shard[:length] if len(shard) > length else shard


def tokens_to_heads(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """This CP rank's tokens [S / CP, B, F], F head by head -> all tokens of its heads [S, B, F / CP]."""
    return _exchange(tensor_parallel.all_to_all_sp2hp, hidden, config)


def heads_to_tokens(context: Tensor, config: TransformerConfig) -> Tensor:
    """All tokens of this CP rank's heads [S, B, F / CP] -> its tokens [S / CP, B, F]."""
    return _exchange(tensor_parallel.all_to_all_hp2sp, context, config)


def attention_config(config: TransformerConfig) -> TransformerConfig:
    """A copy for attention itself, which sees whole sequences and only this CP rank's heads."""
    config = copy.copy(config)
    config.num_attention_heads //= config.context_parallel_size
    config.num_query_groups = config.num_attention_heads
    config.context_parallel_size = 1  # or Transformer Engine would exchange keys and values once more
    return config


def _exchange(all_to_all: Callable[..., Tensor], x: Tensor, config: TransformerConfig) -> Tensor:
    """One of megatron's exchanges, which return [S B, F], over the CP ranks."""
    if config.context_parallel_size == 1:
        return x
    return all_to_all(x, group=context_parallel_group()).unflatten(0, (-1, x.shape[1]))


def _gather(shard: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return tensor_parallel.gather_from_sequence_parallel_region(
        shard, tensor_parallel_output_grad=False, group=group
    )
