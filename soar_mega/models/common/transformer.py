"""A transformer on megatron-core, over tensor, sequence, context and pipeline parallelism; what a family does not own.

Between pipeline ranks travels one tensor: this rank's tokens of text and image, and the conditioning vector as one
more token (a full copy on each tensor- and context-parallel rank), so no embedder is needed twice.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.groups import tensor_parallel_group
from soar_mega.models.common.layer_graphs import LayerGraphs, Recorder
from soar_mega.models.common.lengths import Lengths
from soar_mega.models.common.modulation import Modulation
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.precision import around_layers, recompute_layer, run_layer
from soar_mega.models.common.sequence_shards import gather, padded_length, scatter, sequence_shards
from soar_mega.models.common.sizes import Sizes
from soar_mega.models.common.stream import LayerSubmodules, Stream
from soar_mega.models.common.te_layers import CastOnce

# the dimension that TP cuts of the weight of a module of this name, wherever it is; torch's own linears are whole
PARTITIONED = {"linear_qkv": 0, "linear_fc1": 0, "linear": 0, "linear_proj": 1, "linear_fc2": 1}


class Transformer(MegatronModule):
    """The layers of one (virtual) pipeline stage, with the embedders on the first stage and the output on the last.

    Layers are kept under their global numbers, so a parameter has the same name at every layout. Each is called as
    `layer(text, image, conditioning, lengths) -> (text, image)`, with this rank's tokens in and out. A layer that
    `takes_open_sums` may get an OpenSum from the one before.
    """

    sizes: Any  # of the family: Sizes, and what it adds

    def __init__(
        self,
        sizes: Sizes,
        config: TransformerConfig,
        submodules: LayerSubmodules,
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
        self.submodules = submodules
        if pre_process:
            self.make_embedders()
        self.layers = torch.nn.ModuleDict({str(number): self.make_layer(number) for number in layers})
        self._leave_sums_open()
        if post_process:
            self.adaln = submodules.adaln
            self.norm_out = Modulation(config, 2)
            self.proj_out = torch.nn.Linear(
                sizes.hidden_size, sizes.patch_size**2 * sizes.out_channels, dtype=config.params_dtype
            )
            for parameter in self.proj_out.parameters():
                # it works on this rank's tokens: under SP its gradients are added up over TP
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        _mark_partitions(self)

    @abstractmethod
    def make_embedders(self) -> None:
        """Add the modules that the inputs meet before the layers."""

    @abstractmethod
    def make_layer(self, number: int) -> torch.nn.Module:
        """The layer of that number in the whole model."""

    @abstractmethod
    def lengths(self, latent_size: tuple[int, int], text_length: int) -> Lengths:
        """The streams of latents of (H, W). ValueError: a size that the model cannot take."""

    @abstractmethod
    def embed(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, latent_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The text [S, B, hidden], the image [S, B, hidden] and the vector [B, hidden] that modulates every layer.

        Args:
            latents, conditions: of `config.params_dtype`, but guidance and `timesteps` float32. See `forward`.
        """

    @abstractmethod
    def unpatchify(self, patches: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """[H W / p^2, B, p p C], in the order in which the family has a patch's numbers -> [B, C, H, W]."""

    def fill_buffers(self) -> None:
        """Compute what is kept with the weights and is no weight."""
        assert not list(self.buffers())

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output; called by megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        latents: Tensor | None,
        timesteps: Tensor | None,
        text: Conditions | Tensor | None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        text_length: int | None = None,
    ) -> Tensor:
        """The velocity at noisy latents.

        Args:
            latents: [B, C, H, W], or their patches [B, H W / p^2, C p p] (`soar_mega.kernels.rollout_renoise`);
                timesteps: [B] in 0..1000; text: [B, S, D], as diffusers' prompt_embeds, or all conditions in one;
                pooled: [B, P]; guidance: [B], for a guidance-distilled model. Read on the first pipeline stage only.
            latent_size, text_length: (H, W) and S, where latents and text do not tell.

        Returns:
            The velocity [B, C, H, W] float32 on the last stage, else the tensor for the next stage.

        Raises:
            ValueError: a latent size that the model cannot take.
        """
        if self.pre_process:
            assert latents is not None and timesteps is not None and text is not None
            if isinstance(text, Tensor):
                assert pooled is not None
                text = Conditions(text, pooled, guidance)
            text_length = text.text_length
            if latents.ndim == 4:
                latent_size = (latents.shape[2], latents.shape[3])
        assert latent_size is not None and text_length is not None
        lengths = self.lengths(latent_size, text_length)
        hidden_text: Tensor | None
        if self.pre_process:
            hidden_text, image, conditioning = self._embed(latents, timesteps, text, latent_size)
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
        return self.unpatchify(patches, latent_size).float()

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
        lengths = self.lengths(latent_size, text_length)
        padded = padded_length(lengths.text, self.config) + padded_length(lengths.image, self.config)
        return padded + sequence_shards(self.config)

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

    def _leave_sums_open(self) -> None:
        """Have layers leave their last sums to the next one, but where more would be kept: before and behind recomputed
        layers."""
        for number, following in pairwise(self.layers):
            again = self._is_recomputed(int(number)) or self._is_recomputed(int(following))
            streams = (module for module in self.layers[number].modules() if isinstance(module, Stream))
            for stream in streams:
                stream.leaves_sum_open = bool(self.layers[following].takes_open_sums) and not again

    def _is_recomputed(self, number: int) -> bool:
        return self.recompute_every > 0 and number % self.recompute_every == 0

    def _embed(
        self, latents: Any, timesteps: Any, conditions: Any, latent_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.config.params_dtype
        text, image, conditioning = self.embed(
            latents.to(dtype), timesteps, conditions.to(latents.device, dtype), latent_size
        )
        if torch.is_grad_enabled() and not image.requires_grad:
            # Frozen embedders: recomputed layers and pipeline ranks need an input with a gradient.
            image = image.detach().requires_grad_()
        text, image = scatter(text, self.config), scatter(image, self.config)
        return text.contiguous(), image.contiguous(), conditioning

    def _unpack(self, lengths: Lengths) -> tuple[Tensor, Tensor, Tensor]:
        assert self.input_tensor is not None, "set_input_tensor was not called"
        shards = sequence_shards(self.config)
        sizes = [padded_length(n, self.config) // shards for n in (lengths.text, lengths.image)]
        text, image, conditioning = self.input_tensor.split([*sizes, 1])
        return text, image, conditioning[0]


def _mark_partitions(model: Transformer) -> None:
    # megatron marks weights while it initialises them, which is done elsewhere here
    for name, module in model.named_modules():
        dim = None if isinstance(module, torch.nn.Linear) else PARTITIONED.get(name.rpartition(".")[2])
        if dim is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
