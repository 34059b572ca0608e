"""Where a run comes from: the weights it started from, its recipe, and the code of each of its starts.

lineage.json of a run folder:
    parent   what the first start loaded: its path, its hash (of a checkpoint its manifest's), and the lineage.json of
             the run that wrote it, if any
    starts   one entry per start: time, iteration, hash of run_config.yaml, code version, processes, job number
"""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import soar_mega
from soar_mega.checkpoints.manifest import MANIFEST
from soar_mega.checkpoints.resume import find_checkpoint, other_run
from soar_mega.checkpoints.run_folder import RunFolder, write_durably
from soar_mega.config import Recipe
from soar_mega.outputs import MARKER
from soar_mega.recipe import recipe_to_yaml
from soar_mega.user_files import read_object

FILE = "lineage.json"
ADVICE = "move it away, and the run goes on without what it was to tell"

Json = dict[str, Any]


def record_start(run: RunFolder, recipe: Recipe, processes: int, iteration: int) -> None:
    """Adds this start to the run folder's lineage.json; the first start also hashes the weights that it loads.

    Called by one process. Takes a few seconds for a model of some GB, once per run.

    Args:
        iteration: that it goes on from.
    """
    path = run.path / FILE
    known = read_lineage(path) if path.exists() else {"parent": parent(recipe), "starts": []}
    known["starts"].append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "iteration": iteration,
            "recipe": hashlib.sha256(recipe_to_yaml(recipe).encode()).hexdigest(),
            "code": code_version(),
            "processes": processes,
            "job": os.environ.get("SLURM_JOB_ID"),
        }
    )
    write_durably(path, json.dumps(known, indent=1) + "\n")


def parent(recipe: Recipe) -> Json | None:
    """The weights that a fresh run of the recipe starts from; None for random ones."""
    load = other_run(recipe.checkpoint)
    if load:
        folder = find_checkpoint(load)
    elif recipe.model.pipeline_dir and recipe.model.init == "pretrained":
        folder = Path(recipe.model.pipeline_dir) / "transformer"
    else:
        return None
    # an export lies in its run folder: runs/x/export/transformer; so does a checkpoint: runs/x/iter_0000500
    ancestors = [above / FILE for above in (folder.parent, folder.parent.parent)]
    written_by = next((read_lineage(file) for file in ancestors if file.exists()), None)
    # of a checkpoint its manifest, which has the hash of each file: with its optimizer it may be hundreds of GB
    weights = folder / MANIFEST if (folder / MANIFEST).is_file() else folder
    return {"path": str(folder), "sha256": content_hash(weights), "lineage": written_by}


def read_lineage(path: Path) -> Json:
    """A run's lineage.json. ValueError naming what is not as `record_start` writes it."""
    lineage = read_object(path, ADVICE)
    at, said = "", lineage
    while True:
        parent, starts = said.get("parent"), said.get("starts")
        if not isinstance(starts, list) or not starts or not all(map(_is_start, starts)):
            raise ValueError(f"{path}: {at}starts is not a list of times and code versions: {ADVICE}")
        if parent is None:
            return lineage
        if not isinstance(parent, dict) or not isinstance(parent.get("path"), str):
            raise ValueError(f"{path}: {at}parent is neither null nor an object with a path: {ADVICE}")
        if parent.get("lineage") is None:
            return lineage
        at, said = f"{at}parent.lineage.", parent["lineage"]
        if not isinstance(said, dict):
            raise ValueError(f"{path}: {at.removesuffix('.')} is neither null nor an object: {ADVICE}")


def _is_start(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("time", "code"))


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and their files' hashes, in order.

    Without the marker of an output folder: there are times in it.

    Raises:
        FileNotFoundError: there is nothing at this path.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(
        f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file() and f.name != MARKER
    )
    listing = "".join(f"{content_hash(path / name)}  {name}\n" for name in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def code_version() -> str:
    """The version, with the commit where the code is a git checkout and a + where it was changed since."""
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return soar_mega.__version__
    commit = described.stdout.strip() if (root / ".git").exists() and described.returncode == 0 else ""
    return f"{soar_mega.__version__} {commit}".strip()
