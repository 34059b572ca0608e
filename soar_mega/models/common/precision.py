"""In which precision a layer runs: `run_layer` is the one place where a layer is called.

FP8 is for the linears that work on tokens, which are Transformer Engine's; embedders, modulation, norms, attention and
the output stay in model.dtype.

Most recipes take a scale from the tensor that is cast and keep nothing. Their context is entered with each layer,
inside of what recomputation runs a second time and of what a CUDA graph captures: both compute the same. `delayed`
takes scales from what was cast before, and its histories move on where the context is left. So it lies around all
layers, also around recomputation, which must be Transformer Engine's own: that one puts back the histories which the
first run saw.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.models.common import recompute
from soar_mega.models.common.layout import is_sequence_parallel
from soar_mega.models.common.sequence_shards import BLOCKWISE_TILE, MXFP8_TILE, TILE
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.te_layers import CastOnce

INPUT = 0  # the place of a linear's input among what has an amax


def run_layer(layer: Callable[..., Any], number: int, config: TransformerConfig, *inputs: Any) -> Any:
    """`layer(*inputs)`, the layer of that number in the whole model, in its precision."""
    with nullcontext() if _is_delayed(config) else get_fp8_context(config, number):
        return layer(*inputs)


def recompute_layer(layer: torch.nn.Module, number: int, config: TransformerConfig, *inputs: Any) -> Any:
    """The same, keeping no more than inputs and results for the backward."""
    if not _is_delayed(config) or not torch.is_grad_enabled():
        return recompute.run(run_layer, layer, number, config, *inputs)
    from transformer_engine.pytorch.distributed import checkpoint

    return checkpoint(layer, *inputs, use_reentrant=False)


@contextmanager
def around_layers(config: TransformerConfig) -> Iterator[None]:
    """Goes around all layers of a forward. One without gradients leaves no trace in the histories of `delayed`."""
    if not _is_delayed(config):
        yield
        return
    with get_fp8_context(config):
        yield
    if not torch.is_grad_enabled():
        _forget_inputs()


def cast_weights(modules: Iterable[torch.nn.Module], number: int, config: TransformerConfig) -> None:
    """Make the FP8 forms of weights that have changed now, and not in the layer's next forward: before a CUDA graph."""
    changed = [module for module in modules if isinstance(module, CastOnce) and module.has_changed]
    if changed:
        with get_fp8_context(config, number):
            for module in changed:
                module.cast_weight()


def check_fp8_sizes(sizes: Sizes, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise a ValueError unless FP8's matrix products can be as wide as this model on a tensor-parallel rank."""
    if model.fp8 is None:
        return
    hidden, tensor = sizes.hidden_size, parallel.tensor_model_parallel_size
    tile = MXFP8_TILE if model.fp8_recipe == "mxfp8" else TILE
    if hidden // tensor % tile:
        raise ValueError(
            f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe} needs a multiple of {tile} features on "
            f"each tensor-parallel rank, and hidden size {hidden} over parallel.tensor_model_parallel_size={tensor} "
            f"leaves {hidden // tensor}: leave model.fp8 out, or choose another size of tensor parallelism"
        )
    if model.fp8_recipe == "blockwise" and is_sequence_parallel(parallel) and hidden % BLOCKWISE_TILE:
        raise ValueError(
            f"model.fp8_recipe=blockwise gathers blocks of {BLOCKWISE_TILE} features under sequence parallelism, which "
            f"hidden size {hidden} is no multiple of: set model.fp8_recipe=tensorwise, or "
            "parallel.sequence_parallel=false"
        )


def _is_delayed(config: TransformerConfig) -> bool:
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _forget_inputs() -> None:
    """Take out of the histories what has been seen since they moved on; weights are seen once per step, and stay."""
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager

    for key, amaxes in FP8GlobalStateManager.global_amax_buffer.items():
        if FP8GlobalStateManager.split_key_in_buffer(key)[0]:  # of forwards
            for amax in amaxes:
                amax[INPUT].zero_()
