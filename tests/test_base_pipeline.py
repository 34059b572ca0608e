"""The committed tiny pipeline: complete, small, and fit for the data it was made for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from soar_mega.data.canvases import KINDS, draw_caption
from soar_mega.evaluation.benchmark import benchmark_prompts, real_canvases, score

BASE = Path(__file__).parents[1] / "recipes" / "tiny" / "base"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_small_and_holds_safetensors_only():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


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
