"""The settings of the methods that learn from their own samples, with all in which their published trainers differ.

`soar_mega.stages.published` has those trainers' own values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from soar_mega.config import Forwards, Recipe, StageConfig
from soar_mega.rules import Rule, above, at_least, one_of, within


@dataclass(kw_only=True)
class CollectingConfig(StageConfig):
    """How samples are drawn and judged (defaults: flow_grpo's).

    Attributes:
        drawn_with: settings that must not change while samples are learned from that were drawn with them.
    """

    collects: ClassVar[bool] = True
    drawn_with: ClassVar[tuple[str, ...]] = ()

    # samples of a prompt: a group, whose mean reward advantages are measured from
    images_per_prompt: int = 24
    prompts_per_collection: int = 48  # groups that are drawn before they are learned from
    updates_per_sample: int = 1  # how often a collection is learned from
    collect_micro_batch_size: int = 8  # samples of one forward while they are drawn
    rewards: dict[str, float] = field(default_factory=dict)  # what judges samples: name -> weight
    scorer_weights_dir: str = ""  # of rewards that are published scorers (soar-mega fetch-weights)
    sampling_steps: int = 10  # of the sampler that draws them
    sigma_grid: str = "diffusers"  # diffusers (its scheduler's) | linear (equal steps of unshifted time)
    integer_timesteps: bool = False  # the model is told whole timesteps, cut off, while samples are drawn
    guidance_scale: float = 4.5  # of samples: 1 asks the conditional branch alone
    learning_guidance_scale: float | None = None  # of the velocity that is learned; null: that of samples
    detach_unconditional: bool = False  # learning changes the conditional branch alone
    same_start: bool = False  # the samples of a prompt start from the same noise
    advantages_of: str = (
        "total"  # total (the weighted rewards' sum) | each (the weighted sum of each one's advantages)
    )
    std_over: str = "collection"  # collection | prompt: whose standard deviation divides the advantages
    std_unbiased: bool = False  # divided by n - 1, not n
    std_epsilon: float = 1e-4  # keeps that standard deviation from being 0
    std_epsilon_use: str = "added"  # added | in_root (sqrt(var + epsilon)) | floor (max(std, epsilon))
    advantage_clip: float | None = 5.0  # largest size of an advantage; null: any
    # weight of the distance from the reference: the weights before, with adapters the model without them; 0: none is
    # kept or asked
    kl_beta: float = 0.0

    rules: ClassVar[dict[str, Rule]] = StageConfig.rules | {
        "images_per_prompt": at_least(1),
        "prompts_per_collection": at_least(1),
        "updates_per_sample": at_least(1),
        "collect_micro_batch_size": at_least(1),
        "sampling_steps": at_least(2),
        "sigma_grid": one_of("diffusers", "linear"),
        "learning_guidance_scale": at_least(0),
        "advantages_of": one_of("total", "each"),
        "std_over": one_of("collection", "prompt"),
        "std_epsilon": at_least(0),
        "std_epsilon_use": one_of("added", "in_root", "floor"),
        "advantage_clip": above(0),
        "kl_beta": at_least(0),
    }

    @property
    def samples_per_collection(self) -> int:
        return self.images_per_prompt * self.prompts_per_collection

    @property
    def learned_scale(self) -> float:
        """Guidance scale of the velocity that is learned."""
        scale = self.learning_guidance_scale
        return self.guidance_scale if scale is None else scale

    @property
    def trained_points(self) -> int:
        """Training points of a sample."""
        raise NotImplementedError

    def asking(self, is_told: bool) -> Self:
        if is_told and (self.learning_guidance_scale is not None or self.detach_unconditional):
            raise ValueError(
                "stage.learning_guidance_scale and stage.detach_unconditional are for models of two branches: a "
                "guidance-distilled model is told stage.guidance_scale, so leave them out"
            )
        return super().asking(is_told)

    def forwards(self) -> Forwards:
        """In one update; what it takes to draw samples is `sampling_forwards`."""
        branches = 1 if self.learned_scale == 1.0 else 2
        forwards = branches * self.trained_points
        answers = len(self.kept_copies) * forwards
        query_branches = branches if answers else 1
        return Forwards(
            answers=answers, points=forwards, query_branches=query_branches, point_branches=branches
        )

    @property
    def drawn_rows(self) -> int:
        return self.collect_micro_batch_size

    @property
    def kept_copies(self) -> tuple[str, ...]:
        """Copies of the weights whose answers the loss reads."""
        return ("reference",) if self.kl_beta > 0 else ()

    @property
    def drawing_forwards(self) -> float:
        return self.sampling_forwards() / self.updates_per_sample

    def sampling_forwards(self) -> int:
        """Forwards that it takes to draw a sample, and to replay its steps, both branches of guidance counted; once for
        all of its updates."""
        return self.sampling_steps * (1 if self.guidance_scale == 1.0 else 2)

    def check(self, recipe: Recipe) -> None:
        samples, global_batch_size = self.samples_per_collection, recipe.train.global_batch_size
        if samples % global_batch_size:
            raise ValueError(
                f"a collection of stage.prompts_per_collection ({self.prompts_per_collection}) times "
                f"stage.images_per_prompt ({self.images_per_prompt}) samples is cut into updates of "
                f"train.global_batch_size ({global_batch_size}), which must divide {samples}"
            )
        if not self.rewards:
            raise ValueError(
                "stage.rewards is empty: name what judges samples, with its weight, such as {jpeg_compressibility: 1.0}"
            )
        if self.detach_unconditional and self.learned_scale == 1.0:
            raise ValueError(
                "stage.detach_unconditional=true, but at a guidance scale of 1 learning asks one branch alone: leave "
                "it out, or set stage.learning_guidance_scale"
            )


@dataclass(kw_only=True)
class FlowGrpoConfig(CollectingConfig):
    """Which steps are stochastic, and the loss on them (defaults: flow_grpo's for SD3.5 and OCR)."""

    drawn_with: ClassVar[tuple[str, ...]] = (  # all that the probability of a step depends on
        "shift",
        "sampling_steps",
        "sigma_grid",
        "integer_timesteps",
        "guidance_scale",
        "learning_guidance_scale",
        "variant",
        "eta",
    )

    name: str = "flow_grpo"
    kl_beta: float = 0.04
    variant: str = "flow_sde"  # of stochastic steps: flow_sde | cps | dance
    eta: float = 0.7  # strength of their noise; cps: at most 1
    # which steps have noise: all (the last one is not learned from) | all_but_last | of stochastic_range: window |
    # random | sliding
    stochastic_steps: str = "all"
    num_stochastic_steps: int = 3  # of window, random and sliding
    # steps [first, end) to take them from
    stochastic_range: list[int] = field(default_factory=lambda: [0, 5])
    drawn_per: str = "prompt"  # window and random: collection | prompt | sample
    window_interval: int = 25  # sliding: collections until the window moves
    window_stride: int = 1  # and by how many steps; behind the range it starts again
    num_learned_steps: int | None = None  # so many of the stochastic steps, drawn per sample; null: all
    drop_zero_advantages: bool = True  # samples with an advantage of 0 count for nothing
    clip_range: float = 1e-4  # how far from 1 the ratio of probabilities counts
    ratio: str = (
        "plain"  # plain | guard (GRPO-Guard: without the bias of the mean, in units of the step's noise)
    )
    divide_by_step: bool = False  # the clipped loss is divided by the length of the step
    # of kl_beta: mean (distance of means, over 2 std^2) | latents (of means alone) | velocity
    kl: str = "mean"
    # of a step when it was drawn: sampled (as then) | replayed (in the forwards of training)
    old_log_probabilities: str = "sampled"

    rules: ClassVar[dict[str, Rule]] = CollectingConfig.rules | {
        "variant": one_of("flow_sde", "cps", "dance"),
        "eta": above(0),
        "stochastic_steps": one_of("all", "all_but_last", "window", "random", "sliding"),
        "num_stochastic_steps": at_least(1),
        "drawn_per": one_of("collection", "prompt", "sample"),
        "window_interval": at_least(1),
        "window_stride": at_least(1),
        "num_learned_steps": at_least(1),
        "clip_range": above(0),
        "ratio": one_of("plain", "guard"),
        "kl": one_of("mean", "latents", "velocity"),
        "old_log_probabilities": one_of("sampled", "replayed"),
    }

    @property
    def candidates(self) -> int:
        """Stochastic steps of a sample that can be learned from."""
        return (
            self.sampling_steps - 1 if self.stochastic_steps.startswith("all") else self.num_stochastic_steps
        )

    @property
    def trained_points(self) -> int:
        return self.candidates if self.num_learned_steps is None else self.num_learned_steps

    def sampling_forwards(self) -> int:
        replays = self.forwards().points if self.old_log_probabilities == "replayed" else 0
        return super().sampling_forwards() + replays

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.variant == "cps" and self.eta > 1:
            raise ValueError(f"stage.eta is {self.eta}: with stage.variant=cps it must be at most 1")
        if not self.stochastic_steps.startswith("all"):
            self._check_range(self.stochastic_range)
        if self.trained_points > self.candidates:
            raise ValueError(
                f"stage.num_learned_steps is {self.num_learned_steps}: no more than {self.candidates} steps of a "
                "sample are stochastic and can be learned from"
            )
        if recipe.lora.dropout > 0:
            raise ValueError(
                "stage.name=flow_grpo compares the probability of a step with that when it was drawn, without dropout: "
                "set lora.dropout=0"
            )
        if self.ratio == "guard" and self.old_log_probabilities == "replayed":
            raise ValueError(
                "stage.ratio=guard measures from the means that samples were drawn around: set "
                "stage.old_log_probabilities=sampled"
            )

    def _check_range(self, steps: Sequence[int]) -> None:
        last = self.sampling_steps - 1
        if len(steps) != 2 or not 0 <= steps[0] < steps[1] <= last:
            raise ValueError(
                f"stage.stochastic_range is {list(steps)}: it must be [first, end] with 0 <= first < end <= {last}, as "
                f"the last of stage.sampling_steps={self.sampling_steps} steps cannot be learned from"
            )
        if self.num_stochastic_steps > steps[1] - steps[0]:
            raise ValueError(
                f"stage.num_stochastic_steps is {self.num_stochastic_steps}, but stage.stochastic_range={list(steps)} "
                f"has {steps[1] - steps[0]} steps"
            )


@dataclass(kw_only=True)
class DiffusionNftConfig(CollectingConfig):
    """Where samples are learned from, and the two policies (defaults: DiffusionNFT's for SD3.5)."""

    name: str = "diffusion_nft"
    guidance_scale: float = 1.0
    integer_timesteps: bool = True
    kl_beta: float = 1e-4
    solver: str = "dpm++2m"  # of the sampler: euler | heun | dpm++2m
    beta: float = 1.0  # how far the positive and the negative policy are from the old one
    # steps of the sampler whose sigmas are learned at: random (drawn per sample) | first | stratified (one drawn of
    # each of as many equal parts of the steps before the last one whose sigma is at least lowest_sigma)
    levels: str = "random"
    num_levels: int = 9  # sigmas that each sample is learned at
    lowest_sigma: float = 0.5  # with levels=stratified: the lowest that is learned at
    weight_floor: float = 1e-5  # of the mean error that a policy's squared error is divided by
    # how the old policy follows after a collection, t updates into the run: old <- d old + (1 - d) current;
    # ramp: d = 0 before old_decay_start, then min(old_decay_rate (t - old_decay_start), old_decay_max);
    # constant: d = old_decay_max
    old_decay: str = "ramp"
    old_decay_start: int = 0  # update until which d is 0
    old_decay_rate: float = 0.001  # what d grows by in an update
    old_decay_max: float = 0.5  # largest d

    rules: ClassVar[dict[str, Rule]] = CollectingConfig.rules | {
        "solver": one_of("euler", "heun", "dpm++2m"),
        "beta": above(0),
        "levels": one_of("random", "first", "stratified"),
        "num_levels": at_least(1),
        "lowest_sigma": within(0, 1),
        "weight_floor": above(0),
        "old_decay": one_of("ramp", "constant"),
        "old_decay_start": at_least(0),
        "old_decay_rate": at_least(0),
        "old_decay_max": within(0, 1),
    }

    @property
    def trained_points(self) -> int:
        return self.num_levels

    @property
    def kept_copies(self) -> tuple[str, ...]:
        return ("old", *super().kept_copies)

    def sampling_forwards(self) -> int:
        forwards = super().sampling_forwards()
        steps = self.sampling_steps
        return forwards // steps * (2 * steps - 1) if self.solver == "heun" else forwards

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.num_levels > self.sampling_steps:
            raise ValueError(
                f"stage.num_levels is {self.num_levels}: no more than stage.sampling_steps={self.sampling_steps} "
                "sigmas can be learned at"
            )
        if self.advantage_clip is None:
            raise ValueError(
                "stage.advantage_clip is what maps advantages to shares of the positive policy: give it (published: 5)"
            )
