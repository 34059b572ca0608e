"""A run on its own samples against a sampler of a few lines and plain autograd in float64, by the trainers' formulas.

Everything is computed again: sigmas by diffusers, the samples, their advantages, and loss and gradients of the second
update, when the weights are no longer those that drew. Only keyed noise and the images' rewards are the run's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rl_cases import STAGES, rl_recipe, rl_steps
from rl_trainers import TRAINERS, Grpo, Nft, Step, advantages_of, dpm2, flow_sde
from torch import Tensor

from soar_mega.data.prompts import encode_prompts
from soar_mega.flow import normal, subset

pytestmark = pytest.mark.slow

STEPS, BATCH = 3, 8
LEVEL, CLIP, SCALE = 0.7, 0.5, 3.0
# at states [B, C, H, W], what the model is told, samples [B]
Velocity = Callable[[Tensor, float, Tensor], Tensor]


class ByHand:
    """The model of a run in float64, by the weights that drew and by those of now, at any samples' prompts."""

    def __init__(self, run: Any, prompt: Tensor, drew: dict[str, Tensor]) -> None:
        texts = encode_prompts(run.recipe.model.pipeline_dir, run.collector.prompts.prompts)
        self.text = texts.conditions.text[prompt].double()
        self.pooled = texts.conditions.pooled[prompt].double()
        self.empty = (texts.empty.text.double(), texts.empty.pooled.double())
        self.model, self.parameters = run.engine.model, run.engine.parameters
        self.drew = {name: value.double() for name, value in drew.items()}
        for parameter in self.parameters.values():
            del parameter.main_grad  # or the model would add to it in place of what torch does
        self.model.double()
        [chunk] = self.model.chunks
        chunk.config.params_dtype = torch.float64
        self.now = {name: p.detach().clone() for name, p in self.parameters.items()}

    def use(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value.view_as(self.parameters[name]))

    def velocity(self, scale: float) -> Velocity:
        def guided(x: Tensor, told: float, samples: Tensor) -> Tensor:
            times = torch.full((len(x),), told, dtype=torch.float64)
            cond = self.model(x, times, self.text[samples], self.pooled[samples])
            if scale == 1:
                return cond
            text, pooled = (value.expand(len(x), *value.shape[1:]) for value in self.empty)
            uncond = self.model(x, times, text, pooled)
            return uncond + scale * (cond - uncond)

        return guided


def sigmas() -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas.double().tolist()


def steps_of(hand: ByHand, seed: int, shape: tuple[int, ...], count: int) -> list[Step]:
    """Flow-GRPO's samples, all steps stochastic: each step of all of them, by the weights that are in the model."""
    s, velocity, place = sigmas(), hand.velocity(SCALE), torch.arange(count)
    x, taken = normal(seed, "collect", place, 0, shape).double(), []
    for i in range(STEPS):
        v = velocity(x, 1000 * s[i], place)
        step = Step(x=x, following=x, drawn_by=v, s=s[i], s_next=s[i + 1], top=s[1])
        _, mean, std, root = flow_sde(step, v, LEVEL)
        step.following = mean + std * root * normal(seed, "collect_step", place, i, shape).double()
        taken.append(step)
        x = step.following
    return taken


def of_sample(step: Step, i: int) -> Step:
    rows = slice(i, i + 1)
    return Step(step.x[rows], step.following[rows], step.drawn_by[rows], step.s, step.s_next, step.top)


def flow_grpo_terms(hand: ByHand, taken: list[Step], advantages: Any, second: range) -> Iterator[Tensor]:
    """The loss of each sample and step of an update; the reference is what drew."""
    loss, velocity = Grpo("flow_sde", LEVEL, CLIP, 5.0, kl="mean", kl_beta=0.04), hand.velocity(SCALE)
    for i in second:
        for step in taken[:-1]:
            one = of_sample(step, i)
            v = velocity(one.x, 1000 * one.s, torch.tensor([i]))
            yield loss.loss(one, v, one.drawn_by, advantages[i])


