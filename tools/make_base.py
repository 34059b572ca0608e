"""Makes the tiny pipelines of recipes/tiny from scikit-learn's digits: base (SD3), plateau_base (the same one, trained
on for the study) and flux_base (FLUX).

    python tools/make_base.py                  everything, as `make base` does
    python tools/make_base.py --encoders       only the VAE and the text encoders, with transformers of random weights
    python tools/make_base.py --transformer    only the transformers; goes on where it was interrupted
    python tools/make_base.py --plateau        only plateau_base, from the base that is there; likewise
    python tools/make_base.py --flux           only FLUX's transformer; likewise

The transformer walks the road of every other run: an image folder, `soar-mega prepare`, `soar-mega train`, an export.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from base.flux import write_pipeline
from base.older_readers import add_tokenizer_files, with_positions
from base.text import build_clip, build_t5, train_encoder
from base.vae import train_vae
from base.vocabulary import clip_tokenizer, t5_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.training_facts import FILE as FACTS

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes" / "tiny" / "base"
PLATEAU_BASE = ROOT / "recipes" / "tiny" / "plateau_base"
FLUX_BASE = ROOT / "recipes" / "tiny" / "flux_base"
WORK = ROOT / "runs" / "base"
SEED = 0


@dataclass(frozen=True)
class Training:
    """A recipe of recipes/tiny, the canvases that it reads, and the pipelines that it starts from and makes."""

    name: str  # the recipe's, and the run's
    start: Path
    result: Path
    images: int
    seed: int
    noisy: bool = True


PRETRAINING = Training("pretrain", BASE, BASE, 24_000, seed=1)
PLATEAU = Training("plateau", BASE, PLATEAU_BASE, 32_000, seed=5, noisy=False)
FLUX = Training("flux_pretrain", FLUX_BASE, FLUX_BASE, 24_000, seed=1)


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


def train_encoders() -> None:
    """Writes both pipeline folders whole, their transformers with random weights; FLUX has the encoders of SD3."""
    # Shards and runs of earlier encoders are of no use to the new ones.
    shutil.rmtree(WORK, ignore_errors=True)
    torch.manual_seed(SEED)
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        vae=train_vae(SEED),
        text_encoder=with_positions(train_encoder(build_clip(tokenizer), tokenizer, seed=1)),
        text_encoder_2=with_positions(train_encoder(build_clip(tokenizer_2), tokenizer_2, seed=2)),
        text_encoder_3=train_encoder(build_t5(tokenizer_3), tokenizer_3, seed=3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.save_pretrained(BASE, safe_serialization=True)
    add_tokenizer_files(BASE)
    write_pipeline(BASE, FLUX_BASE, SEED)
    add_tokenizer_files(FLUX_BASE)


def train(training: Training) -> None:
    """Trains the transformer, and puts its EMA into the resulting pipeline's folder."""
    images, shards = WORK / f"{training.name}_images", WORK / f"{training.name}_shards"
    log.info("writing %d canvases to %s", training.images, images)
    write_image_folder(images, training.images, seed=training.seed, noisy=training.noisy)
    _soar_mega(
        "prepare", str(images), str(shards), "--pipeline-dir", str(training.start),
        "--resolution", "16", "--batch-size", "64",
    )  # fmt: skip
    _soar_mega("train", f"recipes/tiny/{training.name}.yaml")
    if training.result != training.start:
        shutil.copytree(training.start, training.result, dirs_exist_ok=True)
    export = WORK / training.name / "export_ema"
    shutil.copytree(export / "transformer", training.result / "transformer", dirs_exist_ok=True)
    shutil.copyfile(export / FACTS, training.result / FACTS)
    log.info("the tiny pipeline is complete: %s", training.result)


def _soar_mega(*arguments: str) -> None:
    command = [sys.executable, "-m", "soar_mega", *arguments]
    log.info("%s", " ".join(command))
    # The paths of recipes start at the repository's root.
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--encoders", action="store_true", help="only the VAE and the text encoders")
    part.add_argument("--transformer", action="store_true", help="only the transformers")
    part.add_argument("--plateau", action="store_true", help="only plateau_base, from the base that is there")
    part.add_argument("--flux", action="store_true", help="only FLUX's transformer")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    trainings = [PLATEAU] if args.plateau else [FLUX] if args.flux else [PRETRAINING, PLATEAU, FLUX]
    if not (args.transformer or args.plateau or args.flux):
        train_encoders()
    for training in [] if args.encoders else trainings:
        train(training)


if __name__ == "__main__":
    main()
