"""The run folder: its lock and its marker."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from soar_mega.checkpoints.lineage import parent
from soar_mega.checkpoints.manifest import MANIFEST
from soar_mega.checkpoints.recipes import tell_differences, write_recipe
from soar_mega.checkpoints.run_folder import DESCRIPTION, LOCK, MARKER, RunFolder, check_place
from soar_mega.config import CheckpointConfig, Recipe
from soar_mega.stages import SoarConfig

HOLDER = """
import sys
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.stages import SoarConfig
with RunFolder(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        expected = rf"{tmp_path}: another run is writing .*process {holder.pid} on"
        with pytest.raises(ValueError, match=expected), RunFolder(tmp_path).lock():
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path).lock():  # a killed run does not leave its lock behind
        pass
    assert (tmp_path / LOCK).read_text().count("process") == 1  # the one that holds it


def test_a_run_that_starts_from_a_checkpoint_names_it_by_its_manifest(tmp_path: Path) -> None:
    """All of it would be read by one process while the others wait; it has just been compared with its manifest."""
    folder = tmp_path / "iter_0000100"
    folder.mkdir()
    for name in (DESCRIPTION, MANIFEST, "__0_0.distcp"):
        (folder / name).write_text(name)
    recipe = Recipe(stage=SoarConfig(), checkpoint=CheckpointConfig(load=str(folder), save="runs/x"))
    found = parent(recipe)
    assert found is not None and found["sha256"] == hashlib.sha256(MANIFEST.encode()).hexdigest()


def test_marker(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.complete() is None
    run.mark_complete(10, 80)
    assert run.complete() == {"iteration": 10, "consumed_samples": 80}
    run.reopen()
    assert run.complete() is None
    for damaged in ('{"iteration": -1, "consumed_samples": 80}', '{"iteration": 10}'):
        (tmp_path / MARKER).write_text(damaged)
        with pytest.raises(ValueError, match=MARKER):
            run.complete()


def test_the_tracker_names_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.latest() is None and run.candidates() == []
    run.checkpoint(1).mkdir()
    run.set_latest(1)
    assert run.latest() == 1
    run.set_latest(2)
    with pytest.raises(ValueError, match=r"names iteration 2, .* complete checkpoints here: \[1\]"):
        run.latest()


def test_damaged_checkpoints_are_set_aside_side_by_side(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("iter_0000007.broken", "iter_0000007.broken-2", "iter_0000007.broken-3"):
        run.checkpoint(7).mkdir()
        assert run.set_aside(7) == tmp_path / name
    assert run.set_aside(7) is None and len(list(tmp_path.iterdir())) == 3


def test_what_is_made_of_a_checkpoint_replaces_nothing_of_its_run_but_an_export(tmp_path: Path) -> None:
    checkpoint = RunFolder(tmp_path / "run").checkpoint(7)
    checkpoint.mkdir(parents=True)
    for out in (checkpoint, checkpoint / "made", tmp_path):
        with pytest.raises(ValueError, match="the checkpoint"):
            check_place(out, checkpoint)
    check_place(tmp_path / "run/samples", checkpoint)  # a checkpoint alone, in a folder of something else
    (tmp_path / "run" / LOCK).touch()
    with pytest.raises(ValueError, match="the run"):
        check_place(tmp_path / "run/samples", checkpoint)
    for out in ("run/export", "run/export_7/vae", "elsewhere"):
        check_place(tmp_path / out, checkpoint)


def test_leftovers_of_a_crash_are_not_checkpoints_and_are_cleaned(tmp_path: Path) -> None:
    kept = ("iter_0000001", "iter_0000004.broken", "iter_notes.tmp", "samples")
    for name in (*kept, "iter_0000002.tmp", "iter_0000003.deleted"):
        (tmp_path / name / "inner").mkdir(parents=True)
    run = RunFolder(tmp_path)
    assert run.iterations() == [1]
    run.clean()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)


def test_a_checkpoint_that_was_moved_elsewhere_stays_there(tmp_path: Path) -> None:
    """With a link in its place, also where that was renamed to be removed."""
    run, moved = RunFolder(tmp_path / "run"), tmp_path / "archive" / DESCRIPTION
    for folder in (moved.parent, run.checkpoint(1), run.checkpoint(3)):
        folder.mkdir(parents=True)
        (folder / DESCRIPTION).touch()
    run.checkpoint(2).symlink_to(moved.parent)
    run.checkpoint(0).with_suffix(".deleted").symlink_to(moved.parent)
    run.set_latest(3)
    assert [folder.name for folder in run.prune(1)] == ["iter_0000001.deleted"]
    run.clean()
    assert moved.is_file() and run.iterations() == [2, 3] and len(list(run.path.iterdir())) == 3


@pytest.mark.parametrize("name", ["iter_0000500", "iter_0000500.tmp", "run_config.yaml", "complete.json"])
def test_a_folder_that_only_looks_like_a_run(tmp_path: Path, name: str) -> None:
    """What a run removes or replaces by its name may be another program's, as Megatron-LM's checkpoints are."""
    (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "notes").touch()
    with (
        pytest.raises(ValueError, match=f"{name}, which this program did not write"),
        RunFolder(tmp_path).lock(),
    ):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, "notes"])
    (tmp_path / LOCK).touch()
    with RunFolder(tmp_path).lock():
        pass


