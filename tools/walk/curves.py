"""Curves of a run, read back from its TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[int, float]]  # (iteration, value)


def curves(run: Path, begins: Sequence[str]) -> dict[str, Curve]:
    """Those whose name begins as one of `begins` says, by name."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.startswith(tuple(begins))
    }


def loss_curves(run: Path) -> dict[str, Curve]:
    """{"base": [(iteration, loss)], "aux": [...]}, without a kind of point that the run does not train on."""
    found = curves(run, ["loss/base", "loss/aux"])
    return {kind: found[f"loss/{kind}"] for kind in ("base", "aux") if f"loss/{kind}" in found}
