"""The checkpoint protocol on a small stand-in engine: what a crash, a full disk and a foreign model leave behind."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from stand_in import MODEL, Weights, check_usable, load, names, progress, save

from soar_mega import distributed
from soar_mega.checkpoints import checkpoint
from soar_mega.checkpoints.checkpoint import Progress, Saver
from soar_mega.checkpoints.rank_file import RankFile
from soar_mega.checkpoints.resume import resume
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import CheckpointConfig, ParallelConfig


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    distributed.start_world(ParallelConfig())
    yield
    distributed.stop_world()


def test_round_trip_and_keep_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert load(run)[0] == Progress()
    for iteration in (1, 2, 3):
        save(run, iteration, keep_last=2)
    assert run.iterations() == [2, 3]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (tmp_path / "iter_0000003").is_dir()
    check_usable(run, {3})
    run.set_latest(2)
    check_usable(run, {2})


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_run_that_was_set_back_keeps_its_own_checkpoints(tmp_path: Path, async_save: bool) -> None:
    """Not those of the history that was given up, from which it would go on where its newest one is damaged."""
    run = RunFolder(tmp_path)
    for iteration in (100, 200, 300):
        save(run, iteration)
    (tmp_path / "iter_0000105").mkdir()  # somebody else's
    (tmp_path / "iter_0000105" / "notes").touch()
    run.set_latest(100)
    for iteration, left in ((110, [100, 105, 110]), (120, [105, 110, 120]), (130, [105, 120, 130])):
        save(run, iteration, keep_last=2, async_save=async_save)
        assert run.iterations() == left
    assert (tmp_path / "iter_0000105" / "notes").is_file()
    shutil.rmtree(tmp_path / "iter_0000105")
    (run.checkpoint(130) / "checkpoint.json").write_text("damaged")
    check_usable(run, {120})


def test_where_the_newest_checkpoint_was_moved_away_the_next_one_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for iteration in (1, 2):
        save(run, iteration)
    shutil.move(run.checkpoint(2), tmp_path / "archive")
    save(run, 3, keep_last=1)
    check_usable(run, {3})
    assert run.iterations() == [3]


class Crash(BaseException):
    """The process ends here: nothing in the program catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Dies before the `call`-th act on the disk."""
    process, calls = os.getpid(), [0]

    def doomed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # not in the process that writes in the background, nor in the thread that removes
            if os.getpid() == process and threading.current_thread() is threading.main_thread():
                calls[0] += 1
                if calls[0] == call:
                    raise Crash
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [
        (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir"),
        (checkpoint, "plan_save"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, doomed(getattr(owner, name)))


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("set_back", [False, True], ids=["next", "again"])
def test_a_crash_at_any_moment_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_back: bool, async_save: bool
) -> None:
    """Iteration 1 is there and 2 is being saved; with `set_back`, also a complete 2 that the tracker does not name."""
    start = RunFolder(tmp_path / "start")
    save(start, 1)
    if set_back:
        save(start, 2)
        start.set_latest(1)
    seen, call = [], 0
    while True:
        call += 1
        run = RunFolder(tmp_path / str(call))
        shutil.copytree(start.path, run.path)
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            try:
                save(run, 2, keep_last=1, async_save=async_save)
                break
            except Crash:
                pass
        seen.append(check_usable(run, {1, 2}))
        run.clean()
        seen_after_cleaning = check_usable(run, {1, 2})
        assert seen_after_cleaning == seen[-1]
        save(run, 3, keep_last=1)
        check_usable(run, {3})
    assert run.iterations() == [2]
    assert seen == sorted(seen) and set(seen) == {1, 2}  # the switch happens once, at the tracker
    assert len(seen) >= 10


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, async_save: bool) -> None:
    """In a process of its own, whose files may not grow beyond 4 KiB."""
    from multirank import run_ranks

    run = RunFolder(tmp_path)
    save(run, 1)
    message = run_ranks(save_with_small_files, 1, tmp_path, async_save)[0]
    assert "iter_0000002: this checkpoint could not be written (rank 0: [Errno 27] File too large" in message
    assert "MiB free on that disk" in message and "Traceback" not in message
    assert f"{tmp_path}/iter_0000001 is untouched" in message
    check_usable(run, {1})
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def save_with_small_files(folder: Path, async_save: bool) -> str:
    import resource

    distributed.start_world(ParallelConfig())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(OSError) as failure:
        save(RunFolder(folder), 2, size=100_000, async_save=async_save)
    return str(failure.value)


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 1)
    other = MODEL | {"num_layers": 8}
    with pytest.raises(ValueError, match=r"iter_0000001: checkpoint of another model: num_layers is 4 there"):
        resume(RunFolder(tmp_path), CheckpointConfig(), Weights(), other)


@pytest.mark.parametrize(("load_ema", "value"), [(False, 5.0), (True, 105.0)])
def test_finetune_takes_weights_alone(tmp_path: Path, load_ema: bool, value: float) -> None:
    source, own = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "own")
    save(source, 5)
    settings = {"load": str(source.path), "finetune": True, "load_ema": load_ema}
    progress, engine = load(own, **settings)
    assert progress == Progress() and engine.current.tolist() == [value] * 4
    # untouched here: what follows from new weights is the engine's to decide
    assert engine.ema.tolist() == [100.0] * 4
    save(own, 7)
    assert load(own, **settings)[0].iteration == 7  # a requeued job continues itself


def test_load_continues_another_run(tmp_path: Path) -> None:
    source, own = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "own")
    save(source, 5)
    assert load(own, load=str(source.path))[0].iteration == 5
    assert load(own, load=str(source.checkpoint(5)))[0].iteration == 5
    with pytest.raises(ValueError, match="checkpoint.load: .*own is neither"):
        load(RunFolder(tmp_path / "third"), load=str(own.path))


def test_description_is_readable(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 5)
    said = json.loads((tmp_path / "iter_0000005" / "checkpoint.json").read_text())
    assert said["iteration"] == 5 and said["consumed_samples"] == 40 and said["model"] == MODEL


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state at the call; nothing can be resumed from before it is whole."""
    run, reports, gate = RunFolder(tmp_path), [], tmp_path / "gate"
    gate.touch()
    write = RankFile.write

    def held_up(self: RankFile) -> Any:
        while gate.exists():
            time.sleep(0.01)
        return write(self)

    monkeypatch.setattr(RankFile, "write", held_up)
    saver = Saver(run, CheckpointConfig(keep_last=0), MODEL, reports.append)
    engine = Weights(1.0)
    saver.save(engine, progress(1))
    engine.current += 1.0
    engine.ema += 1.0
    saver.poll()
    assert run.latest() is None and reports == []
    gate.unlink()
    saver.save(engine, progress(2))  # waits for the first
    assert run.latest() == 1
    check_usable(run, {1})
    saver.finish()
    check_usable(run, {2})
    assert [saved.iteration for saved in reports] == [1, 2]
    saver.finish()
    saver.poll()
    assert len(reports) == 2


