"""FLUX.1 on megatron-core."""

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from soar_mega.kernels import to_tokens
from soar_mega.models.flux.embeddings import ConditioningEmbedding
from soar_mega.models.flux.layer import DoubleLayer, SingleLayer
from soar_mega.models.groups import tensor_parallel_group
from soar_mega.models.layer import Lengths
from soar_mega.models.mmdit import MMDiT, _mark_partitions
from soar_mega.models.modulation import Modulation
from soar_mega.models.sequence_shards import gather, scatter


class Flux(MMDiT):
    def __init__(self, sizes, config, layer_spec, layers, pre_process, post_process, recompute_every):
        MegatronModule.__init__(self, config)
        self.sizes = sizes
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = False
        self.recompute_every = recompute_every  # 0: never
        self.input_tensor = None
        self.graphs = None
        self.tp_group = tensor_parallel_group()
        dtype = config.params_dtype
        hidden, patch = sizes.hidden_size, sizes.patch_size**2 * sizes.in_channels
        if pre_process:
            self.x_embedder = torch.nn.Linear(patch, hidden, dtype=dtype)
            self.time_text_embed = ConditioningEmbedding(sizes, dtype)
            self.context_embedder = torch.nn.Linear(sizes.joint_attention_dim, hidden, dtype=dtype)
        self.layers = torch.nn.ModuleDict(
            {
                str(number): (DoubleLayer if number < sizes.num_double_layers else SingleLayer)(
                    config, layer_spec.submodules, number, sizes.axes_dims_rope
                )
                for number in layers
            }
        )
        if post_process:
            self.adaln = layer_spec.submodules.adaln
            self.norm_out = Modulation(config, 2)
            self.proj_out = torch.nn.Linear(hidden, patch, dtype=dtype)
            for parameter in self.proj_out.parameters():
                parameter.sequence_parallel = config.sequence_parallel
        _mark_partitions(self)

    def forward(self, latents, timesteps, text, pooled, guidance=None, latent_size=None, text_length=None):
        if self.pre_process:
            text_length = text.shape[1]
            latent_size = (latents.shape[2], latents.shape[3])
        grid = latent_size[0] // 2, latent_size[1] // 2
        lengths = Lengths(text_length, grid[0] * grid[1], grid)
        if self.pre_process:
            dtype = self.config.params_dtype
            image = self.x_embedder(to_tokens(latents.to(dtype), 2)).transpose(0, 1)
            hidden_text = self.context_embedder(text.to(dtype)).transpose(0, 1)
            conditioning = self.time_text_embed(timesteps, pooled.to(dtype), guidance)
            hidden_text, image = scatter(hidden_text, self.config), scatter(image, self.config)
            hidden_text, image = hidden_text.contiguous(), image.contiguous()
        else:
            hidden_text, image, conditioning = self._unpack(lengths)
        hidden_text, image = self._run_layers(hidden_text, image, conditioning, lengths)
        if not self.post_process:
            return torch.cat([hidden_text, image, conditioning[None]])
        scale, shift = self.norm_out(conditioning)
        _, modulated = self.adaln(image, shift, scale)
        patches = gather(self.proj_out(modulated), lengths.image, self.config)
        out = patches.unflatten(0, grid).unflatten(-1, (-1, 2, 2)).permute(2, 3, 0, 4, 1, 5)
        return out.reshape(patches.shape[1], -1, *latent_size).float()

    def _image_length(self, latent_size):
        return latent_size[0] * latent_size[1] // 4
