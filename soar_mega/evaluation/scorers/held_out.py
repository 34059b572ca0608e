"""How close a set of images is to a held-out set: FID, KID, precision and recall by torch-fidelity. It judges no single
image, so it is no scorer."""

from collections.abc import Mapping
from pathlib import Path

import torch

from soar_mega.evaluation.scorers import SET_METRICS
from soar_mega.evaluation.scorers.scorer_files import INCEPTION
from soar_mega.evaluation.scorers.state import read_state

NEIGHBOURS = 3
KID_SUBSET = 1000
SUFFIXES = {".png", ".jpg", ".jpeg"}
NAMES = {
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


def distance_to_held_out(
    images: Path, held_out: Path, weights_dir: Path, device: str = "cpu", features: Path | None = None
) -> dict[str, float]:
    """fid, kid, kid_std (over its subsets), precision and recall of the images in a folder and all below it.

    All are of InceptionV3's last features, precision and recall too (their authors have VGG-16's), with 3 neighbours.
    KID is the mean over 100 subsets of 1000 images, or of as many as the smaller set has. All images of a set have one
    size.

    Args:
        features: beginning of the names of files in which what the network says of the held-out images is kept, and
            where it is looked for first; None: it is computed.

    Raises:
        ValueError: torch-fidelity is not installed, its network's file is missing or damaged, or a set is too small.
    """
    SET_METRICS["fid"].check("FID", weights_dir)
    path = weights_dir / INCEPTION.path
    read_state(path)  # or a damaged file is told by pickle
    sizes = [_count(folder) for folder in (images, held_out)]
    import torch_fidelity

    found: Mapping[str, float] = torch_fidelity.calculate_metrics(
        input1=str(images),
        input2=str(held_out),
        samples_find_deep=True,
        feature_extractor="inception-v3-compat",  # of all; alone, precision and recall would download a VGG-16
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=min(KID_SUBSET, *sizes),
        prc_neighborhood=NEIGHBOURS,
        feature_extractor_weights_path=str(path),
        cuda=torch.device(device).type == "cuda",
        # without a name nothing is kept: torch-fidelity would find it by the folder's path alone, in the home folder
        cache=features is not None,
        cache_root=str(features.parent) if features else None,
        input2_cache_name=features.name if features else None,
        verbose=False,
    )
    return {ours: float(found[theirs]) for theirs, ours in NAMES.items()}


def _count(folder: Path) -> int:
    count = sum(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{folder} holds {count} images; a distance between sets needs at least {NEIGHBOURS + 1}"
        )
    return count
