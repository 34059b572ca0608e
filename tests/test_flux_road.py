"""The tiny FLUX pipeline from images to pictures: prepared for, trained, exported, sampled."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FlowMatchHeunDiscreteScheduler as HeunScheduler

from soar_mega.cli import main
from soar_mega.data.prompts import encode_prompts
from soar_mega.distributed import stop_world
from soar_mega.evaluation.generate import Generator
from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.flow import normal

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes/tiny/flux_base"
PROMPTS = ["a red 3", "a blue 7 above a green 1"]


class FluxHeunScheduler(HeunScheduler):
    """diffusers' steps of Heun on the way that FluxPipeline gives its own scheduler: its class does not take any."""

    def set_timesteps(self, device: Any = None, sigmas: Any = None, mu: float | None = None) -> None:
        super().set_timesteps(len(sigmas))
        euler = FlowMatchEulerDiscreteScheduler.from_pretrained(BASE / "scheduler")
        euler.set_timesteps(device=device, sigmas=sigmas, mu=mu)
        self.sigmas = torch.cat(
            [euler.sigmas[:1], euler.sigmas[1:-1].repeat_interleave(2), euler.sigmas[-1:]]
        )
        self.timesteps = 1000 * self.sigmas[:-1]


SCHEDULERS = {
    "euler": None,
    "heun": FluxHeunScheduler(),
    "dpm++2m": DPMSolverMultistepScheduler.from_pretrained(
        BASE / "scheduler", use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
}


def images_by_both(
    folder: Path, size: tuple[int, int], solver: str = "euler"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and diffusers', of the same noise."""
    width, height = size
    noise = normal(7, "sample", torch.arange(len(PROMPTS)), 0, (4, height // 2, width // 2))
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[solver] or pipeline.scheduler
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
    drawn = {"steps": 4, "guidance_scale": 3.0, "seed": 7, "size": size, "solver": solver}
    return Generator.load(folder).images(prompts, **drawn), theirs


@pytest.mark.parametrize(
    ("size", "solver"),
    [((16, 16), "euler"), ((32, 20), "euler"), ((32, 20), "heun"), ((32, 20), "dpm++2m")],
)
def test_images_are_those_of_diffusers(size: tuple[int, int], solver: str) -> None:
    ours, theirs = images_by_both(BASE, size, solver)
    assert ours.std() > 0.01  # not all one colour, which anything would agree on
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture
def world() -> Iterator[None]:
    yield
    stop_world()


def test_the_whole_road(tmp_path: Path, world: None, capsys: pytest.CaptureFixture[str]) -> None:
    images, shards, run, metrics = (
        str(tmp_path / name) for name in ("images", "shards", "run", "metrics.json")
    )
    write_image_folder(Path(images), 16, seed=1, noisy=True)
    assert main(["prepare", images, shards, "--pipeline-dir", str(BASE), "--resolution", "16"]) == 0
    settings = [
        f"data.path={shards}", f"checkpoint.save={run}", "train.train_iters=2", "train.global_batch_size=4",
        "train.micro_batch_size=2", "logging.log_interval=1",
    ]  # fmt: skip
    assert (
        main(["train", str(ROOT / "recipes/tiny/flux_soar.yaml"), *settings, f"model.pipeline_dir={BASE}"])
        == 0
    )
    assert Path(run, "complete.json").is_file()
    ours, theirs = images_by_both(Path(run, "export"), (16, 16))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    words = ["--guidance-scale", "3", "--steps", "1", "--prompts-per-category", "2", "--drift-samples", "4"]
    words += ["--drift-steps", "1", "--held-out", shards, "--out", metrics]
    assert main(["evaluate", f"before={BASE}", f"after={run}/export", *words]) == 0
    said = json.loads(Path(metrics).read_text())["pipelines"]
    for name in ("before", "after"):
        assert said[name]["guidance"]["3"]["benchmark"]["overall"]["count"] == 12
        assert len(said[name]["drift"]["scales"]["3"]) == 3
    assert said["before"]["drift"] != said["after"]["drift"]
