"""The transformer of FLUX.1."""

import torch
from torch import Tensor

from soar_mega.kernels import to_tokens
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.lengths import Lengths
from soar_mega.models.common.sizes import check_latent_size
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.flux.embeddings import ConditioningEmbedding
from soar_mega.models.flux.layer import DoubleLayer, SingleLayer
from soar_mega.models.flux.sizes import FluxSizes


class Flux(Transformer):
    """Double layers, then single ones; every layer's attention turns queries and keys by their places."""

    sizes: FluxSizes

    def make_embedders(self) -> None:
        sizes, dtype = self.sizes, self.config.params_dtype
        patch = sizes.patch_size**2 * sizes.in_channels
        self.x_embedder = torch.nn.Linear(patch, sizes.hidden_size, dtype=dtype)
        self.time_text_embed = ConditioningEmbedding(sizes, dtype)
        self.context_embedder = torch.nn.Linear(sizes.joint_attention_dim, sizes.hidden_size, dtype=dtype)

    def make_layer(self, number: int) -> torch.nn.Module:
        kind = DoubleLayer if number < self.sizes.num_double_layers else SingleLayer
        return kind(self.config, self.submodules, number, self.sizes.axes_dims_rope)

    def lengths(self, latent_size: tuple[int, int], text_length: int) -> Lengths:
        """The streams of latents of (H, W). ValueError: H or W cannot be cut into patches."""
        check_latent_size(self.sizes, latent_size)
        rows, columns = (side // self.sizes.patch_size for side in latent_size)
        return Lengths(text_length, rows * columns, (rows, columns))

    def embed(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, latent_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text [S, B, hidden], image [S, B, hidden] and the conditioning [B, hidden]."""
        patches = to_tokens(latents, self.sizes.patch_size) if latents.ndim == 4 else latents
        image = self.x_embedder(patches).transpose(0, 1)
        text = self.context_embedder(conditions.text).transpose(0, 1)
        return text, image, self.time_text_embed(timesteps, conditions.pooled, conditions.guidance)

    def unpatchify(self, patches: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """[h w, B, C p p] -> [B, C, h p, w p]."""
        patch = self.sizes.patch_size
        height, width = latent_size[0] // patch, latent_size[1] // patch
        grid = patches.unflatten(0, (height, width)).unflatten(-1, (-1, patch, patch))
        return grid.permute(2, 3, 0, 4, 1, 5).reshape(patches.shape[1], -1, *latent_size)
