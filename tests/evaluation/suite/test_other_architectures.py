"""A pipeline that is none of ours (SD-XL, tiny and random) is drawn by diffusers' own classes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from evaluations import BASE
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from soar_mega.checkpoints.model_source import DIFFUSERS, find_source
from soar_mega.evaluation.suite.keyed_images import DiffusersDrawer, Drawn
from soar_mega.evaluation.suite.prompt_sets import Item, Task
from soar_mega.evaluation.suite.suite_settings import Point


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    text = json.loads((BASE / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text["projection_dim"],
        cross_attention_dim=2 * text["hidden_size"],
        norm_num_groups=8,
    )
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(BASE / "vae"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(BASE / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(BASE / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(BASE / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(BASE / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def _task(prompt: str, noise: int) -> Task:
    item = Item(key=prompt, line=1, prompt=prompt, metadata={}, noises=2, position=0, category="", half=0)
    return Task(item, noise)


def test_an_image_depends_on_its_prompt_and_noise_alone(sdxl: Path) -> None:
    source = find_source(str(sdxl))
    assert source.kind == DIFFUSERS and source.fingerprint()["weights"]
    drawn = Drawn(size=(32, 16), solver="euler", seed=0, dtype="fp32", batch_size=8)
    drawer = DiffusersDrawer(source.path, drawn)
    tasks = [_task("a red 3", 0), _task("a red 3", 1), _task("a blue 7", 0)]
    together = drawer.draw(tasks, Point(3.0, 2))
    assert together.shape == (3, 3, 16, 32) and 0 <= together.min() < together.max() <= 1
    assert len({image.numpy().tobytes() for image in together}) == 3
    assert torch.equal(drawer.draw(tasks[2:], Point(3.0, 2))[0], together[2])
    assert not torch.equal(drawer.draw(tasks[2:], Point(1.0, 2))[0], together[2])


def test_what_goes_with_our_models_alone_is_refused(sdxl: Path) -> None:
    with pytest.raises(ValueError, match="of another architecture, drawn by diffusers"):
        find_source(str(sdxl), shift=3.0)
    with pytest.raises(ValueError, match="--ema and --pipeline-dir go with a checkpoint"):
        find_source(str(sdxl), ema=True)
