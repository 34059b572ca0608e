"""The settings of the training methods, each with those of the one that it grows out of.

They are read by whoever reads a recipe, which must not take the seconds that torch takes: so they stand by themselves.
"""

from dataclasses import dataclass
from typing import ClassVar

from soar_mega.config import Forwards, StageConfig
from soar_mega.rules import Rule, above, at_least, one_of, within
from soar_mega.stages.collecting_settings import CollectingConfig, DiffusionNftConfig, FlowGrpoConfig


@dataclass(kw_only=True)
class SftConfig(StageConfig):
    """Which points of the ray are trained on."""

    name: str = "sft"
    condition_dropout: float = 0.0  # share of samples trained on the empty prompt
    timesteps: str = "continuous"  # continuous | grid (the published table)
    timestep_density: str = "logit_normal"  # logit_normal | uniform | mode
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    loss_weighting: str = "none"  # none | sigma_sqrt | cosmap
    fused_kernels: bool = True  # states and losses as one kernel each; false: as plain torch calls

    rules: ClassVar[dict[str, Rule]] = StageConfig.rules | {
        "condition_dropout": within(0, 1),
        "timesteps": one_of("continuous", "grid"),
        "timestep_density": one_of("logit_normal", "uniform", "mode"),
        "logit_std": above(0),
        "loss_weighting": one_of("none", "sigma_sqrt", "cosmap"),
    }

    def forwards(self) -> Forwards:
        return Forwards(answers=0, points=1)


@dataclass(kw_only=True)
class SftMultiConfig(SftConfig):
    """How many auxiliary points there are, and where (defaults: the published SOAR recipe)."""

    name: str = "sft_multi"
    num_auxiliary_points: int = 6  # N, per rollout path
    num_rollout_paths: int = 1
    auxiliary_weight: float = 1.0  # lambda
    sampling_steps: int = 40  # K: the rollout is one step of a K-step sampler
    sigma_upper_ratio: float = 1.0  # s' ~ U[s1, s1 + ratio (1 - s1)]

    rules: ClassVar[dict[str, Rule]] = SftConfig.rules | {
        "num_auxiliary_points": at_least(0),
        "num_rollout_paths": at_least(1),
        "auxiliary_weight": at_least(0),
        "sampling_steps": at_least(1),
        "sigma_upper_ratio": within(0, 1),
    }

    def forwards(self) -> Forwards:
        return Forwards(answers=0, points=1 + self.num_auxiliary_points * self.num_rollout_paths)


@dataclass(kw_only=True)
class SoarConfig(SftMultiConfig):
    """How the rollout goes (defaults: the published recipe)."""

    name: str = "soar"
    rollout_variant: str = "flow_sde"  # of the paths after the first (the ODE): simple | sde | flow_sde | cps
    eta: float = 0.5  # noise of the stochastic paths
    fresh_endpoint: bool = False  # re-noise toward a new endpoint per path instead of the sample's own z1
    guidance_scale: float = 4.5  # of the rollout; a guidance-distilled model is told it at all points

    rules: ClassVar[dict[str, Rule]] = SftMultiConfig.rules | {
        "rollout_variant": one_of("simple", "sde", "flow_sde", "cps"),
        "eta": at_least(0),
    }

    def forwards(self) -> Forwards:
        if not self.num_auxiliary_points:
            return super().forwards()
        branches = 2 if self.guidance_scale != 1.0 else 1
        return super().forwards()._replace(answers=branches, query_branches=branches)


SETTINGS: dict[str, type[StageConfig]] = {
    "soar": SoarConfig,
    "sft": SftConfig,
    "sft_multi": SftMultiConfig,
    "flow_grpo": FlowGrpoConfig,
    "diffusion_nft": DiffusionNftConfig,
}

__all__ = [
    "SETTINGS",
    "CollectingConfig",
    "DiffusionNftConfig",
    "FlowGrpoConfig",
    "SftConfig",
    "SftMultiConfig",
    "SoarConfig",
]
