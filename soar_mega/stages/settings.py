"""The settings of the training methods, each with those of the one that it grows out of.

They are read by whoever reads a recipe, which must not take the seconds that torch takes: so they stand by themselves.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from soar_mega.config import Forwards, Recipe, StageConfig
from soar_mega.rules import Rule, above, at_least, one_of, within
from soar_mega.stages.collecting_settings import DiffusionNftConfig, FlowGrpoConfig
from soar_mega.stages.scale import SCALES, Scale, guided_share, is_scale


@dataclass(kw_only=True)
class SftConfig(StageConfig):
    """Which points of the ray are trained on."""

    name: str = "sft"
    condition_dropout: float = 0.0  # share of samples trained on the empty prompt
    timesteps: str = "continuous"  # noise levels that there are: continuous | grid (the published table's)
    # of unshifted time: logit_normal | uniform | mode | beta (MixFlow's)
    timestep_density: str = "logit_normal"
    logit_mean: float = 0.0  # with logit_normal: mean of the normal number; above 0 is towards noise
    logit_std: float = 1.0  # with logit_normal: its standard deviation
    mode_scale: float = 1.29  # with mode: how far from uniform; above 0 favours the middle
    # of losses: none | sigma_sqrt (1 / sigma^2) | cosmap (2 / (pi (1 - 2 sigma + 2 sigma^2)))
    loss_weighting: str = "none"
    fused_kernels: bool = True  # states and losses as one kernel each; false: as plain torch calls

    rules: ClassVar[dict[str, Rule]] = StageConfig.rules | {
        "condition_dropout": within(0, 1),
        "timesteps": one_of("continuous", "grid"),
        "timestep_density": one_of("logit_normal", "uniform", "mode", "beta"),
        "logit_std": above(0),
        "mode_scale": within(-1, 1.75),  # beyond 2 / (pi - 2) times would leave [0, 1]
        "loss_weighting": one_of("none", "sigma_sqrt", "cosmap"),
    }

    def forwards(self) -> Forwards:
        return Forwards(answers=0, points=1)


@dataclass(kw_only=True)
class MixFlowConfig(SftConfig):
    """How much noisier a state is than the model is told."""

    name: str = "mixflow"
    gamma: float = 0.8  # the state of sigma s is that of s + gamma U (1 - s), U uniform in (0, 1)

    rules: ClassVar[dict[str, Rule]] = SftConfig.rules | {"gamma": within(0, 1)}


@dataclass(kw_only=True)
class SftMultiConfig(SftConfig):
    """How many auxiliary points there are, and where (defaults: the published SOAR recipe)."""

    name: str = "sft_multi"
    num_auxiliary_points: int = 6  # N, per rollout path
    num_rollout_paths: int = 1  # rollouts of a sample: the first is the ODE, further ones are stochastic
    auxiliary_weight: float = 1.0  # lambda: what an auxiliary point counts, a base point counting 1
    sampling_steps: int = 40  # K: a rollout step is one of a K-step sampler
    rollout_steps: int = 1  # guided steps of a rollout
    # how long a rollout is: uniform up to this share of the way from noise to data; null: always rollout_steps / K
    max_rollout_length: float | None = None
    # where auxiliary points are: s' uniform in [s1, s1 + ratio (1 - s1)], s1 being where the rollout ended
    sigma_upper_ratio: float = 1.0
    auxiliary_gamma: float = 0.0  # auxiliary states are noisier than the model is told, as gamma of mixflow

    rules: ClassVar[dict[str, Rule]] = SftConfig.rules | {
        "num_auxiliary_points": at_least(0),
        "num_rollout_paths": at_least(1),
        "auxiliary_weight": at_least(0),
        "sampling_steps": at_least(1),
        "rollout_steps": at_least(1),
        "max_rollout_length": within(0, 1),
        "sigma_upper_ratio": within(0, 1),
        "auxiliary_gamma": within(0, 1),
    }

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.rollout_steps > self.sampling_steps:
            raise ValueError(
                f"stage.rollout_steps is {self.rollout_steps}: a sampler of stage.sampling_steps={self.sampling_steps} "
                "has no more"
            )

    def forwards(self) -> Forwards:
        return Forwards(answers=0, points=1 + self.num_auxiliary_points * self.num_rollout_paths)


@dataclass(kw_only=True)
class SoarConfig(SftMultiConfig):
    """How the rollout goes (defaults: the published recipe)."""

    name: str = "soar"
    rollout_variant: str = "flow_sde"  # of the paths after the first (the ODE): simple | sde | flow_sde | cps
    eta: float = 0.5  # strength of the stochastic paths' noise; 0: none, but with sde, which does not read it
    fresh_endpoint: bool = False  # re-noise toward a new endpoint per path instead of the sample's own z1
    # of the rollout: one for all samples, or spread over them (`soar_mega.stages.scale`); a guidance-distilled model is
    # told it at all points
    guidance_scale: Scale = 4.5  # type: ignore[assignment]

    rules: ClassVar[dict[str, Rule]] = SftMultiConfig.rules | {
        "rollout_variant": one_of("simple", "sde", "flow_sde", "cps"),
        "eta": at_least(0),
        "guidance_scale": (is_scale, SCALES),
    }

    def forwards(self) -> Forwards:
        if not self.num_auxiliary_points:
            return super().forwards()
        share = guided_share(self.guidance_scale)
        answers, branches = self.rollout_steps * (1 + share), 2 if share else 1
        return super().forwards()._replace(answers=answers, query_branches=branches)

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.rollout_variant == "cps" and self.eta > 1:
            raise ValueError(f"stage.eta is {self.eta}: with stage.rollout_variant=cps it must be at most 1")
        if self.rollout_steps > 1 and self.num_rollout_paths > 1:
            raise ValueError(
                f"stage.rollout_steps={self.rollout_steps} is for the ODE path alone: set stage.num_rollout_paths=1, "
                "or stage.rollout_steps=1"
            )

    def asking(self, is_told: bool) -> Self:
        if is_told and not isinstance(self.guidance_scale, int | float):
            raise ValueError(
                f"stage.guidance_scale is {self.guidance_scale!r}: a guidance-distilled model is told one scale, so "
                "give one number"
            )
        return super().asking(is_told)


SETTINGS: dict[str, type[StageConfig]] = {
    "soar": SoarConfig,
    "sft": SftConfig,
    "sft_multi": SftMultiConfig,
    "mixflow": MixFlowConfig,
    "flow_grpo": FlowGrpoConfig,
    "diffusion_nft": DiffusionNftConfig,
}
