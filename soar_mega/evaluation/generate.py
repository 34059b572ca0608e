"""Images from a pipeline folder: its transformer in our implementation, our sampler, its decoder."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from soar_mega.convert import load_diffusers, scheduler_shift
from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts
from soar_mega.data.prompts import EncodedPrompts
from soar_mega.data.vae import Decoder
from soar_mega.distributed import device
from soar_mega.evaluation.drift import at_scale
from soar_mega.flow import Schedule, normal, sample
from soar_mega.flow.schedule import TIMESTEPS
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.flops import image_tokens
from soar_mega.outputs import check_file, write_file

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # which keep a mark
MARK = b"soar-mega sample"
_SOFTWARE = 0x0131  # of EXIF: the program that made a picture


@dataclass(kw_only=True)
class Generator:
    """A pipeline that is ready to draw. Make it by `Generator.load`."""

    facts: EncoderFacts
    transformer: torch.nn.Module
    decoder: Decoder
    pipeline_dir: Path
    shift: float | None  # in place of the one that the pipeline's scheduler has

    @staticmethod
    def load(pipeline_dir: str | Path, dtype: str = "fp32", shift: float | None = None) -> "Generator":
        """From a diffusers SD3 pipeline folder, on this process's device; `dtype` fp32 or bf16, of the transformer.

        `shift` None takes that of the pipeline's scheduler, which must be one that a shift describes.

        Text encoders are not loaded: encode prompts before (`encode_prompts`), while their memory is free.
        """
        if shift is None:
            scheduler_shift(pipeline_dir, tokens=1)  # say now what cannot be
        return Generator(
            facts=encoder_facts(Path(pipeline_dir)),
            transformer=load_diffusers(pipeline_dir, dtype).to(device()).eval(),
            decoder=Decoder.load(Path(pipeline_dir)),
            pipeline_dir=Path(pipeline_dir),
            shift=shift,
        )

    @property
    def is_told(self) -> bool:
        """Whether the model is guidance-distilled."""
        return bool(self.transformer.sizes.guidance_embeds)  # type: ignore[union-attr]

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The transformer as a function of sigma: latents [B, C, H, W], sigma [B], conditions [B]."""
        weight = next(self.transformer.parameters())
        velocity: Tensor = self.transformer(
            latents.to(weight),
            (TIMESTEPS * sigma).to(weight.device, torch.float32),
            conditions.to(weight.device, weight.dtype),
        )
        return velocity

    def schedule(self, latent_shape: tuple[int, int, int]) -> Schedule:
        """That of latents [C, H, W]."""
        if self.shift is not None:
            return Schedule(self.shift)
        _, height, width = latent_shape
        shift, is_dynamic = scheduler_shift(
            self.pipeline_dir,
            image_tokens(self.transformer.sizes, (height, width)),  # type: ignore[arg-type]
        )
        return Schedule(shift, is_dynamic=is_dynamic)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image. ValueError for a size that the model cannot draw."""
        facts = self.facts
        multiple, largest = facts.size_multiple, facts.largest_side
        if width % multiple or height % multiple or min(width, height) < 1 or max(width, height) > largest:
            raise ValueError(
                f"this pipeline draws multiples of {multiple} up to {largest} pixels, not {width}x{height}"
            )
        return facts.latent_channels, height // facts.vae_scale_factor, width // facts.vae_scale_factor

    def images(
        self,
        prompts: EncodedPrompts,
        *,
        steps: int,
        guidance_scale: float,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        solver: str = "euler",
        batch_size: int = 32,
    ) -> Tensor:
        """Images of each prompt in turn -> [N, 3, height, width] in [0, 1], on the CPU.

        Args:
            seed: image i starts from the noise of (seed, "sample", i), whatever the batch size.
            size: (width, height) in pixels; None draws the transformer's own sample size.
        """
        default = self.facts.default_resolution
        shape = self.latent_shape(*(size or (default, default)))
        sigmas = self.schedule(shape).inference_sigmas(steps)
        empty = prompts.empty.map(lambda tensor: tensor.to(device()))
        images = []
        for position in torch.arange(len(prompts) * num_images_per_prompt).split(batch_size):
            row = position // num_images_per_prompt
            asked = prompts.conditions.rows(row).map(lambda tensor: tensor.to(device()))
            velocity = at_scale(self.velocity, asked, empty, guidance_scale, self.is_told)
            noise = normal(seed, "sample", position, 0, shape).to(device())
            images.append(self.decoder.decode(sample(velocity, noise, sigmas, solver)))
        return torch.cat(images)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, 3, H, W] side by side, row by row -> [3, rows x H, columns x W]; what is left over is black."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padded = torch.zeros(rows * columns, channels, height, width)
    padded[:count] = images
    grid = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def save_image(image: Tensor, path: str | Path, scale: int = 1) -> None:
    """Writes an image [3, H, W] in [0, 1]; scale repeats pixels, for canvases of 16 x 16.

    Raises what `check_image_path` does.
    """
    check_image_path(path)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    picture = BytesIO()
    exif = Image.Exif()
    exif[_SOFTWARE] = MARK.decode()
    Image.fromarray(pixels.numpy()).save(picture, FORMATS[Path(path).suffix.lower()], exif=exif)
    write_file(path, picture.getvalue(), MARK)


def check_image_path(path: str | Path) -> None:
    """Tries whether `save_image` can write there.

    Raises:
        ValueError: the name is not that of a picture, or there is something that this program did not write.
        OSError: it cannot be written.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path} is not the name of a picture: give one that ends in {', '.join(FORMATS)}")
    check_file(path, MARK)
