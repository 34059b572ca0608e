"""The frozen encoders of a diffusers pipeline that stay loaded: for shards, and for encoding while training."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts
from soar_mega.data.text_encoder import TextEncoder
from soar_mega.data.vae import ImageEncoder


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """All on one device. The VAE computes in float32, the text encoders in the dtype asked for."""

    facts: EncoderFacts
    images: ImageEncoder
    texts: list[TextEncoder]
    dtype: torch.dtype

    @staticmethod
    def from_pipeline(
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int | None = None,
        *,
        text: bool = True,
    ) -> "Encoders":
        """Load the encoders of a pipeline folder.

        Args:
            dtype: of the text encoders and of the embeddings they make.
            max_sequence_length: T5 tokens; None: as `encoder_facts`.
            text: load the text encoders too; without them only images can be encoded.

        Raises:
            ValueError: a part of the folder is missing or damaged.
        """
        folder, device = Path(folder), torch.device(device)
        facts = encoder_facts(folder, max_sequence_length)
        wanted = facts.texts if text else ()
        return Encoders(
            facts=facts,
            images=ImageEncoder.load(folder, device),
            texts=[TextEncoder.load(folder, part, device, dtype) for part in wanted],
            dtype=dtype,
        )

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents [B, C, h, w] float32.

        Both are scaled as the transformer expects.
        """
        return self.images.encode(images)

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text [B, S, D], pooled [B, P]), as diffusers' pipeline makes them."""
        assert self.texts, "loaded with text=False"
        text, pooled = self.facts.join([encoder.encode(prompts) for encoder in self.texts], self.facts)
        return text.to(self.dtype), pooled.to(self.dtype)
