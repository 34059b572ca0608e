"""Flow-GRPO: draws, loss and gradients against the published trainers' formulas, and the ratio on policy."""

from dataclasses import replace

import pytest
import torch
from rl_trainers import TRAINERS, Step, advantages_of, mix_grpo_windows
from small_collection import (
    FIRST,
    IMAGES,
    NOW,
    PROMPTS,
    REFERENCE,
    REWARDS,
    SAMPLES,
    SEED,
    SHAPE,
    THETA,
    Case,
    alike,
    assert_same_gradient,
    collect,
    with_guidance,
)

from soar_mega.config import LoraConfig, Recipe, TrainConfig
from soar_mega.flow import SOURCES, Schedule, normal
from soar_mega.stages import FlowGrpoConfig, make_stage
from soar_mega.stages.collecting import STEP_NOISE
from soar_mega.stages.published import PUBLISHED
from soar_mega.stages.stochastic_steps import learned_steps, stochastic_steps

PRESETS = {name: p.stage for name, p in PUBLISHED.items() if isinstance(p.stage, FlowGrpoConfig)}


def with_batch(config: FlowGrpoConfig, global_batch_size: int) -> None:
    """Checks a stage's settings in a recipe."""
    config.check(Recipe(stage=config, train=TrainConfig(global_batch_size=global_batch_size)))


def published_loss(case: Case, trainer, theta: torch.Tensor) -> torch.Tensor:
    """The mean over samples and steps of a trainer's loss, at the states that were drawn."""
    advantages = advantages_of(REWARDS.numpy(), case.prompt.tolist(), trainer.std_of)
    sigmas = case.stage.plan(SEED, case.drawn.position).sigmas.tolist()
    told = case.stage.plan(SEED, case.drawn.position).timesteps
    drawn, terms = case.drawn, []
    for sample, advantage in enumerate(advantages):
        if trainer.drops and advantage == 0:
            continue
        condition = 0.3 * (case.prompt[sample : sample + 1].double() + 1)
        for column, step in enumerate(drawn.step[sample].tolist()):
            x = drawn.state[sample, column].double()[None]
            of = [
                with_guidance(weights, x, told[step : step + 1], condition, scale)
                for weights, scale in (
                    (THETA, case.config.guidance_scale),
                    (theta, case.config.learned_scale),
                    (REFERENCE, case.config.learned_scale),
                )
            ]
            taken = Step(
                x=x,
                following=drawn.following[sample, column].double()[None],
                drawn_by=of[0],
                s=sigmas[step],
                s_next=sigmas[step + 1],
                top=sigmas[1],
            )
            terms.append(trainer.loss.loss(taken, of[1], of[2], advantage))
    return torch.stack(terms).mean()


