"""Makes the part of a model that belongs to a rank."""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import device
from soar_mega.kernels.qk_norm_rope import EPSILON
from soar_mega.models.common.initialize import initialize
from soar_mega.models.common.layout import check_layout, is_sequence_parallel
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.pipeline_layout import chunks_per_rank, stage_layers
from soar_mega.models.common.precision import check_fp8_sizes
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.specs import get_provider, layer_submodules
from soar_mega.models.common.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(sizes: Sizes, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron's configuration of this model."""
    if model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={model.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    is_interleaved = chunks_per_rank(parallel) > 1
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        kv_channels=sizes.attention_head_dim,
        ffn_hidden_size=4 * sizes.hidden_size,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        normalization="RMSNorm",  # of queries and keys; adaLN brings its own
        layernorm_epsilon=EPSILON,
        qk_layernorm=sizes.qk_norm is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=DTYPES[model.dtype],
        pipeline_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bf16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=chunks_per_rank(parallel) if is_interleaved else None,
        # two messages between the same two ranks in one batch are mixed up (PP 2), silently on gloo
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        batch_p2p_sync=False,  # old versions of torch need it; it has the host wait for all messages
        sequence_parallel=is_sequence_parallel(parallel),
        # megatron's own layers are made on the device in context; Transformer Engine's would stay on the CPU
        use_cpu_initialization=model.transformer_impl == "local",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        fp8=model.fp8,
        fp8_recipe=model.fp8_recipe,
        first_last_layers_bf16=model.first_last_layers_bf16,
        num_layers_at_start_in_bf16=model.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=model.num_layers_at_end_in_bf16,
        cuda_graph_scope=[],
    )


def build_model(
    sizes: Sizes,
    model: ModelConfig,
    parallel: ParallelConfig,
    chunk: int = 0,
    meta: bool = False,
    seed: int = 0,
) -> Transformer:
    """One chunk of the part of a model that belongs to this rank; without an interleaved pipeline, all of it.

    With model.init=random the weights are keyed by `seed`, equal at every layout; else they are NaN until loaded.

    Args:
        chunk: its number among the rank's.
        meta: build on the meta device, without memory; needs no process world.

    Raises:
        ValueError: a layout, a kind of layers or a precision that is not possible.
    """
    check_layout(sizes, parallel)
    granularity = model.recompute_granularity
    if granularity not in ("none", "selective", "full"):
        raise ValueError(
            f"model.recompute_granularity={granularity!r} is unknown: choose none, selective or full"
        )
    provider = get_provider(model)
    check_fp8_sizes(sizes, model, parallel)
    if meta:  # Transformer Engine's layers would take memory; torch's have the same parameters
        model = replace(
            model,
            transformer_impl="local",
            attention_backend="sdpa",
            fp8=None,
            first_last_layers_bf16=False,
        )
        provider = get_provider(model)
    ranks = parallel.pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank() if ranks > 1 else 0
    stages = stage_layers(sizes, parallel)
    stage = chunk * ranks + rank
    with torch.device("meta" if meta else device()):
        part = sizes.family.transformer()(
            sizes,
            transformer_config(sizes, model, parallel),
            layer_submodules(provider, model.fused_kernels, model.made_again),
            stages[stage],
            pre_process=stage == 0,
            post_process=stage == len(stages) - 1,
            recompute_every=model.recompute_every if granularity == "full" else 0,
        )
    if not meta:
        if model.init == "random":
            initialize(part, seed)
        else:
            with torch.no_grad():
                for tensor in named_tensors(part).values():
                    tensor.fill_(float("nan"))
    return part
