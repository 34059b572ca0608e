"""DiffusionNFT: loss and gradients against the published trainers' formulas, its levels, and the old policy's decay."""

from dataclasses import replace

import pytest
import torch
from rl_trainers import TRAINERS, advantages_of, dpm2, nft_decay
from small_collection import (
    FIRST,
    NOW,
    REFERENCE,
    REWARDS,
    SAMPLES,
    SEED,
    SHAPE,
    THETA,
    Case,
    assert_same_gradient,
    collect,
    with_guidance,
)

from soar_mega.config import Recipe, TrainConfig
from soar_mega.flow import Schedule, normal, sample
from soar_mega.kernels import STREAMS
from soar_mega.stages import DiffusionNftConfig, make_stage
from soar_mega.stages.published import PUBLISHED

PRESETS = {name: p.stage for name, p in PUBLISHED.items() if isinstance(p.stage, DiffusionNftConfig)}


def published_loss(case: Case, trainer, theta: torch.Tensor) -> torch.Tensor:
    """The mean over samples and levels of a trainer's loss, at the noise and levels of the points."""
    advantages = advantages_of(REWARDS.numpy(), case.prompt.tolist(), trainer.std_of)
    points, terms = case.stage.points(case.batch), []
    for row, path, t in zip(points.sample.tolist(), points.path, points.sigma.tolist(), strict=True):
        x0 = case.drawn.clean[row].double()[None]
        noise = normal(SEED, STREAMS["eps"], case.batch.position[row : row + 1], path[None], SHAPE).double()
        xt = (1 - t) * x0 + t * noise
        condition = 0.3 * (case.prompt[row : row + 1].double() + 1)
        told = torch.tensor([1000 * t], dtype=torch.float64)
        scale = case.config.learned_scale
        of = [with_guidance(weights, xt, told, condition, scale) for weights in (theta, THETA, REFERENCE)]
        terms.append(trainer.loss.loss(x0, noise, t, *of, advantages[row]))
    return torch.stack(terms).mean()


