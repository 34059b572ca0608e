"""The halves of a pipeline's VAE, each without the other, in float32: images to latents, latents to images.

On a GPU convolutions of float32 round their inputs to TF32, which is torch's default and so diffusers' too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from soar_mega.data.encoder_facts import loading
from soar_mega.data.finite import check_finite
from soar_mega.distributed import device
from soar_mega.user_files import number

MEGAPIXEL = 2**20


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """Images to latents, on the device where it lies."""

    vae: Any  # AutoencoderKL without its decoder

    @staticmethod
    def load(folder: Path, device: torch.device) -> "ImageEncoder":
        """From a pipeline folder. ValueError: it cannot be loaded."""
        vae = _load(folder)
        vae.decoder = None
        return ImageEncoder(vae=vae.to(device))

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents [B, C, h, w] float32.

        Both are scaled as the transformer expects: (z - shift_factor) scaling_factor.
        """
        posterior = self.vae.encode(images.to(self.vae.device, torch.float32)).latent_dist
        shift, scale = _shift_and_scale(self.vae)
        return (posterior.mean - shift) * scale, posterior.std * scale


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Latents to images. It computes on this process's device and lies on the CPU meanwhile."""

    vae: Any  # AutoencoderKL without its encoder

    @staticmethod
    def load(folder: Path) -> "Decoder":
        """From a pipeline folder. ValueError: it cannot be loaded."""
        vae = _load(folder)
        vae.encoder = None
        return Decoder(vae=vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the transformer makes them -> images [B, 3, H, W] in [0, 1] on the CPU.

        On a GPU as many together as make a megapixel, whose activations take gigabytes. On a CPU one by one, where the
        last bits of an image do not depend on others.
        """
        shift, scale = _shift_and_scale(self.vae)
        self.vae.to(device())
        scaled = latents.to(device(), torch.float32) / scale + shift
        pixels = latents[0, 0].numel() * 4 ** (len(self.vae.config.block_out_channels) - 1)
        together = 1 if device().type == "cpu" else max(1, MEGAPIXEL // pixels)
        images = torch.cat([self.vae.decode(some).sample.cpu() for some in scaled.split(together)])
        self.vae.to("cpu")
        return (images / 2 + 0.5).clamp(0, 1)


def _load(folder: Path) -> Any:
    with loading(folder / "vae"):
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    path = folder / "vae" / "config.json"
    if absent := [name for name, weight in vae.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"{folder / 'vae'} cannot be loaded: the weights lack {absent[0]}, which {path} implies"
        )
    number(dict(vae.config), "scaling_factor", path)
    if vae.config.get("shift_factor") is not None:
        number(dict(vae.config), "shift_factor", path)
    check_finite(vae, folder / "vae")
    return vae.eval().requires_grad_(False)


def _shift_and_scale(vae: Any) -> tuple[float, float]:
    return vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
