"""Damaged checkpoints: every flipped byte is noticed, and a run goes on from the newest good one."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest
from multirank import run_ranks
from packaging.version import Version
from stand_in import check_usable, load, names, save

from soar_mega import distributed
from soar_mega.checkpoints import manifest
from soar_mega.checkpoints.exchange import checkpoint_to_folder
from soar_mega.checkpoints.manifest import MANIFEST
from soar_mega.checkpoints.resume import verify
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import ParallelConfig

FILES = [".metadata", "__0_0.distcp", "checkpoint.json", "manifest.json", "metadata.json"]
if Version(megatron.core.__version__) < Version("0.19"):
    FILES.insert(3, "common.pt")  # later this is a part of __0_0.distcp


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    distributed.start_world(ParallelConfig())
    yield
    distributed.stop_world()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Checkpoints of the iterations 1, 2 and 3."""
    run = RunFolder(tmp_path_factory.mktemp("whole"))
    distributed.start_world(ParallelConfig())
    for iteration in (1, 2, 3):
        save(run, iteration)
    distributed.stop_world()
    assert names(run.checkpoint(3)) == FILES
    return run


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to do damage to."""
    shutil.copytree(whole.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_noticed(run: RunFolder, name: str) -> None:
    """At up to 200 places of each file, the first and the last byte among them."""
    path = run.checkpoint(3) / name
    size = path.stat().st_size
    places = sorted({0, size - 1, *range(0, size, max(1, size // 200))})
    assert manifest.problems(run.checkpoint(3)) == []
    for place in places:
        flip(path, place)
        found = manifest.problems(run.checkpoint(3))
        assert len(found) == 1 and found[0].startswith(f"{path} is damaged"), place
        flip(path, place)
    assert manifest.problems(run.checkpoint(3)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_run_goes_on_from_the_newest_good_checkpoint(
    run: RunFolder, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = run.checkpoint(3) / name
    if damage == "flipped":
        flip(path, path.stat().st_size // 2)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    content = {file.name: file.read_bytes() for file in run.checkpoint(3).iterdir()}
    with caplog.at_level(logging.WARNING):
        check_usable(run, {2})
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(str(path))
    assert f"going on from iteration 2. Kept aside: {run.path}/iter_0000003.broken" in caplog.messages[0]
    assert run.iterations() == [1, 2] and run.latest() == 2
    aside = run.path / "iter_0000003.broken"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == content
    run.clean()
    run.prune(1)
    assert aside.is_dir()
    save(run, 3)
    check_usable(run, {3})


def test_damage_to_several_and_a_second_time(run: RunFolder) -> None:
    flip(run.checkpoint(3) / "metadata.json", 5)
    (run.checkpoint(2) / MANIFEST).unlink()
    check_usable(run, {1})
    save(run, 3)
    flip(run.checkpoint(3) / "metadata.json", 5)
    check_usable(run, {1})
    assert names(run.path) == [
        "iter_0000001",
        "iter_0000002.broken",
        "iter_0000003.broken",
        "iter_0000003.broken-2",
        "latest_checkpointed_iteration.txt",
    ]


def test_when_none_is_good_each_is_told_and_nothing_is_touched(run: RunFolder) -> None:
    flip(run.checkpoint(3) / "__0_0.distcp", 100)
    (run.checkpoint(2) / "metadata.json").unlink()
    (run.checkpoint(1) / "checkpoint.json").write_text("{}")
    before = names(run.path)
    with pytest.raises(ValueError) as failure:
        load(run)
    said = str(failure.value)
    assert said.startswith(f"{run.path}: none of its checkpoints is good: ")
    assert (
        f"{run.path}/iter_0000003/__0_0.distcp is damaged: its SHA-256 is not the one of manifest.json"
        in said
    )
    assert f"{run.path}/iter_0000002/metadata.json is missing" in said
    assert f"{run.path}/iter_0000001/checkpoint.json has 2 bytes instead of " in said
    assert names(run.path) == before and run.latest() == 3


def test_a_missing_folder_and_a_set_back_run(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoint(3))
    check_usable(run, {2})
    assert run.latest() == 2
    save(run, 4)
    run.set_latest(1)  # by hand: newer ones come last
    check_usable(run, {1})
    flip(run.checkpoint(1) / "metadata.json", 5)
    check_usable(run, {4})


def test_an_unreadable_tracker_is_told(run: RunFolder) -> None:
    (run.path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(ValueError, match="holds 'soon' instead of an iteration number"):
        load(run)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("source", ["run", "iter_0000003"])
def test_another_runs_damaged_checkpoint_is_an_error(
    run: RunFolder, tmp_path: Path, finetune: bool, source: str
) -> None:
    flip(run.checkpoint(3) / "__0_0.distcp", 100)
    before = names(run.path)
    path = run.path if source == "run" else run.path / source
    with pytest.raises(ValueError) as failure:
        load(RunFolder(tmp_path), load=str(path), finetune=finetune)
    assert str(failure.value) == (
        f"{run.path}/iter_0000003 is damaged: {run.path}/iter_0000003/__0_0.distcp is damaged: its SHA-256 is not the "
        "one of manifest.json; other checkpoints there: iter_0000001, iter_0000002"
    )
    assert names(run.path) == before


def test_the_shares_of_the_ranks_are_the_whole(run: RunFolder) -> None:
    folder = run.checkpoint(3)
    for name in FILES[:-2]:
        flip(folder / name, 7)
    parts = [manifest.problems(folder, part, 3) for part in range(3)]
    assert sorted(line for part in parts for line in part) == sorted(manifest.problems(folder))
    assert len(manifest.problems(folder)) == len(FILES) - 2 and min(map(len, parts)) >= 1


def on_two_ranks(folder: Path) -> tuple[str, list[str]]:
    """Each rank saves its part; one file is damaged; all ranks say the same."""
    import torch.distributed as dist
    from stand_in import Weights

    distributed.start_world(ParallelConfig())
    run = RunFolder(folder)
    save(run, 1)
    verify(run.checkpoint(1))
    dist.barrier()
    if dist.get_rank() == 1:
        flip(run.checkpoint(1) / "metadata.json", 5)
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError)) as failure:
        load(run)
    assert Weights().current.tolist() == [0.0] * 4
    return str(failure.value), names(run.checkpoint(1))


def test_ranks_agree_on_what_is_damaged(tmp_path: Path) -> None:
    (zero, files), (one, _) = run_ranks(on_two_ranks, 2, tmp_path)
    assert zero.startswith(
        f"{tmp_path}: none of its checkpoints is good: {tmp_path}/iter_0000001/metadata.json is damaged"
    )
    assert one == f"rank 0 failed: {zero}"
    listed = json.loads((tmp_path / "iter_0000001" / MANIFEST).read_text())["files"]
    assert sorted([*listed, MANIFEST]) == files


def test_a_damaged_checkpoint_is_not_converted(run: RunFolder, tmp_path: Path) -> None:
    flip(run.checkpoint(3) / "__0_0.distcp", 100)
    with pytest.raises(ValueError, match="iter_0000003/__0_0.distcp is damaged"):
        checkpoint_to_folder(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
