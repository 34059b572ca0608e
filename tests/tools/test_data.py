"""The data of demo and study: made anew in a folder that a user names, where there may be something else."""

from pathlib import Path

import pytest
from walk.data import _write_images


def test_only_own_images_and_their_shards_are_made_anew(tmp_path: Path) -> None:
    images, shards = tmp_path / "images/train", tmp_path / "shards/train"
    shards.mkdir(parents=True)
    (shards / "mine").touch()
    _write_images(images, shards, 3, 0, "generator")
    assert (shards / "mine").exists(), "they were not made of these images"
    _write_images(images, shards, 2, 0, "generator")
    assert not shards.exists() and len(list(images.glob("*.png"))) == 2
    shards.mkdir()
    (images / "mine.png").touch()
    with pytest.raises(ValueError, match="mine.png"):
        _write_images(images, shards, 3, 0, "generator")
    assert shards.exists() and len(list(images.glob("*.png"))) == 3
