"""The MMDiT of the SD3 family on megatron-core, over tensor, sequence, context and pipeline parallelism.

Between pipeline stages travels one tensor: this rank's tokens of text and image, and the conditioning vector as one
more token (a full copy on each tensor- and context-parallel rank), so no embedder is needed twice.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.distributed import device
from soar_mega.kernels.qk_norm_rope import EPSILON
from soar_mega.models.config import MMDiTConfig
from soar_mega.models.embeddings import ConditioningEmbedding, PatchEmbedding
from soar_mega.models.groups import tensor_parallel_group
from soar_mega.models.initialize import initialize
from soar_mega.models.layer import AttentionProjections, Lengths
from soar_mega.models.layer_graphs import LayerGraphs, Recorder
from soar_mega.models.layout import check_layout, is_sequence_parallel
from soar_mega.models.modulation import Modulation
from soar_mega.models.names import named_tensors
from soar_mega.models.pipeline_layout import chunks_per_rank, stage_layers
from soar_mega.models.precision import around_layers, check_fp8_sizes, recompute_layer, run_layer
from soar_mega.models.sequence_shards import gather, padded_length, scatter, sequence_shards
from soar_mega.models.specs import get_mmdit_layer_spec, get_provider
from soar_mega.models.te_layers import CastOnce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MMDiT(MegatronModule):
    """The layers of one (virtual) pipeline stage, with the embedders on the first stage and the output on the last.

    Layers are kept under their global numbers, so a parameter has the same name at every layout.
    """

    def __init__(
        self,
        sizes: MMDiTConfig,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        layers: Iterable[int],
        pre_process: bool,
        post_process: bool,
        recompute_every: int,
    ) -> None:
        super().__init__(config)
        self.sizes = sizes
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = False
        self.recompute_every = recompute_every  # 0: never
        self.input_tensor: Tensor | None = None
        self.graphs: LayerGraphs | None = None
        self.tp_group = tensor_parallel_group()
        dtype = config.params_dtype
        if pre_process:
            self.pos_embed = PatchEmbedding(sizes, dtype)
            self.time_text_embed = ConditioningEmbedding(sizes, dtype)
            self.context_embedder = torch.nn.Linear(sizes.joint_attention_dim, sizes.hidden_size, dtype=dtype)
        self.layers = torch.nn.ModuleDict(
            {
                str(number): build_module(
                    layer_spec,
                    config=config,
                    layer_number=number,
                    is_dual=number in sizes.dual_attention_layers,
                    is_last=number == sizes.num_layers - 1,
                )
                for number in layers
            }
        )
        if post_process:
            self.adaln = layer_spec.submodules.adaln
            self.norm_out = Modulation(config, 2)
            self.proj_out = torch.nn.Linear(
                sizes.hidden_size, sizes.patch_size**2 * sizes.out_channels, dtype=dtype
            )
            for parameter in self.proj_out.parameters():
                # it works on this rank's tokens: under SP its gradients are added up over TP
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        _mark_partitions(self)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output; called by megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        latents: Tensor | None,
        timesteps: Tensor | None,
        text: Tensor | None,
        pooled: Tensor | None,
        latent_size: tuple[int, int] | None = None,
        text_length: int | None = None,
    ) -> Tensor:
        """The velocity at noisy latents.

        Args:
            latents: [B, C, H, W], or their patches [B, H W / p^2, C p p] (`soar_mega.kernels.rollout_renoise`);
                timesteps: [B] in 0..1000; text: [B, S, D], CLIP and T5 concatenated as in diffusers' prompt_embeds;
                pooled: [B, P]. Read on the first pipeline stage only.
            latent_size, text_length: (H, W) and S, where latents and text do not tell.

        Returns:
            The velocity [B, C, H, W] float32 on the last stage, else the tensor for the next stage.

        Raises:
            ValueError: a latent size that cannot be cut into patches or is larger than the position table.
        """
        if self.pre_process:
            assert latents is not None and timesteps is not None and text is not None and pooled is not None
            text_length = text.shape[1]
            if latents.ndim == 4:
                latent_size = (latents.shape[2], latents.shape[3])
        assert latent_size is not None and text_length is not None
        lengths = Lengths(text_length, self._image_length(latent_size))
        hidden_text: Tensor | None
        if self.pre_process:
            hidden_text, image, conditioning = self._embed(latents, timesteps, text, pooled, latent_size)
        else:
            hidden_text, image, conditioning = self._unpack(lengths)
        if self.graphs is not None:
            hidden_text, image, conditioning = self.graphs.run(hidden_text, image, conditioning, lengths)
        else:
            hidden_text, image = self._run_layers(hidden_text, image, conditioning, lengths)
        if not self.post_process:
            assert hidden_text is not None
            return torch.cat([hidden_text, image, conditioning[None]])
        scale, shift = self.norm_out(conditioning)
        _, modulated = self.adaln(image, shift, scale)
        patches = gather(self.proj_out(modulated), lengths.image, self.config)
        return self._unpatchify(patches, latent_size).float()

    def record_layers(self, ready: Callable[[Parameter], None], recorder: Callable[[], Recorder]) -> None:
        """Run the layers as graphs from now on; `ready` is told of each weight that has its gradient."""
        layers = {int(name): (layer, self._is_recomputed(int(name))) for name, layer in self.layers.items()}
        self.graphs = LayerGraphs(layers, self.config, ready, recorder)

    def weights_changed(self) -> None:
        """Have FP8 forms of the weights made anew at their next use."""
        for module in self.modules() if self.config.fp8 else ():
            if isinstance(module, CastOnce):
                module.has_changed = True

    def pipeline_sequence_length(self, latent_size: tuple[int, int], text_length: int) -> int:
        """The seq_length to declare to megatron's schedules, which divide it by CP, and by TP under SP."""
        lengths = (text_length, self._image_length(latent_size))
        return sum(padded_length(n, self.config) for n in lengths) + sequence_shards(self.config)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Sharded tensors for dist_checkpointing. Names and full shapes do not depend on the layout."""
        partitioned = {
            name: p.partition_dim  # type: ignore[attr-defined]
            for name, p in self.named_parameters()
            if getattr(p, "tensor_model_parallel", False)
        }
        return make_sharded_tensors_for_checkpoint(
            named_tensors(self),
            prefix,
            partitioned,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def _run_layers(
        self, text: Any, image: Tensor, conditioning: Tensor, lengths: Lengths
    ) -> tuple[Tensor | None, Tensor]:
        with around_layers(self.config):
            for name, layer in self.layers.items():
                number = int(name)
                run = recompute_layer if self._is_recomputed(number) else run_layer
                # a view of its own has each layer add up its gradient of the conditioning, as graphs do
                text, image = run(
                    layer, number, self.config, text, image, conditioning.view_as(conditioning), lengths
                )
        return text, image

    def _is_recomputed(self, number: int) -> bool:
        return self.recompute_every > 0 and number % self.recompute_every == 0

    def _embed(
        self, latents: Any, timesteps: Any, text: Any, pooled: Any, latent_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.config.params_dtype
        image = self.pos_embed(latents.to(dtype), latent_size)
        hidden_text = self.context_embedder(text.to(dtype)).transpose(0, 1)
        conditioning = self.time_text_embed(timesteps, pooled.to(dtype))
        if torch.is_grad_enabled() and not image.requires_grad:
            # Frozen embedders: recomputed layers and pipeline stages need an input with a gradient.
            image = image.detach().requires_grad_()
        hidden_text, image = scatter(hidden_text, self.config), scatter(image, self.config)
        return hidden_text.contiguous(), image.contiguous(), conditioning

    def _unpack(self, lengths: Lengths) -> tuple[Tensor, Tensor, Tensor]:
        assert self.input_tensor is not None, "set_input_tensor was not called"
        shards = sequence_shards(self.config)
        sizes = [padded_length(n, self.config) // shards for n in lengths]
        text, image, conditioning = self.input_tensor.split([*sizes, 1])
        return text, image, conditioning[0]

    def _image_length(self, latent_size: tuple[int, int]) -> int:
        patch, largest = self.sizes.patch_size, self.sizes.pos_embed_max_size
        height, width = latent_size
        if height % patch or width % patch or max(height, width) > patch * largest:
            raise ValueError(
                f"latents of {height} x {width}: both sides must be multiples of the patch size {patch} and at most "
                f"{patch * largest} (pos_embed_max_size {largest})"
            )
        return (height // patch) * (width // patch)

    def _unpatchify(self, patches: Tensor, latent_size: tuple[int, int]) -> Tensor:
        patch = self.sizes.patch_size
        height, width = latent_size[0] // patch, latent_size[1] // patch
        # [h w, B, p p C] -> [B, C, h p, w p]
        grid = patches.unflatten(0, (height, width)).unflatten(-1, (patch, patch, -1))
        return grid.permute(2, 5, 0, 3, 1, 4).reshape(patches.shape[1], -1, *latent_size)


def _mark_partitions(model: MMDiT) -> None:
    # megatron marks weights while it initialises them, which is done elsewhere here
    columns = [m.linear_qkv for m in model.modules() if isinstance(m, AttentionProjections)]
    columns += [m.linear for m in model.modules() if isinstance(m, Modulation)]
    columns += [m.linear_fc1 for m in model.modules() if isinstance(m, MLP)]
    rows = [
        m.linear_proj
        for m in model.modules()
        if isinstance(m, AttentionProjections) and m.linear_proj is not None
    ]
    rows += [m.linear_fc2 for m in model.modules() if isinstance(m, MLP)]
    for linears, dim in ((columns, 0), (rows, 1)):
        for linear in linears:
            if not hasattr(linear.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(linear.weight, True, dim, 1)


def transformer_config(sizes: MMDiTConfig, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
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
    config: MMDiTConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    chunk: int = 0,
    meta: bool = False,
    seed: int = 0,
) -> MMDiT:
    """One chunk of the part of a model that belongs to this rank; without an interleaved pipeline, all of it.

    With model.init=random the weights are keyed by `seed`, equal at every layout; else they are NaN until loaded.

    Args:
        chunk: its number among the rank's.
        meta: build on the meta device, without memory; needs no process world.

    Raises:
        ValueError: a layout, a kind of layers or a precision that is not possible.
    """
    check_layout(config, parallel)
    granularity = model.recompute_granularity
    if granularity not in ("none", "selective", "full"):
        raise ValueError(
            f"model.recompute_granularity={granularity!r} is unknown: choose none, selective or full"
        )
    provider = get_provider(model)
    check_fp8_sizes(config, model, parallel)
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
    stages = stage_layers(config, parallel)
    stage = chunk * ranks + rank
    with torch.device("meta" if meta else device()):
        mmdit = MMDiT(
            config,
            transformer_config(config, model, parallel),
            get_mmdit_layer_spec(provider, model.fused_kernels, granularity == "selective"),
            stages[stage],
            pre_process=stage == 0,
            post_process=stage == len(stages) - 1,
            recompute_every=model.recompute_every if granularity == "full" else 0,
        )
    if not meta:
        if model.init == "random":
            initialize(mmdit, config, seed)
        else:
            with torch.no_grad():
                for tensor in named_tensors(mmdit).values():
                    tensor.fill_(float("nan"))
    return mmdit