def nft_samples(hand: ByHand, seed: int, shape: tuple[int, ...], count: int) -> Tensor:
    place, velocity = torch.arange(count), hand.velocity(1.0)
    start = normal(seed, "collect", place, 0, shape).double()
    told = lambda s: float(int(torch.tensor(1000 * s, dtype=torch.float32)))  # noqa: E731
    return dpm2(lambda x, s: velocity(x, told(s), place), start, sigmas())


def nft_terms(hand: ByHand, seed: int, clean: Tensor, advantages: Any, second: range) -> Iterator[Tensor]:
    """The loss of each sample and level of an update; the old policy and the reference are what drew."""
    loss, velocity = Nft(1.0, 1e-4), hand.velocity(1.0)
    levels = subset(seed, "levels", torch.arange(len(clean)), STEPS, 2)
    points = [(i, path, sigmas()[level]) for i in second for path, level in enumerate(levels[i].tolist())]
    noise = [
        normal(seed, "rollout", torch.tensor([i]), path, clean.shape[1:]).double() for i, path, _ in points
    ]
    states = [(1 - t) * clean[i : i + 1] + t * eps for (i, _, t), eps in zip(points, noise, strict=True)]

    def asked() -> list[Tensor]:
        each = zip(points, states, strict=True)
        return [velocity(x, 1000 * t, torch.tensor([i])) for (i, _, t), x in each]

    hand.use(hand.drew)
    with torch.no_grad():
        old = asked()
    hand.use(hand.now)
    for (i, _, t), eps, v, before in zip(points, noise, asked(), old, strict=True):
        yield loss.loss(clean[i : i + 1], eps, t, v, before, before, advantages[i])


PLAIN = {"model__fused_kernels": "false", "optimizer__lr": 1e-3}  # the fused ones know no float64
SETTINGS: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "stage__guidance_scale": SCALE,
        "stage__eta": LEVEL,
        "stage__clip_range": CLIP,
        "stage__kl_beta": 0.04,
    },
    "diffusion_nft": {},
}


@pytest.mark.parametrize("stage", STAGES)
def test_samples_loss_and_gradients_are_computed_again(stage: str, tmp_path: Path) -> None:
    with rl_steps(rl_recipe(tmp_path, stage, **SETTINGS[stage], **PLAIN)) as run:
        drew = {name: p.detach().clone() for name, p in run.engine.parameters.items()}
        collection = run.collect()
        count, shape, seed = len(collection.prompt), run.collector._latent_shape, run.recipe.train.seed
        samples = run.collector.latents(torch.arange(count))
        first = run.learn()
        assert run.update().ok
        statistics = run.learn()
        assert statistics["loss"] != first["loss"]
        gradients = {name: value.double() for name, value in run.engine.gradients().items()}

        rewards = collection.rewards["total"].numpy()
        trainer = TRAINERS["flow_grpo_ocr" if stage == "flow_grpo" else "diffusion_nft_geneval"]
        advantages = advantages_of(rewards, collection.prompt.tolist(), trainer.std_of)
        torch.testing.assert_close(
            collection.advantages, torch.from_numpy(advantages), rtol=1e-12, atol=1e-13
        )

        hand = ByHand(run, collection.prompt, drew)
        hand.use(hand.drew)
        with torch.no_grad():
            if stage == "flow_grpo":
                taken = steps_of(hand, seed, shape, count)
                clean = taken[-1].following
            else:
                clean = nft_samples(hand, seed, shape, count)
        torch.testing.assert_close(samples.double(), clean, rtol=0, atol=1e-5 * float(clean.abs().max()))

        hand.use(hand.now)
        second = range(BATCH, 2 * BATCH)
        if stage == "flow_grpo":
            terms = list(flow_grpo_terms(hand, taken, advantages, second))
        else:
            terms = list(nft_terms(hand, seed, clean, advantages, second))
        loss = torch.stack(terms).mean()
        assert statistics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        parameters = run.engine.parameters
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        largest = max(float(each.abs().max()) for each in expected if each is not None)
        for name, each in zip(parameters, expected, strict=True):
            each = torch.zeros_like(gradients[name]) if each is None else each
            error = (gradients[name].view_as(each) - each).abs().max() / max(
                float(each.abs().max()), 1e-3 * largest
            )
            assert float(error) < 1e-4, (name, float(error))
