"""The reimplemented published procedure against our stage, given the same draws."""

from dataclasses import replace

import pytest
import torch
from baseline.published import Draws, MicroBatch, Procedure, draw, sigma_table, soar_backward
from diffusers import SD3Transformer2DModel
from point_sources import gather_sources

from soar_mega.data.batch import Batch
from soar_mega.flow import Schedule, combine, normal
from soar_mega.stages import SoarConfig, make_stage

SHIFT, COUNT, POINTS = 3.0, 3, 4
PROCEDURE = Procedure(shift=SHIFT, num_auxiliary_points=POINTS, sampling_steps=5)
REPAIRS = [
    {},
    {"rollout_graph": False},
    {"hold_graphs": False},
    {"separate_points": False},
    {"rollout_graph": False, "hold_graphs": False, "separate_points": False},
]


@pytest.fixture(scope="module")
def model() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    # diffusers starts with outputs near zero; make every part of the velocity count.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(
        seed=7,
        position=torch.arange(COUNT),
        valid=torch.ones(COUNT, dtype=torch.bool),
        latent_shape=(4, 8, 8),
        text_length=5,
        latents=torch.randn(COUNT, 4, 8, 8, generator=g),
        text=torch.randn(COUNT, 5, 16, generator=g),
        pooled=torch.randn(COUNT, 12, generator=g),
        empty_text=torch.randn(5, 16, generator=g),
        empty_pooled=torch.randn(12, generator=g),
    )


def ours(model: SD3Transformer2DModel, batch: Batch, timesteps: str) -> tuple[torch.Tensor, Draws]:
    """Loss of our stage, with the draws that it made."""
    config = SoarConfig(num_auxiliary_points=POINTS, sampling_steps=5, timesteps=timesteps)
    stage = make_stage(config, SHIFT)
    queries, points = stage.queries(batch), stage.points(batch)
    assert queries is not None

    def velocity(
        states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return model(states, text, pooled, timestep.float(), return_dict=False)[0]

    z1 = normal(batch.seed, "noise", batch.position, 0, batch.latent_shape)
    z_t = combine(queries.rows, (batch.latents, z1, None, None, None, None))
    with torch.no_grad():
        v_cond = velocity(z_t, queries.timestep, batch.text, batch.pooled)
        empty = batch.empty_text.expand_as(batch.text), batch.empty_pooled.expand_as(batch.pooled)
        v_uncond = velocity(z_t, queries.timestep, *empty)
    points = replace(points, sources=gather_sources(batch, points, v_uncond, v_cond))
    text, pooled = batch.text[points.sample], batch.pooled[points.sample]
    error = stage.loss(points, velocity(points.states(), points.timestep, text, pooled))
    loss = (points.weight * error).sum() / points.count.sum()
    auxiliary = points.take(torch.nonzero(points.of_kind("aux"))[:, 0])
    span = stage._rollout_span(batch)
    draws = Draws(
        noise=z1,
        sigma0=span.sigma0.float(),
        timestep0=queries.timestep.float(),
        sigma1=span.sigma1.float(),
        sigma_auxiliary=auxiliary.sigma.view(COUNT, POINTS).float(),
        timestep_auxiliary=auxiliary.timestep.view(COUNT, POINTS).float(),
    )
    return loss, draws


@pytest.mark.parametrize("timesteps", ["grid", "continuous"])
@pytest.mark.parametrize("repairs", REPAIRS, ids=lambda r: "+".join(r) or "published")
def test_loss_and_gradient_are_those_of_our_stage(
    model: SD3Transformer2DModel, repairs: dict[str, bool], timesteps: str
) -> None:
    batch = make_batch()
    model.zero_grad()
    loss, draws = ours(model, batch, timesteps)
    (0.5 * loss).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    micro = MicroBatch(
        latents=batch.latents,
        text=batch.text,
        pooled=batch.pooled,
        empty_text=batch.empty_text,
        empty_pooled=batch.empty_pooled,
    )
    value = soar_backward(model, micro, draws, replace(PROCEDURE, **repairs), scale=0.5)
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    largest = max(g.abs().max() for g in expected.values())
    for name, p in model.named_parameters():
        if name not in expected:
            assert p.grad is None
            continue
        bound = 1e-5 * max(expected[name].abs().max(), 1e-3 * largest)
        assert (p.grad - expected[name]).abs().max() <= 3 * bound, name


def test_draws_lie_on_the_published_table() -> None:
    latents = torch.zeros(500, 4, 2, 2)
    draws = draw(PROCEDURE, latents, torch.Generator().manual_seed(0))
    table = sigma_table(SHIFT)
    schedule = Schedule(SHIFT, grid=True)
    assert torch.allclose(
        table.double(), schedule.sigma(1 - torch.arange(1000.0, dtype=torch.float64) / 1000), atol=1e-7
    )
    assert torch.isin(draws.sigma0, table).all() and torch.isin(draws.sigma1, table).all()
    assert (draws.sigma1 <= draws.sigma0).all()
    assert (draws.sigma_auxiliary >= draws.sigma1[:, None]).all() and (draws.sigma_auxiliary <= 1).all()
    expected = schedule.timestep(draws.sigma_auxiliary)
    # float32 and float64 tables may disagree about a sigma that is an entry to the last bit.
    assert ((draws.timestep_auxiliary - expected).abs() < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize("habit", ["rollout_graph", "hold_graphs", "separate_points"])
def test_every_habit_changes_how_the_model_is_called(model: SD3Transformer2DModel, habit: str) -> None:
    """Forwards seen by the model as (batch size, with a graph), and whether a backward ran between them."""
    batch = make_batch()
    _, draws = ours(model, batch, "grid")
    micro = MicroBatch(
        latents=batch.latents,
        text=batch.text,
        pooled=batch.pooled,
        empty_text=batch.empty_text,
        empty_pooled=batch.empty_pooled,
    )

    def trace(procedure: Procedure) -> list[str]:
        events: list[str] = []
        forward = model.register_forward_hook(
            lambda *a: events.append(f"forward {len(a[2][0])}{' graph' if a[2][0].requires_grad else ''}")
        )
        weight = model.proj_out.weight.register_hook(lambda g: events.append("backward"))
        soar_backward(model, micro, draws, procedure)
        forward.remove()
        weight.remove()
        return events

    published = trace(PROCEDURE)
    one = f"forward {COUNT} graph"
    assert published == [one, f"forward {2 * COUNT} graph", *[one] * POINTS, "backward"]
    repaired = trace(replace(PROCEDURE, **{habit: False}))
    if habit == "rollout_graph":
        assert repaired[1] == f"forward {2 * COUNT}"
    elif habit == "hold_graphs":
        assert repaired.count("backward") == 1 + POINTS
    else:
        assert repaired[2:] == [f"forward {COUNT * POINTS} graph", "backward"]
