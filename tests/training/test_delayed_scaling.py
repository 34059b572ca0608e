"""No checkpoint holds the history of delayed scaling: a run that goes on says so. Over stand-ins of the layers."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import steps

sys.path.append(str(Path(__file__).parents[1] / "models"))
import te_stand_in

from soar_mega.checkpoints.checkpoint import Saver
from soar_mega.checkpoints.run_folder import RunFolder
from soar_mega.config import CheckpointConfig
from soar_mega.distributed import stop_world

LAYERS = {"model__transformer_impl": "transformer_engine", "model__dtype": "bf16"}
DELAYED = LAYERS | {"model__fp8": "hybrid", "model__fp8_recipe": "delayed"}


def test_a_run_that_goes_on_says_that_its_scales_begin_anew(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    te_stand_in.install(monkeypatch)

    def warned(checkpoint: int | None = None, **settings: Any) -> int:
        """How often it was said by a start; the checkpoint is left there."""
        caplog.clear()
        with steps(shards, tmp_path, **settings) as run:
            if checkpoint is not None:
                run.progress.iteration = checkpoint
                saver = Saver(RunFolder(tmp_path), CheckpointConfig(async_save=False), run.sizes)
                saver.save(run.engine, run.progress)
        return sum("model.fp8_recipe=delayed" in record.getMessage() for record in caplog.records)

    try:
        assert warned(checkpoint=0, **DELAYED) == 0
        assert warned(checkpoint=7, **DELAYED) == 0  # from where nothing was learned yet
        assert warned(**DELAYED) == 1
        assert warned(**DELAYED | {"model__fp8_recipe": "tensorwise"}) == 0
    finally:
        stop_world()
