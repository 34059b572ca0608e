"""Rectified-flow mathematics on plain tensors.

A clean latent z0 and a noise endpoint z1 span the ray z_s = (1 - s) z0 + s z1; a velocity is dz/ds, which is
z1 - z0 on the ray. Sigma s is 1 at pure noise and 0 at clean latents; u is the same time before the shift of
the schedule. Sigmas and coefficients are float64, latents and noise float32.
"""

from soar_mega.flow.auxiliary import auxiliary_latents
from soar_mega.flow.noise import balanced, normal, philox, stream_key, subset, uniform
from soar_mega.flow.rollout import ROLLOUT_VARIANTS, mixed_coefficients, rollout_coefficients
from soar_mega.flow.rows import SOURCES, auxiliary_rows, base_rows, combine, correction_strength, weighted_sum
from soar_mega.flow.samplers import SOLVERS, guided, sample, solver_steps
from soar_mega.flow.schedule import TIMESTEPS, Schedule, Spacing
from soar_mega.flow.stochastic import (
    STOCHASTIC_VARIANTS,
    SampledStep,
    sample_steps,
    spread,
    step_log_probability,
    step_mean,
    stochastic_step,
)
from soar_mega.flow.timesteps import DENSITIES, sample_time, slowed
from soar_mega.flow.weighting import WEIGHTINGS, loss_weight

__all__ = [
    "DENSITIES",
    "ROLLOUT_VARIANTS",
    "SOLVERS",
    "SOURCES",
    "STOCHASTIC_VARIANTS",
    "TIMESTEPS",
    "WEIGHTINGS",
    "SampledStep",
    "Schedule",
    "Spacing",
    "auxiliary_latents",
    "auxiliary_rows",
    "balanced",
    "base_rows",
    "combine",
    "correction_strength",
    "guided",
    "loss_weight",
    "mixed_coefficients",
    "normal",
    "philox",
    "rollout_coefficients",
    "sample",
    "sample_steps",
    "sample_time",
    "slowed",
    "solver_steps",
    "spread",
    "step_log_probability",
    "step_mean",
    "stochastic_step",
    "stream_key",
    "subset",
    "uniform",
    "weighted_sum",
]
