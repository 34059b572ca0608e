"""Losses as they were recorded, per version of torch; they catch a change of the code that nobody meant."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT


def assert_golden(recorded_in: Path, losses: list[float], base: str = "base") -> None:
    """The losses of a run from a pipeline in recipes/tiny; SOAR_MEGA_RECORD_GOLDEN=1 records them."""
    weights = ROOT / "recipes/tiny" / base / "transformer/diffusion_pytorch_model.safetensors"
    model = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    version = torch.__version__.split("+")[0]
    if os.environ.get("SOAR_MEGA_RECORD_GOLDEN") == "1":
        known = json.loads(recorded_in.read_text()) if recorded_in.exists() else {}
        known = {key: value for key, value in known.items() if value["model"] == model}
        recorded_in.write_text(
            json.dumps(known | {version: {"model": model, "losses": losses}}, indent=1) + "\n"
        )
    how = "look at why, then record with SOAR_MEGA_RECORD_GOLDEN=1"
    recorded = json.loads(recorded_in.read_text()).get(version)
    if recorded is None:
        pytest.skip(f"no losses recorded for torch {version}: {how}")
    assert recorded["model"] == model, f"recipes/tiny/{base} was trained anew: {how}"
    assert losses == pytest.approx(recorded["losses"], rel=1e-3), how
