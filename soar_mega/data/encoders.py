"""The frozen encoders of a diffusers SD3 pipeline: images to latents, prompts to embeddings, latents to images."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts, has_t5, read_config

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar per encoder, even where nobody looks."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@dataclass(kw_only=True)
class Encoders:
    """VAE and text encoders on one device. The VAE computes in float32, the text encoders in the dtype asked for."""

    facts: EncoderFacts
    vae: Any  # AutoencoderKL
    text_encoders: dict[str, Any]  # without text_encoder_3 where the pipeline has no T5
    tokenizers: dict[str, Any]
    device: torch.device
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
            max_sequence_length: T5 tokens; None takes the smaller of 256 and what the T5 tokenizer allows.
            text: load the text encoders too; without them only images can be encoded and decoded.

        Raises:
            ValueError: a part of the folder is missing or damaged; OSError: its weights cannot be read.
        """
        folder = Path(folder)
        device = torch.device(device)
        facts = encoder_facts(folder, max_sequence_length)
        with _no_progress_bars():
            return Encoders._load(folder, facts, device, dtype, text)

    @staticmethod
    def _load(
        folder: Path, facts: EncoderFacts, device: torch.device, dtype: torch.dtype, text: bool
    ) -> "Encoders":
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        encoders: dict[str, Any] = {}
        tokenizers: dict[str, Any] = {}
        if text:
            classes = read_config(folder / "model_index.json")
            for part in (*CLIPS, T5) if has_t5(folder) else CLIPS:
                tokenizer = part.replace("text_encoder", "tokenizer")
                encoder_class = getattr(transformers, classes[part][1])
                encoder = encoder_class.from_pretrained(folder / part, dtype=dtype)
                encoders[part] = encoder.to(device).eval().requires_grad_(False)
                tokenizers[part] = getattr(transformers, classes[tokenizer][1]).from_pretrained(folder / tokenizer)
        return Encoders(
            facts=facts,
            vae=vae.to(device).eval().requires_grad_(False),
            text_encoders=encoders,
            tokenizers=tokenizers,
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents [B, C, h, w] float32.

        Both are scaled as the transformer expects: (z - shift_factor) scaling_factor.
        """
        posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        shift, scale = self._shift_and_scale()
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the transformer makes them -> images [B, 3, H, W] in [0, 1]."""
        shift, scale = self._shift_and_scale()
        images = self.vae.decode(latents.to(self.device, torch.float32) / scale + shift).sample
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text [B, S, D], pooled [B, P]), as StableDiffusion3Pipeline.encode_prompt makes them.

        The two CLIPs' last hidden states but one side by side, padded with zeros to T5's width, then T5's tokens (zeros
        where the pipeline has no T5); pooled are both CLIPs' projections.
        """
        assert self.text_encoders, "loaded with text=False"
        # diffusers cuts both CLIPs at the length of the first one's tokenizer.
        clip_length = self.facts.text_shape[0] - self.facts.max_sequence_length
        hidden, pooled = [], []
        for part in CLIPS:
            output = self.text_encoders[part](self._tokens(part, prompts, clip_length), output_hidden_states=True)
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        clip = torch.cat(hidden, dim=-1)
        if T5 in self.text_encoders:
            t5 = self.text_encoders[T5](self._tokens(T5, prompts, self.facts.max_sequence_length))[0]
        else:
            t5 = clip.new_zeros(len(prompts), self.facts.max_sequence_length, self.facts.text_shape[1])
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=-2).to(self.dtype), torch.cat(pooled, dim=-1).to(self.dtype)

    def _tokens(self, part: str, prompts: list[str], length: int) -> Tensor:
        tokens = self.tokenizers[part](
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)

    def _shift_and_scale(self) -> tuple[float, float]:
        config = self.vae.config
        return config.get("shift_factor") or 0.0, config["scaling_factor"]
