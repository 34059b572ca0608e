"""Whole pipeline folders."""

import json
from pathlib import Path

import pytest
import torch
from peer_folder import read_tensors

from soar_mega.convert import load_diffusers, read_pipeline_config, save_pipeline, scheduler_shift
from soar_mega.models.names import named_tensors

BASE = Path(__file__).parents[2] / "recipes/tiny/base"


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "transformer"
    }


def test_only_the_transformer_is_new(tmp_path):
    model = load_diffusers(BASE)
    held = named_tensors(model)

    def changed(name):
        return torch.full_like(held[name], 0.25) if name == "proj_out.bias" else held[name]

    for _ in range(2):  # the second time an older folder is replaced
        save_pipeline(model, BASE, tmp_path / "export", tensors=changed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    assert files_below(tmp_path / "export") == files_below(BASE)
    assert read_pipeline_config(tmp_path / "export") == model.sizes
    ours, theirs = read_tensors(tmp_path / "export/transformer"), read_tensors(BASE / "transformer")
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == ["proj_out.bias"]
    assert torch.equal(ours["proj_out.bias"], torch.full_like(theirs["proj_out.bias"], 0.25))


def test_an_older_folder_survives_a_failed_export(tmp_path):
    model = load_diffusers(BASE)
    save_pipeline(model, BASE, tmp_path / "export")
    with pytest.raises(OSError, match="nowhere"):
        save_pipeline(model, tmp_path / "nowhere", tmp_path / "export")
    assert (tmp_path / "export/model_index.json").exists()


def test_scheduler_shift(tmp_path):
    assert scheduler_shift(BASE) == 1.0
    with pytest.raises(ValueError, match="scheduler_config.json cannot be read.*stage.shift"):
        scheduler_shift(tmp_path)
    (tmp_path / "scheduler").mkdir()
    config = tmp_path / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"shift": 3.0}))
    assert scheduler_shift(tmp_path) == 3.0
    config.write_text(json.dumps({"use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        scheduler_shift(tmp_path)