def test_a_checkpoint_that_was_copied_to_a_new_place_makes_it_a_run(tmp_path: Path) -> None:
    (tmp_path / "iter_0000500").mkdir()
    (tmp_path / "iter_0000500" / DESCRIPTION).touch()
    RunFolder(tmp_path).set_latest(500)
    with RunFolder(tmp_path).lock():
        pass


@pytest.mark.parametrize(
    ("keep", "retain", "left"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6]),
        (1, 0, [2]),
        (3, 0, [1, 2, 6]),
        (1, 3, [2, 3, 6]),
        (0, 3, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_pruning_never_removes_the_one_to_resume_from(
    tmp_path: Path, keep: int, retain: int, left: list[int]
) -> None:
    run = RunFolder(tmp_path)
    for iteration in (1, 2, 3, 4, 5, 6):
        run.checkpoint(iteration).mkdir()
        (run.checkpoint(iteration) / DESCRIPTION).touch()
    run.set_latest(2)
    (tmp_path / "iter_0000000").mkdir()  # not written by this program
    taken = run.prune(keep, retain)
    assert sorted(folder.name for folder in taken) == [
        f"iter_{i:07d}.deleted" for i in range(1, 7) if i not in left
    ]
    assert run.iterations() == [0, *left]


def test_the_recipes_of_earlier_starts_are_kept_and_their_differences_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe = RunFolder(tmp_path), Recipe(stage=SoarConfig())
    write_recipe(run, recipe)
    write_recipe(run, recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["run_config.yaml"] and not caplog.text
    first = (tmp_path / "run_config.yaml").read_text()
    recipe.stage.shift, recipe.model.pipeline_dir, recipe.model.dtype = 2.0, "another", "fp32"
    write_recipe(run, recipe)
    assert (tmp_path / "run_config.1.yaml").read_text() == first
    for told in (
        "model.pipeline_dir was '' and is 'another'",
        "model.dtype was 'bf16' and is 'fp32'",
        "stage.shift was None and is 2.0",
    ):
        assert told in caplog.text
    assert caplog.text.count(" was ") == 3
    recipe.stage.shift = 3.0
    write_recipe(run, recipe)
    assert "shift: 2.0" in (tmp_path / "run_config.2.yaml").read_text()
    assert "stage.shift was 2.0 and is 3.0" in caplog.text


def test_a_run_that_loads_another_one_tells_in_what_they_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is saved and what it loads aside."""
    recipe = Recipe(stage=SoarConfig())
    recipe.checkpoint.save = str(tmp_path / "a")
    (tmp_path / "a").mkdir()
    write_recipe(RunFolder(tmp_path / "a"), recipe)
    checkpoint = tmp_path / "a" / "iter_0000100"
    recipe.checkpoint.save, recipe.checkpoint.load = str(tmp_path / "b"), str(tmp_path / "a")
    tell_differences(checkpoint, recipe)
    tell_differences(tmp_path / "alone" / "iter_0000100", recipe)
    assert not caplog.text
    recipe.stage.num_auxiliary_points, recipe.model.dtype = 3, "fp32"
    tell_differences(checkpoint, recipe)
    assert f"the recipe is not that of {checkpoint}, which is loaded:" in caplog.text
    assert (
        "stage.num_auxiliary_points was " in caplog.text
        and "model.dtype was 'bf16' and is 'fp32'" in caplog.text
    )
    assert caplog.text.count(" was ") == 2
