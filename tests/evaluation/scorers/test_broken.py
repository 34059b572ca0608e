"""What is no image is told apart from a dark one."""

import torch

from soar_mega.evaluation.scorers.broken import what_is_broken


def test_black_and_nan_images_are_told() -> None:
    images = torch.zeros(5, 3, 4, 4)
    images[1, 2, 3, 3] = 1 / 255  # one pixel that a file keeps
    images[2, 0, 0, 0] = torch.nan
    images[3] = 0.4 / 255
    images[4, 1, 1, 1] = torch.inf
    assert what_is_broken(images) == ["black", "", "NaN", "black", "NaN"]
