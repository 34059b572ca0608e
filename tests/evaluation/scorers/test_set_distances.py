"""Distances to a held-out set: what is refused, and where torch-fidelity is installed, FID by its formula."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soar_mega.evaluation.scorers.held_out import distance_to_held_out
from soar_mega.evaluation.scorers.scorer_files import INCEPTION

FIDELITY = all(importlib.util.find_spec(name) for name in ("torch_fidelity", "torchvision"))
NEEDS_FIDELITY = pytest.mark.skipif(
    not FIDELITY, reason="torch-fidelity is not installed: no distance was computed"
)


def write_images(folder: Path, count: int, brightness: int) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(brightness)
    for i in range(count):
        pixels = noise.integers(0, 100, (32, 32, 3)) + brightness
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)FID lacks.*toshas/torch-fidelity/weights-inception-2015-12-05"
    ):
        distance_to_held_out(tmp_path, tmp_path, tmp_path)


@NEEDS_FIDELITY
def test_fid_is_its_formula_on_the_features(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "weights" / INCEPTION.path
    path.parent.mkdir(parents=True)
    network = random_inception(FeatureExtractorInceptionV3, path)
    a = write_images(tmp_path / "a" / "below", 6, 0).parent
    b = write_images(tmp_path / "b" / "below", 5, 80).parent
    found = distance_to_held_out(a, b, tmp_path / "weights")
    (mean_a, spread_a), (mean_b, spread_b) = (moments(network, folder) for folder in (a, b))
    # The trace of the root of the product of the covariances is a sum of singular values of a small matrix.
    expected = ((mean_a - mean_b) ** 2).sum() + (spread_a**2).sum() + (spread_b**2).sum()
    expected -= 2 * np.linalg.svd(spread_a @ spread_b.T, compute_uv=False).sum()
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    features = tmp_path / "kept" / "real"
    assert distance_to_held_out(a, b, tmp_path / "weights", features=features) == found
    shutil.move(b, tmp_path / "aside")
    write_images(b / "below", 5, 30)  # others, and what was kept of the first ones is taken
    assert distance_to_held_out(a, b, tmp_path / "weights", features=features) == found
    assert distance_to_held_out(a, b, tmp_path / "weights")["fid"] != found["fid"]
    same = distance_to_held_out(a, a, tmp_path / "weights")
    assert (same["precision"], same["recall"]) == (1, 1) and abs(same["kid"]) < 1e-6
    with pytest.raises(ValueError, match="few holds 3 images; a distance between sets needs at least 4"):
        distance_to_held_out(write_images(tmp_path / "few", 3, 1), a, tmp_path / "weights")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        distance_to_held_out(a, b, tmp_path / "weights")


def random_inception(cls: type, path: Path) -> torch.nn.Module:
    """A network of this class, which can only be made from a file: the first one is of the shapes that it tells."""

    class Bare(cls):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state: object, *more: object, **named: object) -> None:  # type: ignore[override]
            pass

    torch.save({}, path)
    torch.manual_seed(0)
    network = Bare("random", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return network


def moments(network: torch.nn.Module, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    pictures = [np.array(Image.open(file)) for file in sorted(folder.rglob("*.png"))]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network(images)[0].double().numpy()
    mean = features.mean(0)
    return mean, (features - mean) / np.sqrt(len(features) - 1)
