"""The checkpoint protocol on a small stand-in engine: what a crash, a full disk and a foreign model leave behind."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from soar_mega import distributed
from soar_mega.config import CheckpointConfig, ParallelConfig
from soar_mega.training import checkpoint
from soar_mega.training.checkpoint import Progress
from soar_mega.training.run_folder import RunFolder

MODEL = {"num_layers": 4, "qk_norm": None, "dual_attention_layers": [0]}


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    distributed.start_world(ParallelConfig())
    yield
    distributed.stop_world()


class Weights:
    """An engine of one tensor and its average."""

    def __init__(self, value: float = 0.0, size: int = 4) -> None:
        self.current = torch.full((size,), value)
        self.ema = torch.full((size,), value + 100.0)
        self.weights = {"ema": self.ema}

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        return {name: self._sharded(name) for name in ("current", "ema")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current.copy_(state["current"])
        self.ema.copy_(state["ema"])

    def weights_state_dict(self, name: str) -> dict[str, Any]:
        return {"weights": self._sharded(name)}

    def load_weights(self, state: dict[str, Any]) -> None:
        self.current.copy_(state["weights"])

    def _sharded(self, name: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(name, getattr(self, name).clone())


def save(run: RunFolder, iteration: int, keep_last: int = 0, size: int = 4) -> None:
    progress = Progress(
        iteration=iteration, consumed_samples=8 * iteration, loader={"consumed": 8 * iteration}
    )
    checkpoint.save(run, Weights(float(iteration), size), progress, MODEL, keep_last)


def load(run: RunFolder, **settings: Any) -> tuple[Progress, Weights]:
    engine = Weights()
    return checkpoint.resume(run, CheckpointConfig(**settings), engine, MODEL), engine


def check_usable(run: RunFolder, iterations: set[int]) -> int:
    """The folder resumes from one of `iterations` with that iteration's content."""
    progress, engine = load(run)
    assert progress.iteration in iterations
    assert progress.loader == {"consumed": 8 * progress.iteration}
    assert engine.current.tolist() == [float(progress.iteration)] * 4
    assert engine.ema.tolist() == [progress.iteration + 100.0] * 4
    return progress.iteration


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


class Crash(BaseException):
    """The process ends here: nothing in the program catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Dies before the `call`-th act on the disk."""
    process, calls = os.getpid(), [0]

    def doomed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() == process:  # not in the writer processes of dist_checkpointing
                calls[0] += 1
                if calls[0] == call:
                    raise Crash
            return function(*args, **kwargs)

        return wrapper

    for owner, name in [
        (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir"),
        (dist_checkpointing, "save"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, doomed(getattr(owner, name)))


@pytest.mark.parametrize("set_back", [False, True], ids=["next", "again"])
def test_a_crash_at_any_moment_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_back: bool
) -> None:
    """Iteration 1 is there and 2 is being saved; with `set_back`, also a complete 2 that the tracker does not name."""
    start = RunFolder(tmp_path / "start")
    start.path.mkdir()
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
                save(run, 2, keep_last=1)
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


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 4 KiB."""
    from multirank import run_ranks

    run = RunFolder(tmp_path)
    save(run, 1)
    message = run_ranks(save_with_small_files, 1, tmp_path)[0]
    assert "iter_0000002: this checkpoint could not be written (Worker failure: " in message
    assert "MiB free on that disk" in message and "Traceback" not in message
    assert f"{tmp_path}/iter_0000001 is untouched" in message
    check_usable(run, {1})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]


def save_with_small_files(folder: Path) -> str:
    import resource

    distributed.start_world(ParallelConfig())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(OSError) as failure:
        save(RunFolder(folder), 2, size=100_000)
    return str(failure.value)


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 1)
    other = MODEL | {"num_layers": 8}
    with pytest.raises(ValueError, match=r"iter_0000001: checkpoint of another model: num_layers is 4 there"):
        checkpoint.resume(RunFolder(tmp_path), CheckpointConfig(), Weights(), other)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run, 1)
    for shard in (tmp_path / "iter_0000001").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(ValueError, match="iter_0000001: this checkpoint cannot be read"):
        load(run)
    (tmp_path / "iter_0000001" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        load(run)
    shutil.rmtree(tmp_path / "iter_0000001")
    with pytest.raises(ValueError, match=r"names iteration 1, but .*iter_0000001 is missing"):
        load(run)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(ValueError, match="holds 'soon' instead of an iteration number"):
        load(run)


@pytest.mark.parametrize(("load_ema", "value"), [(False, 5.0), (True, 105.0)])
def test_finetune_takes_weights_alone(tmp_path: Path, load_ema: bool, value: float) -> None:
    source, own = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "own")
    for run in (source, own):
        run.path.mkdir()
    save(source, 5)
    settings = {"load": str(source.path), "finetune": True, "load_ema": load_ema}
    progress, engine = load(own, **settings)
    assert progress == Progress() and engine.current.tolist() == [value] * 4
    assert (
        engine.ema.tolist() == [100.0] * 4
    )  # untouched here: what follows from new weights is the engine's to decide
    save(own, 7)
    assert load(own, **settings)[0].iteration == 7  # a requeued job continues itself


def test_kept_weights_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    plain = Weights(1.0)
    plain.weights = {}
    checkpoint.save(RunFolder(tmp_path), plain, Progress(iteration=1), MODEL, 0)
    with pytest.raises(ValueError, match=r"iter_0000001: holds no ema weights, which this recipe keeps"):
        load(RunFolder(tmp_path))
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint.load_ema: .*iter_0000001 holds no EMA weights"):
        load(RunFolder(tmp_path / "own"), load=str(tmp_path), finetune=True, load_ema=True)


def test_load_continues_another_run(tmp_path: Path) -> None:
    source, own = RunFolder(tmp_path / "source"), RunFolder(tmp_path / "own")
    for run in (source, own):
        run.path.mkdir()
    save(source, 5)
    assert load(own, load=str(source.path))[0].iteration == 5
    assert load(own, load=str(source.checkpoint(5)))[0].iteration == 5
    with pytest.raises(ValueError, match="checkpoint.load: .*own is neither"):
        load(RunFolder(tmp_path / "third"), load=str(own.path))


def test_description_is_readable(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 5)
    said = json.loads((tmp_path / "iter_0000005" / "checkpoint.json").read_text())
    assert said["iteration"] == 5 and said["consumed_samples"] == 40 and said["model"] == MODEL
