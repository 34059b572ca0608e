"""The MMDiT of Stable Diffusion 3 (arXiv 2403.03206)."""

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.lengths import Lengths
from soar_mega.models.common.sizes import check_latent_size
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.sd3.embeddings import ConditioningEmbedding, PatchEmbedding, position_table
from soar_mega.models.sd3.layer import MMDiTLayer
from soar_mega.models.sd3.sizes import SD3Sizes


class MMDiT(Transformer):
    """Joint layers of text and image alone; positions are added to the image's tokens before them."""

    sizes: SD3Sizes

    def make_embedders(self) -> None:
        sizes, dtype = self.sizes, self.config.params_dtype
        self.pos_embed = PatchEmbedding(sizes, dtype)
        self.time_text_embed = ConditioningEmbedding(sizes, dtype)
        self.context_embedder = torch.nn.Linear(sizes.joint_attention_dim, sizes.hidden_size, dtype=dtype)

    def make_layer(self, number: int) -> torch.nn.Module:
        return build_module(
            ModuleSpec(module=MMDiTLayer, submodules=self.submodules),
            config=self.config,
            layer_number=number,
            is_dual=number in self.sizes.dual_attention_layers,
            is_last=number == self.sizes.num_layers - 1,
        )

    def lengths(self, latent_size: tuple[int, int], text_length: int) -> Lengths:
        """The streams of latents of (H, W). ValueError: H or W cannot be cut into patches, or exceeds the table."""
        check_latent_size(self.sizes, latent_size)
        rows, columns = (side // self.sizes.patch_size for side in latent_size)
        return Lengths(text_length, rows * columns)

    def embed(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, latent_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text [S, B, hidden], image [S, B, hidden] and the conditioning [B, hidden]."""
        image = self.pos_embed(latents, latent_size)
        text = self.context_embedder(conditions.text).transpose(0, 1)
        return text, image, self.time_text_embed(timesteps, conditions.pooled)

    def unpatchify(self, patches: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """[h w, B, p p C] -> [B, C, h p, w p]."""
        patch = self.sizes.patch_size
        height, width = latent_size[0] // patch, latent_size[1] // patch
        grid = patches.unflatten(0, (height, width)).unflatten(-1, (patch, patch, -1))
        return grid.permute(2, 5, 0, 3, 1, 4).reshape(patches.shape[1], -1, *latent_size)

    def fill_buffers(self) -> None:
        """The position table."""
        if self.pre_process:
            table = self.pos_embed.pos_embed
            table.copy_(position_table(self.sizes, table.device))
