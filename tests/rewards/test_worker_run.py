"""A run whose reward worker goes away: it ends and names the worker, and goes on where it was."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_cases import rl_recipe
from safetensors.torch import load_file
from torch import Tensor

from soar_mega.data.info import DataError
from soar_mega.rewards.asking import Patience
from soar_mega.rewards.client import WorkerScorer
from soar_mega.rewards.server import RewardServer
from soar_mega.rewards.worker import Limits, Worker
from soar_mega.training.run import train

pytestmark = pytest.mark.slow


class Blue:
    """Judges as many requests as it is told to; then its server is gone."""

    name, version, weights_hash = "blue", "1", ""

    def __init__(self, requests: int) -> None:
        self.left = requests
        self.server = RewardServer(Worker([self], Limits()))
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        self.left -= 1
        if self.left == 0:
            threading.Thread(target=self.stop).start()
        return {self.name: images[:, 2].mean(dim=(1, 2))}

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def result(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_run_without_its_worker_ends_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerScorer.__init__, "__defaults__", (Patience(in_all=0.5, pause=0.1),))

    def run(folder: str, requests: int) -> None:
        blue = Blue(requests)
        (tmp_path / "url").write_text(blue.server.url)
        settings = {
            "stage__rewards": f"{{'file:{tmp_path}/url#blue': 1.0}}",
            "checkpoint__export": "true",
            "checkpoint__save_interval": 2,
            "checkpoint__async_save": "false",
            "logging__eval_interval": 0,  # it asks the worker too
        }
        try:
            assert train(rl_recipe(tmp_path / folder, "flow_grpo", **settings)) == 0
        finally:
            blue.stop()

    run("whole", 1000)
    with pytest.raises(DataError, match=f"reward worker file:{tmp_path}/url: it is not there"):
        run("broken", 8)  # one collection, and a part of the next one
    assert (tmp_path / "broken" / "run" / "iter_0000004").is_dir()
    run("broken", 1000)
    whole, broken = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
