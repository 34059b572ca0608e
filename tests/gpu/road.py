"""Runs of the tiny recipe as a user starts them: killed and resumed, exported, drawn from, measured and converted.

The commands choose their device themselves, so the same functions hold on a CPU (tests/training/test_road.py).
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import logged, tiny_words
from verbs import LIMIT, Verb, run

from soar_mega.checkpoints import manifest
from soar_mega.checkpoints.run_folder import RunFolder

RECIPE = "recipes/tiny/soar.yaml"
ITERATIONS, INTERVAL, KILLED = 30, 5, 12


@dataclass(frozen=True, kw_only=True)
class Case:
    """An engine and a type, and how far two runs that should be equal may be apart: a GPU adds in another order."""

    engine: str
    dtype: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.engine}-{self.dtype}"

    def settings(self) -> dict[str, Any]:
        return {"parallel__engine": self.engine, "parallel__zero_stage": 2, "model__dtype": self.dtype}


CASES = [
    Case(engine="megatron", dtype="fp32", tolerance=1e-5),
    Case(engine="megatron", dtype="bf16", tolerance=2e-3),
    Case(engine="deepspeed", dtype="bf16", tolerance=2e-3),
]


def first_losses(shards: Path, folder: Path, engine: str, on_cpu: bool) -> list[float]:
    """The losses of the first five steps in fp32."""
    words = tiny_words(shards, folder / "run", parallel__engine=engine)
    run("train", RECIPE, *words, log=folder / "log", on_cpu=on_cpu)
    return [loss for loss, _ in logged(folder / "run").values()]


def killed_and_resumed(case: Case, shards: Path, folder: Path) -> Path:
    """A run that is killed (-9) while it trains and writes checkpoints goes on, and ends as one that nobody disturbed.

    Returns:
        The folder of the resumed run, which is complete and exported.
    """
    settings: dict[str, Any] = {
        "train__train_iters": ITERATIONS,
        "checkpoint__save_interval": INTERVAL,
        "checkpoint__async_save": "true",
        "checkpoint__keep_last": 0,
        "checkpoint__export": "true",
        **case.settings(),
    }
    whole, killed = RunFolder(folder / "whole"), RunFolder(folder / "killed")
    words = {name.path: tiny_words(shards, name.path, **settings) for name in (whole, killed)}
    undisturbed = Verb("train", RECIPE, *words[whole.path], log=folder / "whole.log")
    victim = Verb("train", RECIPE, *words[killed.path], log=folder / "killed.log")
    try:
        kill_at(victim, killed.path, KILLED)
        assert killed.complete() is None
        kept = killed.candidates()[0]
        assert kept >= KILLED - 2 * INTERVAL  # a save waits for the one before it
        run("train", RECIPE, *words[killed.path], log=folder / "resumed.log")
        undisturbed.finish()
    finally:
        victim.kill()
        undisturbed.kill()
    resumed_from = re.findall(r"resumed from .*iter_(\d+)", (killed.path / "train.log").read_text())
    assert [int(iteration) for iteration in resumed_from] == [kept]
    for name in (whole, killed):
        assert name.complete() == {"iteration": ITERATIONS, "consumed_samples": 16 * ITERATIONS}
        assert name.iterations() == list(range(INTERVAL, ITERATIONS + 1, INTERVAL))
        for iteration in name.iterations():
            assert manifest.problems(name.checkpoint(iteration)) == []
    one, other = logged(whole.path), logged(killed.path)
    assert list(one) == sorted(other) == list(range(1, ITERATIONS + 1))
    for iteration, (loss, norm) in one.items():
        assert other[iteration][0] == pytest.approx(loss, rel=case.tolerance), iteration
        assert other[iteration][1] == pytest.approx(norm, rel=20 * case.tolerance), iteration
    assert transformer(killed.path / "export").keys() == transformer(whole.path / "export").keys()
    return killed.path


def kill_at(verb: Verb, folder: Path, iteration: int) -> None:
    """Kill -9 of a run as soon as it has logged a step."""
    patience = time.monotonic() + LIMIT
    while not (folder / "train.log").exists() or iteration not in logged(folder):
        assert verb.is_running(), f"it ended before iteration {iteration}\n{verb.output()[-3000:]}"
        assert time.monotonic() < patience, f"it did not reach iteration {iteration}\n{verb.output()[-3000:]}"
        time.sleep(0.02)
    verb.kill()


def verbs_on(finished: Path, held_out: Path, folder: Path) -> None:
    """sample, evaluate and convert of a finished fp32 run here are what they are on the CPU."""
    export = finished / "export"
    sample = ("sample", export, "--prompt", "a red 3", "--prompt", "a blue 7", "--steps", 8)
    evaluate = (
        "evaluate",
        f"run={export}",
        "--held-out",
        held_out,
        "--drift-samples",
        16,
        "--guidance-scale",
        3,
    )
    started = []
    for place in ("here", "cpu"):
        for verb, words in (
            ("sample", (*sample, "--guidance-scale", 3, "--out", folder / f"{place}.png")),
            ("evaluate", (*evaluate, "--out", folder / f"{place}.json")),
        ):
            started.append(Verb(*words, log=folder / f"{verb}-{place}.log", on_cpu=place == "cpu"))
    started.append(Verb("convert", finished, folder / "converted", log=folder / "convert.log"))
    for one in started:
        one.finish()

    pictures = [np.asarray(Image.open(folder / f"{place}.png")).astype(int) for place in ("here", "cpu")]
    assert pictures[0].std() > 10  # something is drawn
    assert abs(pictures[0] - pictures[1]).max() <= 4  # of 255: convolutions of a GPU may round to tf32
    said = [
        json.loads((folder / f"{place}.json").read_text())["pipelines"]["run"] for place in ("here", "cpu")
    ]
    for here, there in zip(*(each["drift"]["scales"]["3"] for each in said), strict=True):
        assert here["absolute"] == pytest.approx(there["absolute"], rel=1e-4)
    exported, converted = transformer(export), transformer(folder / "converted")
    assert exported.keys() == converted.keys()
    assert all(torch.equal(exported[key], converted[key]) for key in exported)


def transformer(pipeline: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline folder."""
    return load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
