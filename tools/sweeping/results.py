"""All numbers of a sweep, as plain values: scores of the runs, contrasts between arms, curves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from origin import origin
from scipy.stats import t as student
from sweeping.contrasts import Chance, Contrast, contrast, holm, pooled
from sweeping.outcomes import Evaluated
from sweeping.plan import BASE, WRITTEN_BY, Arm, Measure, Sweep
from sweeping.runs import curve_name

Json = dict[str, Any]


def results(sweep: Sweep, evaluated: Evaluated) -> Json:
    """Everything that is reported.

    Raises:
        ValueError: a measure asks for what was not evaluated.
    """
    contrasts: list[Contrast] = []
    found: dict[str, Json] = {}
    for measure in sweep.measures:
        scales = {arm.name: evaluated.scale(models_of(arm), measure) for arm in sweep.arms}
        scores = {
            arm.name: {
                seed: evaluated.value(model, measure, scales[arm.name])
                for seed, model in zip(arm.seeds, models_of(arm), strict=True)
            }
            for arm in sweep.arms
        }
        chance = pooled(scores)
        found[measure.name] = {
            "guidance_scale": scales,
            "scores": scores,
            "arms": {arm: summary(list(runs.values()), chance) for arm, runs in scores.items()},
            "chance": asdict(chance),
            "base": base_value(sweep, evaluated, measure),
            "curves": {
                arm.name: curve(sweep, evaluated, measure, arm, scores[arm.name]) for arm in sweep.arms
            },
        }
        contrasts += contrasts_of(sweep, evaluated, measure, scales, scores, chance)
    return {
        "written_by": WRITTEN_BY,
        **origin("sweep"),
        "arms": [asdict(arm) for arm in sweep.arms],
        "primary": list(sweep.primary),
        "measures": found,
        "contrasts": [asdict(each) for each in corrected(contrasts, sweep.primary)],
    }


def contrasts_of(
    sweep: Sweep,
    evaluated: Evaluated,
    measure: Measure,
    scales: Mapping[str, float],
    scores: Mapping[str, dict[int, float]],
    chance: Chance,
) -> list[Contrast]:
    """Of all arms to their references; the base is the same weights whatever the seed."""
    scales, scores = dict(scales), dict(scores)
    models = {arm.name: dict(zip(arm.seeds, models_of(arm), strict=True)) for arm in sweep.arms}
    if sweep.base:
        scales[BASE] = evaluated.scale([BASE], measure)
        models[BASE] = {seed: BASE for arm in sweep.arms for seed in arm.seeds}
        scores[BASE] = dict.fromkeys(models[BASE], evaluated.value(BASE, measure, scales[BASE]))
    found = []
    for arm in sweep.arms:
        for name in arm.references:
            pairs = [
                (models[name][seed], models[arm.name][seed]) for seed in arm.seeds if seed in models[name]
            ]
            errors = prompts_errors(evaluated, measure, pairs, (scales[name], scales[arm.name]))
            trained = 1 if name == BASE else 2
            found.append(contrast(scores, arm.name, name, measure.name, chance, *errors, trained))
    return found


def models_of(arm: Arm, iteration: int | None = None) -> list[str]:
    """What the runs of an arm are called in the evaluation, by seed."""
    name = arm.name if iteration is None else curve_name(arm.name, iteration)
    return [f"{name}#{seed}" for seed in arm.seeds]


def base_value(sweep: Sweep, evaluated: Evaluated, measure: Measure) -> float | None:
    if not sweep.base:
        return None
    return evaluated.value(BASE, measure, evaluated.scale([BASE], measure))


def summary(values: list[float], chance: Chance) -> Json:
    """The mean of an arm's runs; its interval is of the chance in training alone, None where that is not known."""
    mean, low, high = float(np.mean(values)), None, None
    if chance.freedom:
        reach = chance.deviation / len(values) ** 0.5 * float(student.ppf(0.975, chance.freedom))
        low, high = mean - reach, mean + reach
    return {"mean": mean, "low": low, "high": high, "runs": len(values)}


def curve(
    sweep: Sweep, evaluated: Evaluated, measure: Measure, arm: Arm, scores: dict[int, float]
) -> list[Json]:
    """The mean over runs at each iteration that was evaluated, with the forwards up to there."""
    points = []
    for iteration in sweep.curve:
        if iteration < arm.iterations:
            models = models_of(arm, iteration)
            scale = evaluated.scale(models, measure)
            values = [evaluated.value(model, measure, scale) for model in models]
            points.append((iteration, values))
    points.append((arm.iterations, list(scores.values())))
    return [
        {"iteration": iteration, "forward_units": iteration * arm.units, "mean": float(np.mean(values))}
        for iteration, values in points
    ]


def prompts_errors(
    evaluated: Evaluated, measure: Measure, pairs: Sequence[tuple[str, str]], scales: tuple[float, float]
) -> tuple[float, float]:
    """The standard errors that the choice of prompts, or of held-out samples, and single images give a contrast.

    What single images do becomes less with each pair of runs, and what prompts do stays: so the variance of a single
    pair's difference tells the two apart.

    Args:
        pairs: the runs of the reference and of the arm, with one seed each.
    """
    together = evaluated.over_prompts(pairs, measure, scales)
    if len(pairs) == 1:
        return together, 0.0
    alone = float(np.mean([evaluated.over_prompts([pair], measure, scales) ** 2 for pair in pairs]))
    return together, max(0.0, (alone - together**2) / (len(pairs) - 1)) ** 0.5


def corrected(contrasts: Sequence[Contrast], primary: Sequence[str]) -> list[Contrast]:
    """With Holm's correction over the contrasts of the primary measures."""
    family = [i for i, each in enumerate(contrasts) if each.measure in primary and each.p is not None]
    adjusted = dict(zip(family, holm([contrasts[i].p or 0.0 for i in family]), strict=True))
    return [replace(each, adjusted=adjusted.get(i)) for i, each in enumerate(contrasts)]
