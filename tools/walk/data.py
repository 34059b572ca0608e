"""The built-in canvases as image folders and shards: the data of the demo and of the study."""

import shutil
from pathlib import Path

from walk.commands import Command, run_together, soar_mega

from soar_mega.examples.digits.canvases import write_image_folder
from soar_mega.outputs import MARKER, OutputFolder

TRAIN_SEED, HELD_OUT_SEED = 1000, 2000


def prepare_data(folder: Path, pipeline_dir: Path, train: int, held_out: int, threads: int) -> None:
    """Writes <folder>/images/ and, through `soar-mega prepare`, <folder>/shards/: train and heldout.

    Held-out canvases are drawn from scans of digits that no training canvas holds.

    Raises:
        ValueError: there are images that this program did not write.
    """
    parts = {"train": (train, TRAIN_SEED, "generator"), "heldout": (held_out, HELD_OUT_SEED, "held_out")}
    commands = []
    for name, (count, seed, split) in parts.items():
        images, shards = folder / "images" / name, folder / "shards" / name
        _write_images(images, shards, count, seed, split)
        arguments = soar_mega(
            "prepare", str(images), str(shards), "--pipeline-dir", str(pipeline_dir), "--batch-size", "128"
        )
        commands.append(
            Command(
                name=f"prepare {name}",
                arguments=arguments,
                log=folder / "logs" / f"{name}.log",
                threads=threads,
            )
        )
    run_together(*([command] for command in commands))


def _write_images(images: Path, shards: Path, count: int, seed: int, split: str) -> None:
    """Replaces older images, and with them the shards of these."""
    output = OutputFolder(images)
    output.begin()
    write_image_folder(output.new, count, seed, split=split)
    if (images / MARKER).is_file():
        shutil.rmtree(shards, ignore_errors=True)
    output.publish()
