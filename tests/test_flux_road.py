"""The tiny FLUX pipeline from images to pictures: prepared for, trained, exported, sampled."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers import FlowMatchHeunDiscreteScheduler as HeunScheduler
from multirank import run_ranks
from PIL import Image

from soar_mega.cli import main
from soar_mega.data.prompts import encode_prompts
from soar_mega.distributed import stop_world
from soar_mega.evaluation.generate import Generator
from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.examples.digits.measures import Plan, measure
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    write_image_folder(folder / "images", 16, seed=1, noisy=True)
    words = ["--pipeline-dir", str(BASE), "--resolution", "16"]
    assert main(["prepare", str(folder / "images"), str(folder / "shards"), *words]) == 0
    return folder / "shards"


def train(shards: Path, run: Path, *settings: str) -> Path:
    """Two steps of SOAR, exported."""
    words = [
        f"model.pipeline_dir={BASE}", f"data.path={shards}", f"checkpoint.save={run}", "train.train_iters=2",
        "train.global_batch_size=4", "train.micro_batch_size=2", "logging.log_interval=1", *settings,
    ]  # fmt: skip
    assert main(["train", str(ROOT / "recipes/tiny/flux_soar.yaml"), *words]) == 0
    assert (run / "complete.json").is_file()
    return run


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield train(shards, tmp_path_factory.mktemp("run") / "run")
    stop_world()


def test_the_whole_road(shards: Path, run: Path, tmp_path: Path) -> None:
    """Prepared for, trained and exported it is drawn as by diffusers, and measured."""
    ours, theirs = images_by_both(run / "export", (16, 16))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    card = (run / "export/README.md").read_text()
    assert "max_sequence_length=10, guidance_scale=3)" in card and " --guidance-scale 3\n" in card
    models = [f"before={BASE}", f"after={run}/export"]
    words = ["--guidance-scale", "3", "--held-out", str(shards), "--drift-samples", "4"]
    words += ["--drift-steps", "1"]
    metrics = tmp_path / "metrics.json"
    assert main(["evaluate", *models, *words, "--out", str(metrics)]) == 0
    measured = json.loads(metrics.read_text())["pipelines"]
    assert all(len(each["drift"]["scales"]["3"]) == 3 for each in measured.values())
    assert measured["before"]["drift"] != measured["after"]["drift"]
    canvases = measure(run / "export", Plan(guidance_scales=(3.0,), steps=1, prompts_per_category=2))
    assert canvases["guidance"]["3"]["benchmark"]["overall"]["count"] == 12

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    sets = {"digits": {"prompts": "prompts.txt", "scorers": ["jpeg_incompressibility"]}}
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"guidance_scale": [3], "steps": [1], "sets": sets}))
    out = tmp_path / "out"
    assert main(["evaluate", *models, f"same={run}", *words, "--suite", str(suite), "--out", str(out)]) == 0
    said = json.loads((out / "report.json").read_text())["models"]
    assert said["after"]["training"][0]["stage"] == "soar"
    for name in measured:
        assert said[name]["drift"]["scales"] == measured[name]["drift"]["scales"]
    drawn = {
        path.parents[1].name.rpartition("-")[0]: path.parent for path in out.glob("images/*/digits/*.png")
    }
    for image in drawn["after-g3-s1"].iterdir():  # a checkpoint draws what its export does
        assert image.read_bytes() == (drawn["same-g3-s1"] / image.name).read_bytes()


def sample(source: str, out: str, *words: str) -> int:
    options = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", "4", "--guidance-scale", "3"]
    return main(["sample", source, *options, "--seed", "7", "--size", "32x20", "--out", out, *words])


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_a_checkpoint_on_four_ranks_draws_what_diffusers_does(run: Path, tmp_path: Path, solver: str) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--solver", solver]
    assert run_ranks(sample, 4, str(run), str(tmp_path / "cut.png"), *layout) == [0] * 4
    assert sample(str(run), str(tmp_path / "whole.png"), "--solver", solver) == 0
    cut, whole = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        for name in ("cut", "whole")
    )
    _, theirs = images_by_both(run / "export", (32, 20), solver)
    expected = (torch.cat([*theirs], dim=-2) if cut.shape[0] == 40 else torch.cat([*theirs], dim=-1)) * 255
    assert abs(cut - whole).max() <= 1
    assert abs(cut - expected.permute(1, 2, 0).numpy()).max() <= 1


def velocities(transformer: Any) -> torch.Tensor:
    """Of diffusers' transformer at fixed inputs."""
    draw = torch.Generator().manual_seed(1)
    return transformer(
        torch.randn(2, 16, 16, generator=draw),
        encoder_hidden_states=torch.randn(2, 10, 64, generator=draw),
        pooled_projections=torch.randn(2, 32, generator=draw),
        timestep=torch.tensor([0.3, 0.9]),
        guidance=torch.tensor([3.0, 1.0]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        txt_ids=torch.zeros(10, 3),
    ).sample.detach()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_the_road_of_adapters(shards: Path, tmp_path: Path) -> None:
    """Trained, exported in both formats, loaded by diffusers and PEFT, merged, drawn with."""
    peft = pytest.importorskip("peft")
    lora = ["lora.rank=2", "lora.alpha=64", "optimizer.lr=0.01", "train.ema_decay=0", "lora.dropout=0.1"]
    run = train(shards, tmp_path / "run", *lora)
    merged = velocities(FluxTransformer2DModel.from_pretrained(run / "export/transformer"))
    pipeline = FluxPipeline.from_pretrained(BASE)
    assert relative_error(velocities(pipeline.transformer), merged) > 1e-3
    pipeline.load_lora_weights(run / "export_lora")
    assert relative_error(velocities(pipeline.transformer), merged) < 1e-5
    base = FluxTransformer2DModel.from_pretrained(BASE / "transformer")
    assert (
        relative_error(velocities(peft.PeftModel.from_pretrained(base, run / "export_lora")), merged) < 1e-5
    )
    words = ["--lora", str(run / "export_lora/pytorch_lora_weights.safetensors")]
    assert main(["convert", str(BASE), str(tmp_path / "merged"), *words]) == 0
    by_hand = FluxTransformer2DModel.from_pretrained(tmp_path / "merged/transformer")
    assert relative_error(velocities(by_hand), merged) < 1e-5
    sources = {
        "merged": run / "export",
        "adapted": f"{BASE}+{run / 'export_lora'}",
        "checkpoint": run,
        "base": BASE,
    }
    pictures = {}
    for name, source in sources.items():
        assert sample(str(source), str(tmp_path / f"{name}.png")) == 0
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    assert abs(pictures["merged"] - pictures["adapted"]).max() <= 1
    assert np.array_equal(pictures["checkpoint"], pictures["adapted"])
    assert abs(pictures["merged"] - pictures["base"]).max() > 1
    stop_world()
