"""How far the images of a set are from real ones: FID, KID, precision and recall, kept like scores."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from soar_mega.evaluation.scorers import SET_METRICS
from soar_mega.evaluation.scorers.held_out import distance_to_held_out
from soar_mega.evaluation.scorers.scorer_files import INCEPTION, hash_of_files
from soar_mega.evaluation.suite.one_model import Cell
from soar_mega.evaluation.suite.prompt_sets import PromptSet
from soar_mega.evaluation.suite.store import Store, digest


def check_distances(sets: list[PromptSet], weights_dir: str) -> None:
    """ValueError where a set asks for a distance and what measures it is not there; before the first image."""
    if any(each.settings.real for each in sets):
        SET_METRICS["fid"].check("FID", Path(weights_dir))


def distance(store: Store, cell: Cell, weights_dir: str, device: torch.device) -> dict[str, float]:
    """Of a finished cell, measured once; {} where its set names no real images. By one process.

    Raises:
        ValueError: there are too few images, or the network that looks at them cannot be read.
    """
    real = cell.prompt_set.settings.real
    if real is None:
        return {}
    listing = sorted((path.name, path.stat().st_size) for path in real.rglob("*") if path.is_file())
    network = hash_of_files([Path(weights_dir) / INCEPTION.path])
    seen = {"real": listing, "network": network}
    said = {"images": cell.hash, "prompts": cell.prompt_set.hash, **seen}
    name = f"distances/{cell.folder}/{cell.prompt_set.name}-{digest(said)}.json"
    known = store.read_json(name)
    if known is None:
        # the same real images for every model and every point
        features = store.path / "distances" / f"real-{digest(seen)}"
        # of this set's prompts: those that were in its file before have left their images in the folder
        with TemporaryDirectory() as folder:
            for task in cell.prompt_set.tasks:
                Path(folder, f"{task.name}.png").symlink_to(cell.images.path(task.name).resolve())
            measured = distance_to_held_out(Path(folder), real, Path(weights_dir), str(device), features)
        known = {"distances": measured}
        store.write_json(name, known)
    found: dict[str, float] = known["distances"]
    return found
