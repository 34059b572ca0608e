"""What a model weighs, and what a rank of it weighs at each layout."""

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.models.common.build import build_model
from soar_mega.models.common.gather import full_shape, partition_dim
from soar_mega.models.common.layout import check_layout, divisors
from soar_mega.models.common.pipeline_layout import rank_layers
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import find_sizes


def meta_model(config: Sizes) -> Transformer:
    """The whole model without memory; needs no process world."""
    return build_model(config, ModelConfig(), ParallelConfig(), meta=True)


def parameters_per_rank(model: Transformer, parallel: ParallelConfig) -> list[int]:
    """Parameters on one tensor-parallel rank of each pipeline rank; the position table is no parameter."""
    tensor, ranks = parallel.tensor_model_parallel_size, range(parallel.pipeline_model_parallel_size)
    chunks = [rank_layers(model.sizes, parallel, rank) for rank in ranks]
    rank_of = {number: rank for rank in ranks for layers in chunks[rank] for number in layers}
    counts = [0 for _ in ranks]
    for name, parameter in model.named_parameters():
        if name.startswith("layers."):
            rank = rank_of[int(name.split(".")[1])]
        else:
            rank = ranks[-1] if name.startswith(("norm_out.", "proj_out.")) else 0
        numel = full_shape(parameter).numel()
        counts[rank] += numel // tensor if partition_dim(parameter) is not None else numel
    return counts


def summarize(model: str, parallel: ParallelConfig | None = None) -> str:
    """Counts of a preset or of a pipeline folder, and its split over TP and PP, as a few lines of text.

    Raises:
        ValueError: neither a preset nor a folder with a transformer, or a layout that is not possible.
    """
    config = find_sizes(model)
    parallel = parallel or ParallelConfig()
    check_layout(config, parallel)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    whole = meta_model(config)
    buffers = sum(buffer.numel() for buffer in whole.buffers())
    table = f", and a position table of {buffers:,} numbers" if buffers else ""
    lines = [
        f"{model}: {sum(p.numel() for p in whole.parameters()):,} parameters{table}",
        f"{config.layers_in_words}; {config.num_attention_heads} heads x {config.attention_head_dim} = hidden "
        f"{config.hidden_size}; {config.in_channels} channels in patches of {config.patch_size} x {config.patch_size}",
        "",
        f"TP {tensor} x PP {pipeline}, parameters of one rank:",
    ]
    for rank, count in enumerate(parameters_per_rank(whole, parallel)):
        spans = ", ".join(f"{r.start}..{r.stop - 1}" for r in rank_layers(config, parallel, rank))
        lines.append(f"  stage {rank}: {count:>13,}  layers {spans}")
    lines.append(f"context parallel size at TP {tensor}: {divisors(config.num_attention_heads // tensor)}")
    return "\n".join([*lines, "", "millions of parameters on a rank of the largest stage:", *_table(whole)])


def _table(whole: Transformer) -> list[str]:
    config = whole.sizes
    pipelines = [size for size in (1, 2, 4, 8) if size <= config.num_layers]
    lines = ["       " + "".join(f"{f'PP {pipeline}':>10}" for pipeline in pipelines)]
    for tensor in (size for size in range(1, 9) if config.num_attention_heads % size == 0):
        layouts = [
            ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
            for pipeline in pipelines
        ]
        cells = [max(parameters_per_rank(whole, parallel)) / 1e6 for parallel in layouts]
        lines.append(f"  TP {tensor} " + "".join(f"{cell:>10.1f}" for cell in cells))
    return lines
