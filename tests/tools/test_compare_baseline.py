"""The comparison with the published procedure: what is certain anywhere. Speed is reported, not asserted."""

from dataclasses import dataclass

import numpy as np
import pytest
from baseline.case import make_case
from baseline.our_arm import OurArm
from baseline.published_arm import OneForward, PublishedArm, procedure_of
from baseline.worker import Memory, Worker

from soar_mega.config import StageConfig

BATCH, POINTS = 16, 6


@dataclass
class Measured:
    peak: int  # bytes, of two steps
    work: int  # floating-point operations of a step


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    stage = StageConfig(num_auxiliary_points=POINTS, timesteps="grid", shift=3.0)
    case = make_case("tiny", stage=stage, batch_size=BATCH)
    workers = {
        "published": Worker("published", PublishedArm, case, procedure_of(case), BATCH),
        "ours": Worker("ours", OurArm, case, BATCH // 2, BATCH),
        "one forward": Worker("one forward", OneForward, case),
    }
    results = {}
    for name, worker in workers.items():
        worker.step()
        worker.step()
        results[name] = Measured(worker.peak_memory(), worker.flops())
        worker.close()
    return results


def test_ours_needs_less_memory(measured: dict[str, Measured]) -> None:
    """At equal sizes of a forward: the published procedure holds N + 1 graphs and the rollout's, ours one."""
    assert measured["ours"].peak < 0.75 * measured["published"].peak


def test_the_work_is_that_of_the_method(measured: dict[str, Measured]) -> None:
    """Counted in forwards of one sample: base and auxiliary points with a backward (3 each), 2 guided forwards."""
    expected = 3 * (1 + POINTS) + 2
    for arm in ("published", "ours"):
        units = measured[arm].work / measured["one forward"].work / BATCH
        assert expected - 0.5 < units <= expected  # a little less: inputs need no gradient


def test_a_failing_arm_says_why() -> None:
    worker = Worker("broken", int, "x")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)broken failed:.*ValueError: invalid literal"):
        worker.step()
    worker.close()


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="choose tiny, wide or a preset: sd35"):
        make_case("huge", stage=StageConfig(), batch_size=1)


def test_peak_memory_is_above_what_was_there_before() -> None:
    ballast = np.ones(64 << 20, dtype=np.uint8)
    memory = Memory()
    memory.forget_peak()
    before = memory.peak()
    passing = np.ones(128 << 20, dtype=np.uint8)
    del passing
    assert len(ballast) and abs(memory.peak() - before - (128 << 20)) < 32 << 20
