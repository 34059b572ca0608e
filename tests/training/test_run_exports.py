"""What a run exports at its end: tried at its start, and when it fails all the same the run is complete."""

import os
import shutil
import traceback
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny_runs
from multirank import RankFailure, run_ranks
from tiny_runs import ROOT, logged, tiny_recipe

from soar_mega import outputs
from soar_mega.checkpoints.exchange import checkpoint_to_folder, weights_to_checkpoint
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import Recipe
from soar_mega.convert.weights import open_weights
from soar_mega.training.run import Trainer
from soar_mega.training.run_exports import check_exports, check_places

BASE = ROOT / "recipes/tiny/base"
NOBODY = 65534  # a user without rights


def recipe(shards: Path, save: Path, **overrides: object) -> Recipe:
    return tiny_recipe(shards, save, **({"train__train_iters": 1, "checkpoint__export": "true"} | overrides))


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def copy_of_base(folder: Path) -> Path:
    shutil.copytree(BASE, folder)
    return folder


@pytest.mark.parametrize(
    ("save", "words"),
    [
        ("pipeline", "lies in model.pipeline_dir"),
        ("pipeline/runs/x", "lies in model.pipeline_dir"),
        ("link/runs/x", "lies in model.pipeline_dir"),
        ("shards", "lies in data.path"),
        ("old/second", "lies in checkpoint.load"),
        ("x", "is data.validation_path"),
    ],
)
def test_a_run_folder_apart_from_what_is_read(tmp_path: Path, save: str, words: str) -> None:
    for name in ("pipeline", "shards", "old", "x/export"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("pipeline")
    settings = {
        "model__pipeline_dir": tmp_path / "pipeline",
        "data__validation_path": tmp_path / "x/export",
        "checkpoint__load": tmp_path / "old",
    }
    with pytest.raises(ValueError, match=f"checkpoint.save: .* {words}"):
        check_places(tiny_recipe(tmp_path / "shards", tmp_path / save, **settings))
    check_places(tiny_recipe(tmp_path / "shards", tmp_path / "elsewhere", **settings))


def test_to_load_what_is_to_be_saved_means_to_resume(shards: Path, tmp_path: Path) -> None:
    """As Megatron's users start their runs: the first time there is nothing to load."""
    (tmp_path / "link").symlink_to("run")
    settings = {"checkpoint__export": "false", "checkpoint__load": tmp_path / "link"}
    assert run_ranks(tiny_runs.run, 1, recipe(shards, tmp_path / "run", **settings)) == [0]
    more = recipe(shards, tmp_path / "run", train__train_iters=2, **settings)
    assert run_ranks(tiny_runs.run, 1, more) == [0]
    assert list(logged(tmp_path / "run")) == [1, 2]
    assert "resumed from" in (tmp_path / "run/train.log").read_text()


def dangling(pipeline: Path, run: Path) -> None:
    (pipeline / "vae/config.json").unlink()
    (pipeline / "vae/config.json").symlink_to("gone")


def of_the_user(pipeline: Path, run: Path) -> None:
    (run / "export_ema").mkdir()
    (run / "export_ema/model.safetensors").touch()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (dangling, "vae/config.json is a link to gone, which is missing"),
        (of_the_user, "export_ema holds what this program did not write.*model.safetensors"),
        (lambda pipeline, run: (run / ".export.soar_mega-new").symlink_to("x"), "is in the way of"),
    ],
)
def test_what_the_export_needs_is_tried(
    tmp_path: Path, damage: Callable[[Path, Path], object], words: str
) -> None:
    pipeline, run = copy_of_base(tmp_path / "pipeline"), tmp_path / "run"
    run.mkdir()
    settings = recipe(tmp_path, run, model__pipeline_dir=pipeline, train__ema_decay=0.9)
    check_exports(settings)
    assert list(run.iterdir()) == []
    damage(pipeline, run)
    with pytest.raises(ValueError, match=words):
        check_exports(settings)
    if damage is dangling:
        check_exports(recipe(tmp_path, run, model__pipeline_dir=pipeline, checkpoint__export="false"))


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exports of 1.4 M parameters in fp32, and of the other parts."""
    parts = sum(f.stat().st_size for f in BASE.rglob("*") if f.is_file() and f.parent.name != "transformer")
    needed = 2 * (parts + 4 * 1_361_056)
    disk = namedtuple("disk", "free")
    settings = recipe(tmp_path, tmp_path, train__ema_decay=0.9, model__dtype="fp32")
    for free, enough in ((0.97 * needed, False), (1.03 * needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: disk(free))
        if enough:
            check_exports(settings)
            continue
        with pytest.raises(ValueError, match="the export at the end .* needs 0.0 GiB .* make room"):
            check_exports(settings)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    with TemporaryDirectory() as place:  # tmp_path is root's alone, and the checkout may be
        os.chmod(place, 0o777)
        run = Path(place, "run")
        settings = recipe(tmp_path, run, model__pipeline_dir=copy_of_base(Path(place, "pipeline")))
        (run / "export").mkdir(parents=True)
        (run / "export/config.json").touch()
        outputs._seal(run / "export")
        check_exports(settings)  # as who may write
        for path in (run, *run.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        child = os.fork()
        if child == 0:
            os._exit(exit_code_of(lambda: refused_as_protected(run, settings)))
        assert os.waitpid(child, 0)[1] == 0


def exit_code_of(check: Callable[[], None]) -> int:
    """Of a check that is made as nobody; nothing that it raises goes on into what the parent was doing."""
    try:
        os.setuid(NOBODY)
        check()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def refused_as_protected(run: Path, settings: Recipe) -> None:
    """An export that is protected against writing is refused, and one in a folder that is."""
    for protected, words in ((run / "export", "protected"), (run, "Permission denied")):
        protected.chmod(0o555)
        with pytest.raises(PermissionError, match=words):
            check_exports(settings)
        protected.chmod(0o755)


def test_a_run_says_at_its_start_what_its_end_would_fail_for(shards: Path, tmp_path: Path) -> None:
    pipeline = copy_of_base(tmp_path / "pipeline")
    dangling(pipeline, tmp_path)
    before = listing(pipeline)
    with pytest.raises(RankFailure, match="vae/config.json is a link to gone"):
        run_ranks(tiny_runs.run, 1, recipe(shards, tmp_path / "run", model__pipeline_dir=pipeline))
    assert logged(tmp_path / "run") == {}
    with pytest.raises(RankFailure, match="lies in model.pipeline_dir"):
        run_ranks(tiny_runs.run, 1, recipe(shards, pipeline / "run", model__pipeline_dir=pipeline))
    assert listing(pipeline) == before


def disturbed_and_mended(settings: Recipe) -> str:
    """Trains while a user puts a folder in the place of the export, then does what the message says; the message."""
    step, run = Trainer.step, RunFolder(settings.checkpoint.save)

    def disturbed(self: Trainer) -> float:
        (run.path / "export").mkdir()
        (run.path / "export/mine").write_text("mine")
        return step(self)

    Trainer.step = disturbed  # type: ignore[method-assign]
    with pytest.raises(OSError) as raised:
        tiny_runs.run(settings)
    assert run.complete() == {"iteration": 1, "consumed_samples": 16, "exported": False}
    assert (run.path / "export/mine").read_text() == "mine"
    shutil.rmtree(run.path / "export")
    for name in ("export", "export_ema"):
        assert checkpoint_to_folder(run.path, run.path / name, ema=name == "export_ema")
    return str(raised.value)


def test_a_run_whose_export_fails_is_complete(shards: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    settings = recipe(shards, run.path, train__ema_decay=0.9)
    [message] = run_ranks(disturbed_and_mended, 1, settings)
    assert "export holds what this program did not write" in message
    convert = f"soar-mega convert {run.path} {run.path}"
    assert f"{convert}/export && {convert}/export_ema --ema" in message
    converted = {f: f.read_bytes() for f in run.path.glob("export*/transformer/*")}
    assert len(converted) == 4
    assert run_ranks(tiny_runs.run, 1, settings) == [0]  # the other way that the message names
    assert run.complete() == {"iteration": 1, "consumed_samples": 16}
    assert {f: f.read_bytes() for f in run.path.glob("export*/transformer/*")} == converted
    refused_conversions(run, tmp_path)


def test_an_export_can_be_asked_for_when_the_run_is_over(shards: Path, tmp_path: Path) -> None:
    for asked in ("false", "true"):
        settings = recipe(shards, tmp_path / "run", checkpoint__export=asked)
        assert run_ranks(tiny_runs.run, 1, settings) == [0]
        assert (tmp_path / "run/export").exists() == (asked == "true")
    assert RunFolder(tmp_path / "run").complete() == {"iteration": 1, "consumed_samples": 16}


def refused_conversions(run: RunFolder, folder: Path) -> None:
    """What once deleted runs and folders beside them."""
    (folder / "models").mkdir()
    (folder / "models/mine").write_text("mine")
    before = listing(folder)
    checkpoint = run.checkpoint(1)
    for source, out, words in (
        (run.path, folder / "models", "did not write"),
        (run.path, run.path, "contains the checkpoint"),
        (checkpoint, folder, "contains the checkpoint"),
        (checkpoint, checkpoint, "is the checkpoint"),
        (checkpoint, checkpoint / "inner", "lies in the checkpoint"),
        (run.path, run.path / "iter_0000002", "lies in the run"),
        (run.path, run.path / "samples", "lies in the run"),
        (run.path, BASE, "is the pipeline"),
        (run.path, BASE / "out", "lies in the pipeline"),
        (run.path, BASE.parent, "contains the pipeline"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoint_to_folder(source, out)
    for out, words in ((BASE / "run", "lies in the source"), (run.path, "holds checkpoints already")):
        with pytest.raises(ValueError, match=words), open_weights(Path(BASE)) as weights:
            weights_to_checkpoint(weights, BASE, out)
    assert listing(folder) == before
    assert not (BASE / "out").exists() and not (BASE / "run").exists()
