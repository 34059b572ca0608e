"""The comparison with the published procedure: what is certain anywhere. Speed is reported, not asserted."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from baseline.case import make_case
from baseline.measuring import measure_alone
from baseline.our_arm import OurArm
from baseline.published_arm import OneForward, PublishedArm, procedure_of
from baseline.rows import rows_alone
from baseline.worker import Failed, Memory, Worker
from compare_baseline import named, print_table
from diffusers import SD3Transformer2DModel

from soar_mega.config import Recipe
from soar_mega.models.common.rank_parameters import trained_elements
from soar_mega.models.family import read_sizes
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.stages import SoarConfig

BATCH, POINTS = 16, 6


@dataclass
class Measured:
    peak: int  # bytes, of two steps
    work: int  # floating-point operations of a step


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    stage = SoarConfig(num_auxiliary_points=POINTS, timesteps="grid", shift=3.0)
    case = make_case("tiny", stage=stage, batch_size=BATCH)
    arms = {
        "published": (PublishedArm, (case, procedure_of(case), BATCH)),
        "ours": (OurArm, (case, BATCH // 2, BATCH)),
        "one forward": (OneForward, (case,)),
    }
    results = {}
    for name, arm in arms.items():
        worker = Worker(name)
        worker.build(arm)
        worker.step()
        worker.step()
        results[name] = Measured(worker.peak_memory(), worker.flops())
        worker.close()
    return results


@pytest.mark.slow
def test_ours_needs_less_memory(measured: dict[str, Measured]) -> None:
    """At equal sizes of a forward: the published procedure holds N + 1 graphs and the rollout's, ours one."""
    assert measured["ours"].peak < 0.75 * measured["published"].peak


@pytest.mark.slow
def test_the_work_is_that_of_the_method(measured: dict[str, Measured]) -> None:
    """Counted in forwards of one sample: base and auxiliary points with a backward (3 each), 2 guided forwards."""
    expected = 3 * (1 + POINTS) + 2
    for arm in ("published", "ours"):
        units = measured[arm].work / measured["one forward"].work / BATCH
        assert expected - 0.5 < units <= expected  # a little less: inputs need no gradient


@pytest.mark.parametrize("model", ["tiny", "wide", *PRESETS])
def test_both_sides_read_the_sizes_of_every_model(model: str) -> None:
    config = make_case(model, stage=SoarConfig(shift=3.0), batch_size=1).transformer
    with torch.device("meta"):
        theirs = SD3Transformer2DModel.from_config(config)
    ours = read_sizes(config)
    assert theirs.num_parameters() == trained_elements(ours, Recipe(stage=SoarConfig()), 0)


@pytest.mark.parametrize("model", ["huge", "flux_dev"])
def test_unknown_model(model: str) -> None:
    with pytest.raises(ValueError, match="is unknown; choose tiny, wide, sd35_medium, sd35_large"):
        make_case(model, stage=SoarConfig(), batch_size=1)


def test_peak_memory_is_above_what_was_there_before() -> None:
    ballast = np.ones(64 << 20, dtype=np.uint8)
    memory = Memory()
    memory.forget_peak()
    before = memory.peak()
    passing = np.ones(128 << 20, dtype=np.uint8)
    del passing
    assert len(ballast) and abs(memory.peak() - before - (128 << 20)) < 32 << 20


@pytest.mark.slow
def test_arms_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """As on a GPU: the best size of an arm is its row, and what cannot run says why and ends nothing."""
    stage = SoarConfig(num_auxiliary_points=1, timesteps="grid", shift=3.0)
    case = make_case("tiny", stage=stage, batch_size=4)
    every = rows_alone(case, [2, 4], [4], ["local", "transformer_engine"], ["sdpa", "flash"])
    assert len({row.name for row in every}) == len(every) == 6 + 8 + 2
    rows = named(every, ["all three repaired", "soar_mega, 4 points", "Transformer Engine, 4 points"])
    assert [row.name.strip() for row in rows[:2]] == ["all three repaired", "soar_mega, 4 points"]
    rows = [rows[-2], rows[0]]  # the failing one first
    engine, repaired = measure_alone(case, rows, repeats=2, row_seconds=600.0)
    assert engine.failure is not None and "transformer_engine" in engine.failure
    assert "\n" not in engine.failure and engine.ratio is None
    assert repaired.micro_batch in (2, 4) and len(repaired.seconds) == 2 and repaired.peak_memory
    assert repaired.ratio == 1.0 and repaired.tflops and repaired.mfu is None
    print_table(case, [engine, repaired])
    printed = capsys.readouterr().out
    assert f"{engine.name:46} {4:7d} {engine.failure}" in printed and printed.count("samples/s (") == 2
    with pytest.raises(ValueError, match="--rows names no row of: published procedure, with online"):
        named(every, ["nothing"])


@pytest.mark.slow
def test_a_failing_arm_says_why_and_its_process_takes_another() -> None:
    case = make_case("tiny", stage=SoarConfig(num_auxiliary_points=1, shift=3.0), batch_size=2)
    worker = Worker("broken")
    with pytest.raises(Failed, match=r"(?s)broken failed:.*ValueError: invalid literal") as failed:
        worker.build((int, ("x\ny",)))  # type: ignore[arg-type]
    assert failed.value.reason.startswith("ValueError: invalid literal") and "\n" not in failed.value.reason
    worker.build((OurArm, (case, 1, 2)))
    worker.step()
    worker.build((OurArm, (case, 2, 4)))  # another world in the same process
    assert worker.step() > 0
    with pytest.raises(Failed, match="ended with exit code 3"):
        worker.build((os._exit, (3,)))  # type: ignore[arg-type]
    worker.close()
