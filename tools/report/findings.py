"""The sentences that say what a run found, made from its numbers alone."""

from collections.abc import Mapping
from typing import Any

from report.noise import Difference, difference, paired_difference


def findings(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence for each question a reader has, with the answer's uncertainty."""
    pipelines = metrics["pipelines"]
    scale = max(next(iter(pipelines.values()))["guidance"], key=float)
    lines = [_training_helps(pipelines, scale)]
    lines += [_score(pipelines, scale, other, words) for other, words in OTHERS.items()]
    lines += [_drift(pipelines, scale, other, words) for other, words in OTHERS.items()]
    lines.append(_energy(pipelines, scale))
    return lines


OTHERS = {"sft": "ordinary training (SFT)", "sft_multi": "the control"}


def _training_helps(pipelines: Mapping[str, Any], scale: str) -> str:
    change = _of(pipelines, "base", "soar", scale)
    base, soar = (
        pipelines[arm]["guidance"][scale]["benchmark"]["overall"]["mean"] for arm in ("base", "soar")
    )
    return (
        f"Overall score with guidance {scale}: {base:.2f} before training, {soar:.2f} after SOAR. "
        f"The difference of {_signed(change)} is {change.verdict()}."
    )


def _score(pipelines: Mapping[str, Any], scale: str, other: str, words: str) -> str:
    change = _of(pipelines, other, "soar", scale)
    return f"Overall score, SOAR against {words}: {_signed(change)}, {change.verdict()}."


def _drift(pipelines: Mapping[str, Any], scale: str, other: str, words: str) -> str:
    parts = []
    for theirs, ours in zip(
        *(pipelines[arm]["drift"]["scales"][scale] for arm in (other, "soar")), strict=True
    ):
        change = paired_difference(theirs["errors"], ours["errors"])
        share = change.value / theirs["absolute"]
        parts.append(f"{share:+.1%} from noise {ours['from']:g} to {ours['to']:g} [{change.verdict()}]")
    found = "; ".join(parts)
    return f"Exposure bias (drift with guidance {scale}, lower is better), SOAR against {words}: {found}."


def _energy(pipelines: Mapping[str, Any], scale: str) -> str:
    values = {arm: p["guidance"][scale]["energy_distance"] for arm, p in pipelines.items()}
    changes = []
    for other, words in OTHERS.items():
        a, b = values[other], values["soar"]
        change = difference(a["value"], a["standard_error"], b["value"], b["standard_error"])
        changes.append(f"{_signed(change, 3)} against {words} [{change.verdict()}]")
    return "Distance to real pictures (lower is better), SOAR: " + " and ".join(changes) + "."


def _of(pipelines: Mapping[str, Any], a: str, b: str, scale: str) -> Difference:
    x, y = (pipelines[arm]["guidance"][scale]["benchmark"]["overall"] for arm in (a, b))
    return difference(x["mean"], x["standard_error"], y["mean"], y["standard_error"])


def _signed(change: Difference, digits: int = 2) -> str:
    return f"{change.value:+.{digits}f} \u00b1 {change.standard_error:.{digits}f}"
