"""Images from a pipeline folder: its transformer in our implementation, our sampler, its decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from soar_mega.convert import load_diffusers, pipeline_schedule
from soar_mega.convert.adapter_files import load_adapted
from soar_mega.data.encoder_facts import EncoderFacts, encoder_facts
from soar_mega.data.prompts import EncodedPrompts
from soar_mega.data.vae import Decoder
from soar_mega.distributed import device
from soar_mega.evaluation.drift import ModelVelocity, at_scale
from soar_mega.evaluation.pictures import to_pil
from soar_mega.flow import Schedule, normal, sample, solver_steps
from soar_mega.flow.schedule import TIMESTEPS
from soar_mega.models.common.conditions import Conditions
from soar_mega.models.common.transformer import Transformer
from soar_mega.models.family import read_sizes
from soar_mega.outputs import check_file, write_file

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # which keep a mark
MARK = b"soar-mega sample"
_SOFTWARE = 0x0131  # of EXIF: the program that made a picture


@dataclass(kw_only=True)
class Generator:
    """A pipeline that is ready to draw.

    Attributes:
        velocity: the transformer as a function of latents [B, C, H, W], sigma [B] and conditions [B]. Where it lies on
            several ranks, all of them draw the same.
        schedule: that of a number of image tokens.
        is_told: the model is guidance-distilled: it is told the guidance scale.
        decoder: None on a rank that draws for others: it gets no images.
    """

    facts: EncoderFacts
    velocity: ModelVelocity
    decoder: Decoder | None
    schedule: Callable[[int], Schedule]
    is_told: bool

    @staticmethod
    def load(
        pipeline_dir: str | Path, dtype: str = "fp32", shift: float | None = None, adapters: str | Path = ""
    ) -> "Generator":
        """From a diffusers pipeline folder, on this process's device; `dtype` fp32 or bf16, of the transformer.

        `adapters` are put on the transformer: a folder or file in PEFT's or diffusers' format.

        `shift` None takes that of the pipeline's scheduler, which must be one that a shift describes.

        Text encoders are not loaded: encode prompts before (`encode_prompts`), while their memory is free.
        """
        schedule_of(pipeline_dir, shift)  # before the weights are read: says what cannot be
        if adapters:
            loaded, _ = load_adapted(pipeline_dir, adapters, dtype)
        else:
            loaded = load_diffusers(pipeline_dir, dtype)
        return Generator.of(loaded, pipeline_dir, shift)

    @staticmethod
    def of(model: Transformer, pipeline_dir: str | Path, shift: float | None = None) -> "Generator":
        """From a transformer that is whole in this process, and the other parts of a pipeline folder."""
        transformer = model.to(device()).eval()

        @torch.no_grad()
        def velocity(latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
            weight = next(transformer.parameters())
            timesteps = (TIMESTEPS * sigma).to(weight.device, torch.float32)
            predicted: Tensor = transformer(
                latents.to(weight), timesteps, conditions.to(weight.device, weight.dtype)
            )
            return predicted

        return Generator(
            facts=encoder_facts(Path(pipeline_dir)),
            velocity=velocity,
            decoder=Decoder.load(Path(pipeline_dir)),
            schedule=schedule_of(pipeline_dir, shift),
            is_told=model.sizes.guidance_embeds,
        )

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image. ValueError for a size that the model cannot draw."""
        return self.facts.latent_shape(width, height)

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

        The unconditional branch of guidance is that of the empty or negative prompt.

        Args:
            seed: image i starts from the noise of (seed, "sample", i), whatever the batch size.
            size: (width, height) in pixels; None draws the default one of the pipeline.
        """
        default = self.facts.default_resolution
        shape = self.latent_shape(*(size or (default, default)))
        images = []
        for position in torch.arange(len(prompts) * num_images_per_prompt).split(batch_size):
            asked = prompts.conditions.rows(position // num_images_per_prompt)
            noise = normal(seed, "sample", position, 0, shape)
            images.append(self.draw(asked, prompts.empty, noise, steps, guidance_scale, solver))
        return torch.cat(images)

    def draw(
        self,
        asked: Conditions,  # [B]
        empty: Conditions,  # [1]
        noise: Tensor,  # [B, C, H, W]
        steps: int,
        guidance_scale: float,
        solver: str = "euler",
    ) -> Tensor:
        """The image that each noise becomes -> [B, 3, height, width] in [0, 1] on the CPU; [0] without a decoder."""
        patch = self.facts.size_multiple // self.facts.vae_scale_factor
        schedule = self.schedule(noise.shape[-2] * noise.shape[-1] // patch**2)
        sigmas, told = solver_steps(schedule, steps, solver)
        asked, empty = (c.map(lambda tensor: tensor.to(device())) for c in (asked, empty))
        velocity = at_scale(self.velocity, asked, empty, guidance_scale, self.is_told)
        latents = sample(velocity, noise.to(device()), sigmas, solver, told)
        return torch.empty(0) if self.decoder is None else self.decoder.decode(latents)


def schedule_of(pipeline_dir: str | Path, shift: float | None = None) -> Callable[[int], Schedule]:
    """The schedule of a pipeline's scheduler for so many image tokens, or of the shift that is given in its place."""
    samples_evenly = read_sizes(pipeline_dir).family.samples_evenly

    def schedule(tokens: int) -> Schedule:
        return pipeline_schedule(pipeline_dir, tokens, samples_evenly=samples_evenly, shift=shift)

    schedule(1)  # says now what cannot be
    return schedule


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
    enlarged = image.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    picture = BytesIO()
    exif = Image.Exif()
    exif[_SOFTWARE] = MARK.decode()
    to_pil(enlarged).save(picture, FORMATS[Path(path).suffix.lower()], exif=exif)
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