def test_a_writer_that_is_killed_is_a_clear_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    save(run, 1)
    monkeypatch.setattr(RankFile, "write", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        OSError, match=r"could not be written \(rank 0: the process .* has died \(exit code -9\)"
    ) as e:
        save(run, 2)
    assert f"{tmp_path}/iter_0000001 is untouched" in str(e.value)
    check_usable(run, {1})
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_run_that_gives_up_keeps_what_it_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone it waits; with others, of which one may be gone, it takes its writer along and names what is lost."""
    run, write, nap = RunFolder(tmp_path), RankFile.write, [0.5]

    def slowly(self: RankFile) -> Any:
        time.sleep(nap[0])
        return write(self)

    monkeypatch.setattr(RankFile, "write", slowly)
    saver = Saver(run, CheckpointConfig(), MODEL)
    saver.save(Weights(1.0), progress(1))
    saver.close()
    check_usable(run, {1})
    nap[0] = 60.0
    saver.save(Weights(2.0), progress(2))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    saver.close()
    monkeypatch.undo()
    for child in multiprocessing.active_children():
        child.join(10)  # the first writer may take a moment to be gone
    assert not multiprocessing.active_children()
    assert f"{tmp_path}/iter_0000002 was still being written when the run ended: it is lost" in caplog.text
    run.clean()
    assert f"{tmp_path}/iter_0000002.tmp was being written when the run ended" in caplog.text
    check_usable(run, {1})
