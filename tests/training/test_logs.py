"""Megatron's log line, taken apart again as log readers do."""

from soar_mega.training.logs import Interval, log_line

NAN = float("nan")


def line_of(interval: Interval, throughput: dict[str, float] | None = None) -> str:
    return log_line(
        interval,
        iteration=100,
        train_iters=5000,
        consumed_samples=3200,
        learning_rate=2e-5,
        global_batch_size=32,
        grad_norm=0.75,
        throughput=throughput or {},
    )


def test_the_line_in_full() -> None:
    interval = Interval()
    interval.add({"loss": 0.5}, 32, ok=True, seconds=0.01)
    interval.add({"loss": 0.25}, 32, ok=True, seconds=0.01)
    assert line_of(interval) == (
        " iteration      100/    5000 | consumed samples:         3200 | elapsed time per iteration (ms): 10.0 |"
        " learning rate: 2.000000E-05 | global batch size:    32 | loss: 3.750000E-01 | grad norm: 7.500000E-01 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_throughput_follows_the_time() -> None:
    interval = Interval()
    interval.add({"loss": 0.5}, 32, ok=True, seconds=0.01)
    on_gpu = line_of(interval, {"tflops-per-gpu": 356.04, "mfu": 0.36})
    assert " (ms): 10.0 | throughput per GPU (TFLOP/s/GPU): 356 | MFU: 0.36 | learning rate" in on_gpu
    on_cpu = line_of(interval, {"tflops-per-process": 0.012361})
    assert " (ms): 10.0 | throughput per process (TFLOP/s): 0.01236 | learning rate" in on_cpu


def test_skipped_steps_are_counted_and_left_out_of_the_average() -> None:
    interval = Interval()
    interval.add({"loss": 0.5}, 32, ok=True, seconds=0.01)
    interval.add({"loss": NAN}, 32, ok=False, seconds=0.01)
    interval.add({"loss": 0.125}, 32, ok=False, seconds=0.01)  # a finite loss with a non-finite gradient
    line = line_of(interval)
    assert "| loss: 5.000000E-01 |" in line
    assert line.endswith(" number of skipped iterations:   2 | number of nan iterations:   1 |")
    assert interval.samples == 96


def test_a_line_of_skipped_steps_alone_has_no_loss() -> None:
    interval = Interval()
    interval.add({"loss": NAN}, 32, ok=False, seconds=0.01)
    assert " loss:" not in line_of(interval)


def test_a_name_that_is_missing_in_some_steps_is_averaged_over_the_others() -> None:
    interval = Interval()
    interval.add({"loss": 1.0, "loss/base_q1": 4.0}, 32, ok=True, seconds=0.01)
    interval.add({"loss": 2.0}, 32, ok=True, seconds=0.01)
    assert interval.averages() == {"loss": 1.5, "loss/base_q1": 4.0}
