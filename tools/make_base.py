"""Makes the tiny SD3 pipeline of recipes/tiny/base from nothing but scikit-learn's digits.

    python tools/make_base.py --encoders    VAE and text encoders, with a transformer of random weights (3 minutes)
"""

import argparse
import logging
import os
from pathlib import Path

import torch
from base.text import build_clip, build_t5, train_encoder
from base.vae import train_vae
from base.vocabulary import clip_tokenizer, t5_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

BASE = Path(__file__).parents[1] / "recipes" / "tiny" / "base"
SEED = 0


def build_transformer() -> SD3Transformer2DModel:
    """4 layers of 4 heads x 24 on 16 image tokens: TP 1, 2, 4 and PP 1, 2, 4 apply."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        caption_projection_dim=96,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def train_encoders(folder: Path) -> None:
    """Writes the whole pipeline folder, the transformer with random weights."""
    torch.manual_seed(SEED)
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        vae=train_vae(SEED),
        text_encoder=train_encoder(build_clip(tokenizer), tokenizer, seed=1),
        text_encoder_2=train_encoder(build_clip(tokenizer_2), tokenizer_2, seed=2),
        text_encoder_3=train_encoder(build_t5(tokenizer_3), tokenizer_3, seed=3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", action="store_true", help="train the VAE and text encoders, then stop")
    parser.add_argument("--out", type=Path, default=BASE, help="the pipeline folder (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    train_encoders(args.out)


if __name__ == "__main__":
    main()
