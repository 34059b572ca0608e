"""Training curves of a run, read back from its TensorBoard events."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def loss_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{"base": [(iteration, loss)], "aux": [...]}, without a kind of point that the run does not train on."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    present = set(events.Tags()["scalars"])
    return {
        kind: [(event.step, event.value) for event in events.Scalars(f"loss/{kind}")]
        for kind in ("base", "aux")
        if f"loss/{kind}" in present
    }
