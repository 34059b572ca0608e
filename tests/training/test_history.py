"""The training behind weights: steps, samples and operations of each run of their line."""

import json
from pathlib import Path

import pytest

from soar_mega.checkpoints.checkpoint import FORMAT
from soar_mega.models.common.flops import Tokens, forward_work, step_work
from soar_mega.models.family import read_sizes
from soar_mega.recipe import recipe_to_yaml
from soar_mega.stages import CollectingConfig, load_recipe
from soar_mega.training.history import history

ROOT = Path(__file__).parents[2]
OVERRIDES = {"sft.yaml": ["data.path=gone"], "flow_grpo.yaml": ["stage.updates_per_sample=2"]}


def _run(folder: Path, recipe: str, samples: int, parent: Path | None) -> Path:
    """What a finished run leaves, and its export."""
    (folder / "export").mkdir(parents=True)
    said = recipe_to_yaml(load_recipe(ROOT / "recipes" / "tiny" / recipe, OVERRIDES[recipe]))
    (folder / "run_config.yaml").write_text(said)
    found = None if parent is None else {"path": str(parent), "sha256": "", "lineage": None}
    starts = [{"time": "2026-01-01T00:00:00Z", "code": "0.1"}]
    (folder / "lineage.json").write_text(json.dumps({"parent": found, "starts": starts}))
    (folder / "complete.json").write_text(json.dumps({"iteration": 10, "consumed_samples": samples}))
    return folder / "export"


def test_the_line_of_a_run_and_the_work_of_rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RL is counted with the drawing of its samples; where a data set is gone the work is not known."""
    monkeypatch.chdir(ROOT)
    start = _run(tmp_path / "sft", "sft.yaml", 40, ROOT / "recipes/tiny/base/transformer")
    export = _run(tmp_path / "rl", "flow_grpo.yaml", 80, start / "transformer")
    rl, sft = history(export)
    assert (sft["run"], sft["stage"], sft["samples"], sft["flops"]) == (
        str(tmp_path / "sft"),
        "sft",
        40,
        None,
    )
    recipe = load_recipe(ROOT / "recipes/tiny/flow_grpo.yaml", OVERRIDES["flow_grpo.yaml"])
    stage, sizes = recipe.stage, read_sizes(ROOT / "recipes/tiny/base")
    assert isinstance(stage, CollectingConfig)
    # 16 x 16 pixels are 8 x 8 latents in patches of 2
    forward = forward_work(sizes, Tokens(image=16, text=20))
    learned = step_work(forward, stage.forwards().answers, stage.forwards().points).total
    drawn = stage.sampling_forwards() / stage.updates_per_sample * forward.total
    assert (rl["iterations"], rl["samples"], rl["flops"]) == (10, 80, 80 * (learned + drawn))


def test_a_run_that_goes_on_from_another_one_counts_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints count all steps of the line; those before are in the row of the other run alone."""
    monkeypatch.chdir(ROOT)
    _run(tmp_path / "first", "flow_grpo.yaml", 40, None)
    export = _run(tmp_path / "second", "flow_grpo.yaml", 80, tmp_path / "first" / "iter_0000004")
    whole = history(export)[0]
    lineage = tmp_path / "second" / "lineage.json"
    said = json.loads(lineage.read_text())
    said["starts"][0]["iteration"] = 4
    lineage.write_text(json.dumps(said))
    checkpoint = tmp_path / "first" / "iter_0000004"
    checkpoint.mkdir()
    described = {"iteration": 4, "consumed_samples": 16, "skipped_steps": 0, "model": {}, "kept_weights": []}
    (checkpoint / "checkpoint.json").write_text(json.dumps(described | {"loader": None, "format": FORMAT}))
    second, first = history(export)
    assert (second["iterations"], second["samples"]) == (10 - 4, 80 - 16)
    assert second["flops"] == pytest.approx(whole["flops"] * (80 - 16) / 80)
    assert (first["iterations"], first["samples"]) == (4, 16)


def test_weights_that_no_run_made_have_no_history(tmp_path: Path) -> None:
    assert history(ROOT / "recipes/tiny/base") == []
    own = _run(tmp_path / "run", "sft.yaml", 8, tmp_path / "run" / "export")  # a lineage that bites its tail
    assert len(history(own)) == 1