def both_gradients(case: Case, trainer) -> None:
    """Loss and gradient of a stage and of a trainer's formulas agree to 1e-5."""
    assert_same_gradient(case, lambda theta: published_loss(case, trainer, theta), least=1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_are_the_trainers(name):
    both_gradients(collect(PRESETS[name]), TRAINERS[name])


@pytest.mark.parametrize("kl", ["mean", "latents", "velocity"])
@pytest.mark.parametrize("variant", ["flow_sde", "cps", "dance"])
def test_every_distance_from_the_reference_is_the_trainers(kl, variant):
    config = replace(PRESETS["flow_factory_grpo"], variant=variant, kl=kl, kl_beta=0.3, eta=0.7)
    trainer = TRAINERS["flow_factory_grpo"]
    loss = replace(trainer.loss, variant=variant, level=0.7, kl=kl, kl_beta=0.3)
    both_gradients(collect(config), replace(trainer, loss=loss))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_learning_may_have_another_guidance_than_drawing(scale):
    config = replace(PRESETS["flow_grpo_ocr"], learning_guidance_scale=scale)
    both_gradients(collect(config), TRAINERS["flow_grpo_ocr"])


def test_advantages_are_cut_off():
    config, trainer = replace(PRESETS["flow_grpo_ocr"], advantage_clip=0.6), TRAINERS["flow_grpo_ocr"]
    both_gradients(collect(config), replace(trainer, loss=replace(trainer.loss, advantage_clip=0.6)))


@pytest.mark.parametrize("name", PRESETS)
def test_ratio_on_policy_is_one_to_the_bit(name):
    case = collect(PRESETS[name])
    _, points = case.loss(THETA, **({"reference": THETA} if case.stage.keeps else {}))
    assert bool((points.observed["ratio"] == 1).all())
    assert not bool(points.observed["clipped"].any()) and not bool(points.observed["approx_kl"].any())
    if case.stage.keeps:
        assert not bool(points.observed["kl"].any())
    again = case.stage.log_probability(points, case.velocity(points, THETA))
    assert torch.equal(again.double(), points.extra["old_log_probability"])


def test_what_a_loss_observes_is_that_of_the_ratio():
    case = collect(PRESETS["flow_grpo_ocr"])
    _, points = case.loss(NOW, reference=REFERENCE)
    new = case.stage.log_probability(points, case.velocity(points, NOW)).detach()
    change = new - points.extra["old_log_probability"].float()
    ratio, clip = points.observed["ratio"], case.config.clip_range
    torch.testing.assert_close(ratio, change.exp())
    torch.testing.assert_close(points.observed["approx_kl"], change.square() / 2)
    assert torch.equal(points.observed["clipped"], ((ratio < 1 - clip) | (ratio > 1 + clip)).float())


def test_gradient_goes_through_both_branches_unless_one_is_detached():
    points = collect(PRESETS["flow_grpo_ocr"]).points()
    assert points.guidance_scale == 4.5 and not points.detach_unconditional
    detached = collect(replace(PRESETS["flow_grpo_ocr"], detach_unconditional=True)).points()
    assert detached.detach_unconditional
    # a model that is told the scale is asked once, while samples are drawn and learned from
    told = PRESETS["dance_grpo"].asking(is_told=True)
    assert collect(told).points().guidance_scale == 1.0 and told.sampling_forwards() == 16
    # ten steps of one branch, and the replays of three
    assert PRESETS["unirl_grpo"].sampling_forwards() == 10 + 3
    assert replace(PRESETS["unirl_grpo"], guidance_scale=2.0).sampling_forwards() == 2 * (10 + 3)
    for two_branches in ({"learning_guidance_scale": 2.0}, {"detach_unconditional": True}):
        with pytest.raises(ValueError, match="is told stage.guidance_scale, so leave them out"):
            replace(PRESETS["dance_grpo"], **two_branches).asking(is_told=True)


@pytest.mark.parametrize("name", ["flow_grpo_ocr", "unirl_grpo", "dance_grpo"])
def test_rows_hold_what_was_drawn_and_steps_in_a_row_share_them(name):
    case = collect(PRESETS[name])
    points, drawn = case.points(), case.drawn
    assert len(points) == drawn.step.numel() == SAMPLES * case.config.trained_points
    assert torch.equal(points.states().view_as(drawn.state), drawn.state)
    assert torch.equal(points.targets().view_as(drawn.state), drawn.state)
    following = points.sources.z0.index_select(0, points.extra["following"])
    assert torch.equal(following.view_as(drawn.following), drawn.following)
    assert torch.equal(points.extra["step"].view_as(drawn.step), drawn.step)
    ends = (drawn.step[:, 1:] != drawn.step[:, :-1] + 1).sum() + SAMPLES
    assert len(case.batch) == drawn.step.numel() + ends
    assert bool((drawn.step < case.config.sampling_steps - 1).all())  # never the last step


def test_what_cannot_be_learned_from_counts_for_nothing():
    config = replace(PRESETS["flow_grpo_ocr"], drop_zero_advantages=True)
    case = collect(config)
    equal = case.prompt[case.batch.collected["position"] - FIRST] == 1  # the prompt with equal rewards
    case.batch.collected["advantage"][case.batch.collected["position"] == FIRST] = torch.nan
    case.batch.valid[case.batch.collected["position"] == FIRST + 2] = False
    points = case.stage.points(case.batch)
    gone = (
        equal | (case.batch.collected["position"] == FIRST) | (case.batch.collected["position"] == FIRST + 2)
    )
    assert torch.equal(points.count == 0, gone[points.sample]) and torch.equal(points.weight, points.count)
    kept = replace(config, drop_zero_advantages=False)
    assert bool((collect(kept).stage.points(collect(kept).batch).count == 1).all())


@pytest.mark.parametrize("name", ["flow_grpo_ocr", "grpo_guard_ocr", "unirl_grpo"])
def test_a_sample_that_ended_in_nan_harms_nothing(name):
    case = collect(PRESETS[name])
    advantages = case.stage.advantages(
        alike(case.config, REWARDS.index_fill(0, torch.tensor([0]), torch.nan)), case.prompt
    )
    broken = replace(case.drawn)
    losses = []
    for value in (0.0, torch.nan):
        for tensor in (broken.state, broken.following, broken.log_probability):
            tensor[0] = value
        experience = case.stage.experience(broken, advantages)
        case.batch.latents, case.batch.collected = experience.latents, experience.collected
        losses.append(case.loss(NOW, **({"reference": REFERENCE} if case.stage.keeps else {}))[0])
    assert bool(losses[0].isfinite()) and torch.equal(losses[0], losses[1])


def test_stochastic_steps_are_those_of_the_settings():
    position = torch.arange(FIRST, FIRST + 250 * SAMPLES)  # so many collections
    small = {"images_per_prompt": IMAGES, "prompts_per_collection": PROMPTS, "stochastic_range": [1, 8]}
    collection, prompt = position // SAMPLES, position % SAMPLES % PROMPTS
    whole = FlowGrpoConfig(**small)
    assert bool(stochastic_steps(whole, 1, position).all())
    assert learned_steps(whole, 1, position)[0].tolist() == list(range(9))
    but_last = stochastic_steps(replace(whole, stochastic_steps="all_but_last"), 1, position)
    assert bool(but_last[:, :-1].all()) and not bool(but_last[:, -1].any())
    for kind in ("window", "random"):
        for drawn_per, key, wider in (
            ("collection", collection, 0 * collection),
            ("prompt", collection * PROMPTS + prompt, collection),
            ("sample", position, collection * PROMPTS + prompt),
        ):
            config = replace(whole, stochastic_steps=kind, drawn_per=drawn_per)
            steps = learned_steps(config, 1, position)
            chosen = stochastic_steps(config, 1, position)
            assert torch.equal(chosen.nonzero()[:, 1].view_as(steps), steps)
            assert int(steps.min()) == 1 and int(steps.max()) == 7
            assert bool((steps.diff(dim=1) == 1).all()) == (kind == "window")
            alike = torch.cat([key[:, None], steps], dim=1).unique(dim=0)
            assert len(alike) == len(key.unique())  # one choice for each
            apart = torch.cat([wider[:, None], steps], dim=1).unique(dim=0)
            assert len(apart) > 1.5 * len(wider.unique())  # but not for more
            assert len(steps.unique(dim=0)) == (5 if kind == "window" else 35)  # and all choices come
            assert torch.equal(learned_steps(config, 1, position[7:9]), steps[7:9])
            assert not torch.equal(learned_steps(config, 2, position), steps)


def test_a_sliding_window_moves_with_the_collections_and_begins_again():
    config = FlowGrpoConfig(
        images_per_prompt=1,
        prompts_per_collection=2,
        updates_per_sample=2,
        stochastic_steps="sliding",
        num_stochastic_steps=4,
        stochastic_range=[0, 8],
        window_interval=3,
        window_stride=2,
    )
    first = learned_steps(config, 1, torch.arange(0, 4 * 3 * 4, 4))[:, 0]  # of twelve collections
    assert first.tolist() == [0, 0, 0, 2, 2, 2, 4, 4, 4, 0, 0, 0]


def test_mix_grpo_slides_as_published():
    """Every 25 collections by one step. At the end of its range theirs shrinks before it begins again."""
    config = PRESETS["mix_grpo"]
    collections, whole = torch.arange(0, 20 * 25), config.samples_per_collection
    theirs = mix_grpo_windows(len(collections), config.sampling_steps, 4, every=25, stride=1)
    assert learned_steps(config, 1, collections * whole).tolist() == theirs
    assert theirs[-1] == [19, 20, 21, 22]
    assert learned_steps(config, 1, torch.tensor([500 * whole])).tolist() == [[0, 1, 2, 3]]


def test_learned_steps_are_drawn_per_sample_of_the_stochastic_ones():
    config = replace(PRESETS["dance_grpo"], images_per_prompt=IMAGES, prompts_per_collection=PROMPTS)
    steps = learned_steps(config, 1, torch.arange(200))
    assert steps.shape == (200, 9) and bool((steps.diff(dim=1) > 0).all()) and int(steps.max()) == 14
    counts = torch.bincount(steps.flatten(), minlength=15) / 200
    assert len(steps.unique(dim=0)) > 150 and bool((counts - 0.6).abs().max() < 0.15)
    assert bool(stochastic_steps(config, 1, torch.arange(2))[:, :-1].all())


def test_plan_says_how_samples_are_drawn():
    stage = make_stage(PRESETS["dance_grpo"], 3.0)
    plan = stage.plan(SEED, torch.arange(4))
    assert plan.same_start and plan.variant == "dance" and plan.guidance_scale == 3.5
    assert torch.equal(plan.sigmas, Schedule(3.0).linear_sigmas(16))
    whole = (1000 * plan.sigmas[:-1].float()).int().double()
    assert torch.equal(plan.timesteps, whole) and not torch.equal(whole, 1000 * plan.sigmas[:-1])
    assert torch.equal(
        stage.points(collect(PRESETS["dance_grpo"]).batch).timestep.unique(), whole[:-1].unique()
    )
    flux = make_stage(PRESETS["flow_grpo_ocr"], 3.0, spacing="even").plan(SEED, torch.arange(1))
    assert torch.equal(flux.sigmas, Schedule(3.0, spacing="even").inference_sigmas(10))


def test_steps_reads_the_row_itself_and_nothing_else():
    rows = collect(PRESETS["flow_grpo_ocr"]).points().state_rows
    assert bool((rows[:, SOURCES.index("z0")] == 1).all()) and rows.sum() == len(rows)


def test_guard_measures_from_the_mean_that_a_sample_was_drawn_around():
    case = collect(PRESETS["grpo_guard_ocr"])
    points = case.points()
    noise = normal(SEED, STEP_NOISE, points.extra["position"], points.extra["step"], SHAPE)
    c = points.extra["coefficients"][:, 2].float()[:, None, None, None]
    mean, _ = case.stage._step(points, case.velocity(points, THETA))
    torch.testing.assert_close(case.drawn.following.flatten(0, 1) - c * noise, mean, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"stochastic_steps": "window", "stochastic_range": [0, 10]},
            r"stage.stochastic_range is \[0, 10\].*end <= 9",
        ),
        (
            {"stochastic_steps": "window", "num_stochastic_steps": 6},
            "stage.num_stochastic_steps is 6.* has 5",
        ),
        ({"num_learned_steps": 10}, "stage.num_learned_steps is 10: no more than 9"),
        ({"variant": "cps", "eta": 1.2}, "stage.eta is 1.2.*at most 1"),
        ({"ratio": "guard", "old_log_probabilities": "replayed"}, "stage.old_log_probabilities=sampled"),
        ({"rewards": {}}, "stage.rewards is empty"),
        ({"images_per_prompt": 7}, r"must divide 336"),
        ({"detach_unconditional": True, "learning_guidance_scale": 1.0}, "stage.detach_unconditional=true"),
    ],
)
def test_settings_that_do_not_fit_are_named(changed, words):
    with pytest.raises(ValueError, match=words):
        with_batch(replace(PRESETS["flow_grpo_ocr"], **changed), 576)


def test_dropout_of_adapters_has_no_place_beside_a_ratio():
    config = PRESETS["flow_grpo_ocr"]
    recipe = Recipe(
        stage=config, train=TrainConfig(global_batch_size=576), lora=LoraConfig(rank=4, dropout=0.1)
    )
    with pytest.raises(ValueError, match="set lora.dropout=0"):
        config.check(recipe)
