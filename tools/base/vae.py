"""Trains the VAE of the tiny pipeline: diffusers' AutoencoderKL of factor 2 on canvases."""

import logging

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from soar_mega.examples.digits.canvases import PIXEL_NOISE, make_canvas

log = logging.getLogger(__name__)

STEPS, BATCH, LEARNING_RATE, KL_WEIGHT = 600, 48, 3e-3, 2e-4


def canvas_images(
    seed: int, start: int, count: int, *, noise: float = 0.0, split: str = "generator"
) -> Tensor:
    """Canvases as the VAE takes them: [count, 3, 16, 16] in [-1, 1]."""
    images = np.stack([make_canvas(seed, start + i, split=split).image for i in range(count)])
    if noise:
        rng = np.random.default_rng([seed, start, 1])
        images = np.clip(images + noise * rng.standard_normal(images.shape, dtype=np.float32), 0.0, 1.0)
    return torch.from_numpy(images) * 2 - 1


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(seed: int = 0) -> AutoencoderKL:
    """MSE + KL_WEIGHT x KL per latent element, one-cycle AdamW; then shift and scale make latents standard."""
    torch.manual_seed(seed)
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        # Half the batch carries the pixel noise of the pretraining images; the decoder is to remove it.
        clean = canvas_images(seed, step * BATCH, BATCH)
        noisy = canvas_images(seed, step * BATCH, BATCH // 2, noise=PIXEL_NOISE)
        posterior = vae.encode(torch.cat([noisy, clean[BATCH // 2 :]])).latent_dist
        mse = (vae.decode(posterior.sample()).sample - clean).square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (mse + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            psnr = -10 * np.log10(mse.item() / 4)
            log.info(
                "VAE step %d/%d | mse %.5f (%.1f dB) | kl %.3f", step + 1, STEPS, mse.item(), psnr, kl.item()
            )
    return standardise(vae.eval())


@torch.no_grad()
def standardise(vae: AutoencoderKL) -> AutoencoderKL:
    """Sets shift_factor and scaling_factor so that (z - shift) * scaling has mean 0 and variance 1 over canvases."""
    latents = vae.encode(canvas_images(seed=1, start=0, count=512, noise=PIXEL_NOISE)).latent_dist.sample()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae
