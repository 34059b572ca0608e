"""A collection of a stage without an engine: a model of four numbers, a sampler in this process, and the points."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from point_sources import gather_sources
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.evaluation.scorer import TOTAL
from soar_mega.flow import TIMESTEPS, guided, normal, sample, sample_steps
from soar_mega.stages import CollectingConfig, make_stage
from soar_mega.stages.collecting import START_NOISE, STEP_NOISE, CollectingStage, Trajectories
from soar_mega.stages.points import Points, Velocities

SEED, SHAPE, PROMPTS, IMAGES = 5, (2, 3, 4), 3, 4
SAMPLES = PROMPTS * IMAGES
FIRST = 2 * SAMPLES  # the third collection
THETA = torch.tensor([0.6, -0.8, 0.3, 0.4], dtype=torch.float64)
REFERENCE = THETA + torch.tensor([0.2, 0.1, -0.1, 0.05], dtype=torch.float64)
NOW = THETA + torch.tensor([0.03, -0.02, 0.01, 0.02], dtype=torch.float64)  # after some updates
# three of four samples differ, one prompt's are equal
REWARDS = torch.tensor([0.1, 0.5, 0.8, 0.9, 0.5, 0.25, 0.4, 0.5, -0.6, 0.35, 0.5, 1.0], dtype=torch.float64)


def model(theta: Tensor, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    """Velocity [B, ...] by additions and products alone, which are the same in a batch of any size."""
    theta, condition = theta.to(x), condition.to(x)[:, None, None, None]
    time = (timestep.float() / TIMESTEPS).to(x)[:, None, None, None]
    return theta[0] * x + theta[1] * condition + theta[2] * time * time + theta[3] * x * time


def with_guidance(theta: Tensor, x: Tensor, timestep: Tensor, condition: Tensor, scale: float) -> Tensor:
    """The velocity at a guidance scale, v_uncond + scale (v_cond - v_uncond)."""
    cond = model(theta, x, timestep, condition)
    if scale == 1:
        return cond
    uncond = model(theta, x, timestep, torch.zeros_like(condition))
    return uncond + scale * (cond - uncond)


@dataclass
class Case:
    """A collection, drawn by the weights `theta`."""

    config: CollectingConfig
    stage: CollectingStage
    drawn: Trajectories
    batch: Batch
    prompt: Tensor

    def points(self) -> Points:
        points = self.stage.points(self.batch)
        points.sources = gather_sources(self.batch, points, None, None)
        return points

    def condition(self) -> Tensor:
        """[R] of the rows."""
        assert self.batch.prompt is not None
        return 0.3 * (self.batch.prompt + 1)

    def velocity(self, points: Points, theta: Tensor, scale: float | None = None) -> Tensor:
        """[P, ...] at the points, in the precision of its states."""
        scale = self.config.learned_scale if scale is None else scale
        condition = self.condition()[points.sample]
        return with_guidance(theta, points.states(), points.timestep, condition, scale)

    def loss(self, theta: Tensor, **answers: Tensor) -> tuple[Tensor, Points]:
        """What an engine would train on, with the weights of further answers by name."""
        points = self.points()
        states, condition = points.states(), self.condition()[points.sample]
        for name, weights in answers.items():
            queries = self.stage.further[name].queries(self.batch)
            assert torch.equal(queries.rows, points.state_rows)
            assert torch.equal(queries.timestep, points.timestep)
            cond = model(weights, states, queries.timestep, condition)
            none = torch.zeros_like(condition)
            uncond = model(weights, states, queries.timestep, none) if queries.unconditional else None
            points.answered[name] = Velocities(uncond, cond)
        losses = self.stage.loss(points, self.velocity(points, theta))
        return (points.weight * losses).sum() / points.count.sum(), points


def alike(config: CollectingConfig, values: Tensor) -> dict[str, Tensor]:
    """The same values of each reward, whose weights add up to 1, and so in total."""
    return dict.fromkeys([*config.rewards, TOTAL], values)


def collect(config: CollectingConfig, theta: Tensor = THETA, shift: float = 3.0) -> Case:
    """A small collection of a recipe's stage: all of it is one batch."""
    config = replace(config, images_per_prompt=IMAGES, prompts_per_collection=PROMPTS)
    stage: CollectingStage = make_stage(config, shift)  # type: ignore[assignment]
    place = torch.arange(SAMPLES)
    position, prompt = FIRST + place, place % PROMPTS
    drawn = draw(stage, theta, position, prompt)
    experience = stage.experience(drawn, stage.advantages(alike(config, REWARDS), prompt))
    rows = experience.sample
    batch = Batch(
        seed=SEED,
        position=position[rows],
        valid=torch.ones(len(rows), dtype=torch.bool),
        latent_shape=SHAPE,
        text_length=1,
        latents=experience.latents,
        prompt=prompt[rows],
        collected=experience.collected,
    )
    return Case(config, stage, drawn, batch, prompt)


def draw(stage: CollectingStage, theta: Tensor, position: Tensor, prompt: Tensor) -> Trajectories:
    """Samples at `position` of prompts."""
    plan = stage.plan(SEED, position)
    start = FIRST + prompt if plan.same_start else position
    latents = normal(SEED, START_NOISE, start, 0, SHAPE)
    condition, told = 0.3 * (prompt + 1), plan.timesteps / TIMESTEPS

    def cond(x: Tensor, sigma: Tensor) -> Tensor:
        return model(theta, x, TIMESTEPS * sigma, condition)

    def uncond(x: Tensor, sigma: Tensor) -> Tensor:
        return model(theta, x, TIMESTEPS * sigma, torch.zeros_like(condition))

    def noise(step: int, samples: Tensor) -> Tensor:
        return normal(SEED, STEP_NOISE, position[samples], step, SHAPE)

    velocity = guided(cond, uncond, plan.guidance_scale)
    state = torch.zeros(*plan.kept.shape, *SHAPE)
    following, old = torch.zeros_like(state), torch.zeros(plan.kept.shape, dtype=torch.float64)
    if plan.stochastic.any():
        for found in sample_steps(
            velocity, latents, plan.sigmas, plan.variant, plan.eta, plan.stochastic, noise, told
        ):
            row, column = (plan.kept == found.step).nonzero(as_tuple=True)
            state[row, column], following[row, column] = found.state[row], found.following[row]
            old[row, column] = found.log_probability[row].double()
            latents = found.following
    else:
        latents = sample(velocity, latents, plan.sigmas, plan.solver, told)
    return Trajectories(
        position=position,
        clean=latents,
        step=plan.kept,
        state=state,
        following=following,
        log_probability=old,
    )


def assert_same_gradient(case: Case, published: Callable[[Tensor], Tensor], least: float) -> None:
    """Loss and gradient are those of a trainer's loss of the weights: to 1e-5, of a loss of at least `least`."""
    kept = {"old": THETA, "reference": REFERENCE}
    ours, theirs = NOW.clone().requires_grad_(), NOW.clone().requires_grad_()
    loss, points = case.loss(ours, **{name: kept[name] for name in case.stage.keeps})
    for observed in points.observed.values():
        assert observed.shape == (len(points),) and not observed.requires_grad
    expected = published(theirs)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * max(least, abs(expected.item()))
    assert ours.grad is not None and theirs.grad is not None
    assert bool(theirs.grad.abs().max() > 0)
    assert (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()