def both_gradients(case: Case, trainer) -> None:
    """Loss and gradient of a stage and of a trainer's formulas agree to 1e-5."""
    assert_same_gradient(case, lambda theta: published_loss(case, trainer, theta), least=0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_are_the_trainers(name):
    both_gradients(collect(PRESETS[name]), TRAINERS[name])


def test_advantages_are_cut_off():
    config, trainer = replace(PRESETS["diffusion_nft_ocr"], advantage_clip=0.6), TRAINERS["diffusion_nft_ocr"]
    both_gradients(collect(config), replace(trainer, loss=replace(trainer.loss, clip=0.6)))


def test_it_can_learn_with_guidance():
    config = replace(PRESETS["diffusion_nft_ocr"], guidance_scale=2.0)
    case = collect(config)
    assert case.points().guidance_scale == 2.0
    both_gradients(case, TRAINERS["diffusion_nft_ocr"])


def test_on_policy_both_policies_are_the_old_one():
    case = collect(PRESETS["diffusion_nft_ocr"])
    _, points = case.loss(THETA, old=THETA, reference=THETA)
    torch.testing.assert_close(points.observed["positive"], points.observed["negative"])
    assert not bool(points.observed["old_distance"].any()) and not bool(points.observed["kl"].any())


def test_samples_are_drawn_by_the_old_policy_and_only_their_ends_are_kept():
    stage = make_stage(PRESETS["diffusion_nft_geneval"], 3.0)
    assert stage.collect_weights == "old" and stage.keeps == ("old", "reference")
    assert make_stage(PRESETS["unirl_nft"], 3.0).keeps == ("old",)
    plan = stage.plan(SEED, torch.arange(4))
    assert plan.solver == "dpm++2m" and not bool(plan.stochastic.any()) and plan.kept.shape == (4, 0)
    whole = (1000 * Schedule(3.0).inference_sigmas(10)[:-1].float()).int().double()
    assert torch.equal(plan.timesteps, whole)  # samples are drawn at whole timesteps
    case = collect(PRESETS["diffusion_nft_geneval"])
    assert torch.equal(case.stage.points(case.batch).timestep.unique(), (1000 * plan.sigmas[:-1]).unique())
    assert torch.equal(case.batch.latents, case.drawn.clean) and len(case.batch) == SAMPLES


@pytest.mark.parametrize("steps", [10, 25])
def test_the_sampler_takes_the_steps_of_the_trainer(steps):
    sigmas = Schedule(3.0).inference_sigmas(steps)
    z = normal(0, "start", torch.arange(2), 0, SHAPE).double()
    theirs = dpm2(lambda x, s: 0.7 * x + s * s - 0.4 * s * x.sin(), z, sigmas.tolist())
    ours = sample(lambda x, s: 0.7 * x + s[0] ** 2 - 0.4 * s[0] * x.sin(), z, sigmas, "dpm++2m")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_levels_are_those_of_the_settings():
    def levels(config: DiffusionNftConfig, size: int = 1) -> torch.Tensor:
        case = collect(config)
        case.batch.position = torch.arange(SAMPLES * size, SAMPLES * (size + 1))
        sigmas, points = (
            case.stage.plan(SEED, case.batch.position).sigmas,
            case.stage.points(case.batch),
        )
        steps = (points.sigma[:, None] == sigmas[:-1]).nonzero()[:, 1]
        assert torch.equal(points.path.view(SAMPLES, -1)[3], torch.arange(config.num_levels))
        return steps.view(SAMPLES, config.num_levels)

    drawn = torch.cat([levels(PRESETS["diffusion_nft_geneval"], size) for size in range(5)])
    assert bool((drawn.diff(dim=1) > 0).all()) and len(drawn.unique(dim=0)) == 10  # one of ten is left out
    assert levels(PRESETS["unirl_nft"])[5].tolist() == list(range(9))
    stratified = torch.cat([levels(PRESETS["flow_factory_nft"], size) for size in range(5)])
    parts = [(0, 2), (2, 5), (5, 7), (7, 10)]  # of the eleven steps from sigma 1 to above .5
    for column, (first, end) in zip(stratified.T, parts, strict=True):
        assert column.unique().tolist() == list(range(first, end))


def test_parts_of_the_steps_must_be_as_many_as_levels():
    with pytest.raises(ValueError, match="stage.num_levels=9 with stage.levels=stratified: only 6 steps"):
        make_stage(DiffusionNftConfig(levels="stratified"), 3.0)
    assert make_stage(DiffusionNftConfig(levels="stratified", num_levels=6), 3.0)


def test_old_policy_follows_after_each_collection_by_the_published_decay():
    for name, kind in (("diffusion_nft_geneval", 1), ("diffusion_nft_ocr", 2)):
        stage = make_stage(PRESETS[name], 3.0)
        for iteration in range(1, 800):
            assert stage.blends(iteration, is_collection_over=False) == {}
            expected = {"old": pytest.approx(nft_decay(iteration, kind), abs=1e-15)}
            assert stage.blends(iteration, is_collection_over=True) == expected
    late = make_stage(PRESETS["flow_factory_nft"], 3.0)  # counts from 0
    assert [late.blends(i, True)["old"] for i in (1, 2, 601)] == [0.0, 0.001, 0.5]
    constant = replace(PRESETS["unirl_nft"], old_decay="constant", old_decay_max=0.9)
    assert make_stage(constant, 3.0).blends(1, True) == {"old": 0.9}


def test_what_cannot_be_learned_from_counts_for_nothing():
    case = collect(PRESETS["diffusion_nft_ocr"])
    case.drawn.clean[0] = torch.nan  # and so is its reward
    advantages = case.batch.collected["advantage"].index_fill(0, torch.tensor([0]), torch.nan)
    experience = case.stage.experience(case.drawn, advantages)
    case.batch.latents, case.batch.collected = experience.latents, experience.collected
    case.batch.valid[2] = False
    points = case.points()
    gone = (points.sample == 0) | (points.sample == 2)
    assert torch.equal(points.count == 0, gone) and torch.equal(points.weight, points.count)
    loss, _ = case.loss(NOW, old=THETA, reference=REFERENCE)
    assert bool(loss.isfinite())


def test_positions_alone_key_levels_and_noise():
    case = collect(PRESETS["diffusion_nft_geneval"])
    points = case.points()
    part = replace(case.batch, position=case.batch.position[4:7], valid=case.batch.valid[4:7])
    part.latents, part.prompt = case.batch.latents[4:7], case.batch.prompt[4:7]
    part.collected = {name: column[4:7] for name, column in case.batch.collected.items()}
    few = Case(case.config, case.stage, case.drawn, part, case.prompt).points()
    mine = (points.sample >= 4) & (points.sample < 7)
    assert torch.equal(points.sigma[mine], few.sigma)
    assert torch.equal(points.states()[mine], few.states()) and case.batch.position[0] == FIRST


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_levels": 11}, "stage.num_levels is 11.*sampling_steps=10"),
        ({"advantage_clip": None}, "stage.advantage_clip"),
        ({"prompts_per_collection": 10}, "must divide 240"),
    ],
)
def test_settings_that_do_not_fit_are_named(changed, words):
    with pytest.raises(ValueError, match=words):
        config = replace(PRESETS["diffusion_nft_ocr"], **changed)
        config.check(Recipe(stage=config, train=TrainConfig(global_batch_size=576)))
