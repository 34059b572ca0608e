"""Images from a pipeline folder: its transformer in our implementation, our sampler, its encoders and decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soar_mega.convert import load_diffusers, scheduler_shift
from soar_mega.data.encoders import Encoders
from soar_mega.distributed import device
from soar_mega.flow import Schedule, guided, normal, sample


@dataclass(kw_only=True)
class Generator:
    """A pipeline that is ready to draw. Make it by `Generator.load`."""

    transformer: torch.nn.Module
    encoders: Encoders
    schedule: Schedule

    @staticmethod
    def load(
        pipeline: str | Path, dtype: str = "fp32", max_sequence_length: int | None = None
    ) -> "Generator":
        """From a diffusers SD3 pipeline folder, on this process's device.

        Args:
            dtype: fp32 or bf16, of the transformer and the text encoders.
            max_sequence_length: T5 tokens of a prompt; None takes what the T5 tokenizer allows, at most 256. It should
                be the length that the model was trained with.
        """
        transformer = load_diffusers(pipeline, dtype).to(device()).eval()
        torch_dtype = next(transformer.parameters()).dtype
        return Generator(
            transformer=transformer,
            encoders=Encoders.from_pipeline(pipeline, device(), torch_dtype, max_sequence_length),
            schedule=Schedule(scheduler_shift(pipeline)),
        )

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """The transformer as a function of sigma: latents [B, C, H, W], sigma [B], text [B, S, D], pooled [B, P]."""
        weight = next(self.transformer.parameters())
        velocity: Tensor = self.transformer(
            latents.to(weight),
            self.schedule.timestep(sigma).to(weight.device, torch.float32),
            text.to(weight),
            pooled.to(weight),
        )
        return velocity

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image. ValueError for a size that the model cannot draw."""
        facts = self.encoders.facts
        multiple, largest = facts.size_multiple, facts.largest_side
        if width % multiple or height % multiple or min(width, height) < 1 or max(width, height) > largest:
            raise ValueError(
                f"this pipeline draws multiples of {multiple} up to {largest} pixels, not {width}x{height}"
            )
        return facts.latent_channels, height // facts.vae_scale_factor, width // facts.vae_scale_factor

    def images(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance_scale: float,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        solver: str = "euler",
        batch_size: int = 32,
    ) -> Tensor:
        """One image per prompt -> [N, 3, height, width] in [0, 1], on the CPU.

        Args:
            seed: image i starts from the noise of (seed, "sample", i), whatever the batch size.
            size: (width, height) in pixels; None draws the transformer's own sample size.
        """
        default = self.encoders.facts.default_resolution
        shape = self.latent_shape(*(size or (default, default)))
        batches = self._batches(prompts, shape, steps, guidance_scale, seed, solver, batch_size)
        return torch.cat([self.encoders.decode(latents).float().cpu() for latents in batches])

    def _batches(
        self,
        prompts: Sequence[str],
        shape: tuple[int, int, int],
        steps: int,
        guidance_scale: float,
        seed: int,
        solver: str,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """Latents [B, C, H, W] of a batch of prompts after another."""
        sigmas = self.schedule.inference_sigmas(steps)
        empty_text, empty_pooled = self.encoders.encode_prompts([""])  # [1, S, D], [1, P]
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            text, pooled = self.encoders.encode_prompts(texts)  # [B, S, D], [B, P]
            position = torch.arange(start, start + len(texts))
            noise = normal(seed, "sample", position, 0, shape).to(device())

            def cond(z: Tensor, s: Tensor, text: Tensor = text, pooled: Tensor = pooled) -> Tensor:
                return self.velocity(z, s, text, pooled)

            def uncond(z: Tensor, s: Tensor) -> Tensor:
                return self.velocity(z, s, empty_text.expand(len(z), -1, -1), empty_pooled.expand(len(z), -1))

            yield sample(guided(cond, uncond, guidance_scale), noise, sigmas, solver)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, 3, H, W] side by side, row by row -> [3, rows x H, columns x W]; what is left over is black."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padded = torch.zeros(rows * columns, channels, height, width)
    padded[:count] = images
    grid = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def save_image(image: Tensor, path: str | Path, scale: int = 1) -> None:
    """Writes an image [3, H, W] in [0, 1]; scale repeats pixels, for canvases of 16 x 16."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
