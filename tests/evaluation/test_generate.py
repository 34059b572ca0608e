"""Images of our transformer and sampler against diffusers' own pipeline, from the same noise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from PIL import Image

from soar_mega.data.prompts import EncodedPrompts, encode_prompts
from soar_mega.evaluation.generate import Generator, image_grid, save_image, schedule_of
from soar_mega.flow import normal

BASE = Path(__file__).parents[2] / "recipes/tiny/base"
PROMPTS = ["a red 3", "a green 1 left of a yellow 8", "two blue 5s"]
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm++2m": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(BASE)


@pytest.fixture(scope="module")
def prompts() -> EncodedPrompts:
    return encode_prompts(BASE, PROMPTS)


@pytest.mark.parametrize(
    ("solver", "guidance_scale", "negative_prompt"),
    [
        ("euler", 1.0, ""),
        ("euler", 3.0, ""),
        ("euler", 3.0, "a blue 5"),
        ("heun", 3.0, "a blue 5"),
        ("dpm++2m", 3.0, "a blue 5"),
    ],
)
def test_images_are_those_of_diffusers(
    generator: Generator,
    pipeline: StableDiffusion3Pipeline,
    solver: str,
    guidance_scale: float,
    negative_prompt: str,
) -> None:
    """With a shift, by which schedulers differ from each other."""
    pipeline.scheduler = SCHEDULERS[solver]
    theirs = pipeline(
        prompt=PROMPTS,
        negative_prompt=negative_prompt,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        max_sequence_length=10,
        latents=normal(7, "sample", torch.arange(len(PROMPTS)), 0, (4, 8, 8)),
        output_type="pt",
    ).images
    prompts = encode_prompts(BASE, PROMPTS, negative_prompt=negative_prompt)
    shifted = replace(generator, schedule=schedule_of(BASE, 3.0))
    ours = shifted.images(
        prompts, steps=4, guidance_scale=guidance_scale, seed=7, batch_size=2, solver=solver
    )
    assert ours.shape == (len(PROMPTS), 3, 16, 16)
    assert ours.std() > 0.01  # not all one colour, which anything would agree on
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flux_takes_its_pipeline_s_steps_at_a_constant_shift_too(tmp_path: Path, steps: int) -> None:
    """schnell's is 1, and all four of its steps are of one length."""
    shutil.copytree(BASE.with_name("flux_base") / "transformer", tmp_path / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    for shift in (None, 3.0):
        scheduler.set_shift(shift or 1.0)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])  # as FluxPipeline does
        found = schedule_of(tmp_path, shift)(16).inference_sigmas(steps)
        torch.testing.assert_close(found, scheduler.sigmas.double(), atol=1e-6, rtol=0)


def test_an_image_depends_on_its_place_and_seed_alone(generator: Generator, prompts: EncodedPrompts) -> None:
    def draw(seed: int, batch_size: int) -> torch.Tensor:
        return generator.images(prompts, steps=2, guidance_scale=1.0, seed=seed, batch_size=batch_size)

    torch.testing.assert_close(draw(0, 1), draw(0, 3), atol=1e-5, rtol=0)
    assert (draw(0, 3) - draw(1, 3)).abs().max() > 0.05


@pytest.mark.parametrize("size", [(18, 16), (16, 0), (16, 1024), (-16, 16)])
def test_a_size_that_cannot_be_drawn_is_refused(
    generator: Generator, prompts: EncodedPrompts, size: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"multiples of 4 up to 32 pixels, not {size[0]}x{size[1]}"):
        generator.images(prompts, steps=1, guidance_scale=1.0, size=size)


def test_a_prompt_has_its_images_side_by_side(generator: Generator, prompts: EncodedPrompts) -> None:
    twice = generator.images(prompts, steps=2, guidance_scale=3.0, num_images_per_prompt=2, batch_size=3)
    doubled = encode_prompts(BASE, [prompt for prompt in PROMPTS for _ in range(2)])
    torch.testing.assert_close(
        twice, generator.images(doubled, steps=2, guidance_scale=3.0), atol=1e-5, rtol=0
    )
    assert (twice[0] - twice[1]).abs().max() > 0.05


def test_a_wide_image_is_wide(generator: Generator, prompts: EncodedPrompts) -> None:
    assert generator.images(prompts, steps=1, guidance_scale=1.0, size=(32, 16)).shape == (3, 3, 16, 32)


def test_grid_and_file_keep_every_pixel(tmp_path: Path) -> None:
    images = torch.linspace(0, 1, 3 * 3 * 2 * 4).reshape(3, 3, 2, 4)
    grid = image_grid(images, columns=2)
    assert grid.shape == (3, 4, 8)
    assert torch.equal(grid[:, :2, :4], images[0])
    assert torch.equal(grid[:, :2, 4:], images[1])
    assert torch.equal(grid[:, 2:, :4], images[2])
    assert not grid[:, 2:, 4:].any()
    for _ in range(2):  # what it wrote itself it may write again
        save_image(grid, tmp_path / "new" / "grid.png", scale=3)
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert pixels.shape == (12, 24, 3)
    assert np.array_equal(pixels[::3, ::3], (grid * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["grid.jpg", "grid.webp", "GRID.JPEG"])
def test_every_format_keeps_the_mark(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        save_image(torch.zeros(3, 4, 4), tmp_path / name)
    assert Image.open(tmp_path / name).size == (4, 4)
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="was not written by this program"):
        save_image(torch.zeros(3, 4, 4), tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_a_shift_that_is_named_stands_in_for_an_unknown_scheduler(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "p")
    config = tmp_path / "p/scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_karras_sigmas": True}))
    with pytest.raises(ValueError, match="--shift"):
        Generator.load(tmp_path / "p")
    assert Generator.load(tmp_path / "p", shift=3.0).schedule(16).shift == 3.0
