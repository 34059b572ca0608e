"""The committed tiny pipeline: complete, small, fit for the data it was made for, and readable by older programs."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from soar_mega.examples.digits.benchmark import benchmark_prompts, real_canvases, score
from soar_mega.examples.digits.canvases import KINDS, draw_caption

BASE = Path(__file__).parents[1] / "recipes" / "tiny" / "base"
FLUX_BASE = BASE.with_name("flux_base")
PLATEAU_BASE = BASE.with_name("plateau_base")
# what flow_grpo and DiffusionNFT pin; the last two without what they need, which is torch above all
PINNED = [
    "transformers==4.40.0",
    "diffusers==0.33.1",
    "tokenizers==0.19.1",
    "huggingface-hub==0.29.1",
    "numpy<2",
]
PINNED_ALONE = ["peft==0.10.0", "accelerate==1.4.0"]
DRAW_AS_TRAINERS_DO = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
clip = pipeline.tokenizer(["a red 3"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
t5 = pipeline.tokenizer_3(["a red 3"], padding="max_length", max_length=128, return_tensors="pt")
assert clip.input_ids.shape == (1, 77) and t5.input_ids.shape == (1, 128)
for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
    assert encoder(clip.input_ids)[0].isfinite().all()
assert pipeline.text_encoder_3(t5.input_ids)[0].isfinite().all()
images = pipeline(
    "a red 3", height=16, width=16, max_sequence_length=10, num_inference_steps=4, output_type="pt",
    latents=torch.load(sys.argv[2]),
).images
torch.save(images, sys.argv[3])
"""


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("folder", [BASE, PLATEAU_BASE])
def test_folder_is_small_and_holds_safetensors_only(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}


def test_the_base_at_its_plateau_is_the_other_one_with_another_transformer():
    names = {path.relative_to(BASE) for path in BASE.rglob("*") if path.is_file()}
    assert names == {path.relative_to(PLATEAU_BASE) for path in PLATEAU_BASE.rglob("*") if path.is_file()}
    others = {str(name) for name in names if (BASE / name).read_bytes() != (PLATEAU_BASE / name).read_bytes()}
    assert others == {"transformer/diffusion_pytorch_model.safetensors", "training_facts.json"}


def test_samples(pipeline):
    images = pipeline(
        ["a red 3", "a 4 left of a 7"],
        height=16,
        width=16,
        max_sequence_length=10,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all() and images.std() > 0


def test_every_caption_fits_and_has_its_own_tokens(pipeline):
    rng = np.random.default_rng(0)
    texts = sorted({draw_caption(rng, kind).text for kind in KINDS for _ in range(100)})
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        ids = tokenizer(texts).input_ids
        assert max(map(len, ids)) <= 10
        assert len(set(map(tuple, ids))) == len(texts)
        # Whole words: "a red 3 left of a green 7" is eight tokens beside the special ones.
        assert len(tokenizer("a red 3 left of a green 7", add_special_tokens=False).input_ids) == 8
    assert pipeline.tokenizer_3.unk_token_id not in np.concatenate(pipeline.tokenizer_3(texts).input_ids)


def test_clip_tokenizers_have_the_files_of_older_versions_and_t5s_their_class():
    for folder, parts in ((BASE, ("tokenizer", "tokenizer_2")), (FLUX_BASE, ("tokenizer",))):
        for part in parts:
            model = json.loads((folder / part / "tokenizer.json").read_text())["model"]
            assert json.loads((folder / part / "vocab.json").read_text()) == model["vocab"]
            merges = (folder / part / "merges.txt").read_text().splitlines()
            assert merges[0].startswith("#version") and [m.split(" ") for m in merges[1:]] == model["merges"]
        index = json.loads((folder / "model_index.json").read_text())
        last = max(part for part in index if part.startswith("tokenizer"))
        config = json.loads((folder / last / "tokenizer_config.json").read_text())
        assert index[last][1] == config["tokenizer_class"] == "T5TokenizerFast"


@torch.no_grad()
def test_clips_take_the_77_tokens_that_trainers_pad_to_and_answer_as_before_to_shorter_texts(pipeline):
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        long, short = (
            pipeline.tokenizer(
                ["a red 3"], padding="max_length", max_length=length, return_tensors="pt"
            ).input_ids
            for length in (77, 10)
        )
        of_long, of_short = (encoder(ids, output_hidden_states=True) for ids in (long, short))
        assert torch.allclose(of_long.text_embeds, of_short.text_embeds, atol=1e-5)
        assert torch.allclose(of_long.hidden_states[-2][:, :10], of_short.hidden_states[-2], atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_versions_that_trainers_pin_draw_the_same(pipeline, tmp_path):
    """In an environment of its own, with the torch of this one behind it."""
    python = tmp_path / "pinned" / "bin" / "python"
    venv.create(tmp_path / "pinned", with_pip=True)
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PINNED], **run)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PINNED_ALONE], **run)
    [packages] = (tmp_path / "pinned").glob("lib/python*/site-packages")
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    torch.save(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "noise.pt")
    drawn = []
    for program in (sys.executable, python):
        files = [tmp_path / "noise.pt", tmp_path / "drawn.pt"]
        subprocess.run([program, "-c", DRAW_AS_TRAINERS_DO, BASE, *files], **run)
        drawn.append(torch.load(tmp_path / "drawn.pt"))
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4


@torch.no_grad()
def test_prompt_embeddings_are_of_unit_size_and_tell_captions_apart(pipeline):
    text, empty, pooled, empty_pooled = pipeline.encode_prompt(
        ["a red 3 left of a green 7", "a green 3 left of a red 7", "a red 7 left of a green 3"],
        None,
        None,
        max_sequence_length=10,
    )
    assert text.shape == empty.shape == (3, 20, 64) and pooled.shape == empty_pooled.shape == (3, 64)
    for part in (text[:, :10], text[:, 10:], pooled):
        assert 0.5 < part.square().mean().sqrt() < 2
        differences = [(part[i] - part[j]).square().mean().sqrt() for i, j in ((0, 1), (0, 2), (1, 2))]
        assert min(differences) > 0.2


@torch.no_grad()
def test_vae_keeps_what_canvases_say_and_its_latents_are_standard(pipeline):
    prompts = benchmark_prompts(30)
    real = torch.from_numpy(real_canvases(prompts))
    config = pipeline.vae.config
    posterior = pipeline.vae.encode(real * 2 - 1).latent_dist
    latents = (
        posterior.sample(torch.Generator().manual_seed(0)) - config.shift_factor
    ) * config.scaling_factor
    assert latents.shape == (len(real), 4, 8, 8)
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    rebuilt = (decoded / 2 + 0.5).clamp(0, 1)
    assert -10 * (rebuilt - real).square().mean().log10() > 26  # dB
    assert score(rebuilt, prompts).overall.mean > score(real, prompts).overall.mean - 0.03
