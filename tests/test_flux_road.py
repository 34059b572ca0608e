"""The tiny FLUX pipeline from images to pictures: prepared for, trained, exported, sampled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from soar_mega.data.prompts import encode_prompts
from soar_mega.evaluation.generate import Generator
from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.flow import normal

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes/tiny/flux_base"
PROMPTS = ["a red 3", "a blue 7 above a green 1"]


def images_by_both(folder: Path, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and diffusers', of the same noise."""
    width, height = size
    noise = normal(7, "sample", torch.arange(len(PROMPTS)), 0, (4, height // 2, width // 2))
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPTS,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=10,
        latents=FluxPipeline._pack_latents(noise, len(PROMPTS), *noise.shape[1:]),
        output_type="pt",
    ).images
    prompts = encode_prompts(folder, PROMPTS)
    ours = Generator.load(folder).images(prompts, steps=4, guidance_scale=3.0, seed=7, size=size)
    return ours, theirs


@pytest.mark.parametrize("size", [(16, 16), (32, 20)])
def test_images_are_those_of_diffusers(size: tuple[int, int]) -> None:
    ours, theirs = images_by_both(BASE, size)
    assert ours.std() > 0.01  # not all one colour, which anything would agree on
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def soar_mega(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "soar_mega", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_whole_road(tmp_path: Path) -> None:
    images, shards, run = (str(tmp_path / name) for name in ("images", "shards", "run"))
    write_image_folder(Path(images), 16, seed=1, noisy=True)
    soar_mega("prepare", images, shards, "--pipeline-dir", str(BASE), "--resolution", "16")
    said = soar_mega(
        "train", "recipes/tiny/flux_soar.yaml", f"data.path={shards}", f"checkpoint.save={run}", "train.train_iters=2",
        "train.global_batch_size=4", "train.micro_batch_size=2", "logging.log_interval=1",
    )  # fmt: skip
    assert "complete: 2 iterations" in said
    ours, theirs = images_by_both(tmp_path / "run" / "export", (16, 16))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
