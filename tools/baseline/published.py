"""The published SOAR training procedure on diffusers' SD3 transformer, written from its description.

Per micro-batch: a base forward on the ray, two guided forwards for one step of the rollout, one forward for
each of the N auxiliary points, and one backward over everything. Where the published procedure spends time
or memory that the mathematics does not ask for, a field of `Procedure` says so, and its other value repairs
it.

Not taken over from the published code: targets formed in bf16 (wrong, and no cheaper) and the silent
replacement of broken images.
"""

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """The numbers of the method, and the three habits of the published procedure that cost something."""

    shift: float
    num_auxiliary_points: int = 6
    auxiliary_weight: float = 1.0
    guidance_scale: float = 4.5
    sampling_steps: int = 40
    rollout_graph: bool = True  # the rollout builds an autograd graph, which is then thrown away
    hold_graphs: bool = True  # all N + 1 graphs live until one backward at the end
    separate_points: bool = True  # one forward per auxiliary point instead of one for all of them


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one micro-batch. Text is the prompt embeddings of both encoder families, as diffusers
    concatenates them.
    """

    latents: Tensor  # [B, C, H, W]
    text: Tensor  # [B, S, D]
    pooled: Tensor  # [B, P]
    empty_text: Tensor  # [S, D] the empty prompt
    empty_pooled: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one micro-batch. Timesteps are what the model is told, sigmas are where the
    states lie.
    """

    noise: Tensor  # [B, C, H, W]
    sigma0: Tensor  # [B]
    timestep0: Tensor  # [B]
    sigma1: Tensor  # [B], end of the rollout
    sigma_auxiliary: Tensor  # [B, N]
    timestep_auxiliary: Tensor  # [B, N]


def draw(procedure: Procedure, latents: Tensor, generator: torch.Generator) -> Draws:
    """Time from a logit-normal(0, 1) on the published table of 1000 sigmas, auxiliary sigmas uniform in
    [sigma1, 1].
    """
    count, device = len(latents), latents.device
    table = sigma_table(procedure.shift).to(device)
    u0 = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    entry0 = table_entry(u0)
    sigma0 = table[entry0]
    sigma1 = table[table_entry((u0 - 1 / procedure.sampling_steps).clamp(min=0.0))]
    fraction = torch.rand(count, procedure.num_auxiliary_points, generator=generator, device=device)
    sigma_auxiliary = sigma1[:, None] + (1 - sigma1[:, None]) * fraction
    # The model is told the next lower entry of the table, while the state lies at the continuous sigma.
    entry = torch.searchsorted(-table, -sigma_auxiliary).clamp(max=len(table) - 1)
    return Draws(
        noise=torch.randn(latents.shape, generator=generator, device=device),
        sigma0=sigma0,
        timestep0=1000 * sigma0,
        sigma1=sigma1,
        sigma_auxiliary=sigma_auxiliary,
        timestep_auxiliary=1000 * table[entry],
    )


def sigma_table(shift: float) -> Tensor:
    """[1000] float32, from 1 downwards."""
    u = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    return (shift * u / (1 + (shift - 1) * u)).float()


def table_entry(u: Tensor) -> Tensor:
    return (1000 * (1 - u)).long().clamp(0, 999)


def soar_backward(
    model: SD3Transformer2DModel, batch: MicroBatch, draws: Draws, procedure: Procedure, scale: float = 1.0
) -> Tensor:
    """Forward and backward of one micro-batch: adds the gradient of scale x loss to the model, returns the
    loss.

    loss = (sum of base errors + lambda x sum of auxiliary errors) / (B + lambda N B), errors being means
    over a latent.
    """
    latents, noise = batch.latents, draws.noise
    count = len(latents) * (1 + procedure.auxiliary_weight * procedure.num_auxiliary_points)
    held: list[Tensor] = []
    total = torch.zeros((), device=latents.device)

    def add(error: Tensor) -> None:
        nonlocal total
        loss = error.sum() / count
        total += loss.detach()
        if procedure.hold_graphs:
            held.append(loss * scale)
        else:
            (loss * scale).backward()

    z_t = torch.lerp(latents, noise, _column(draws.sigma0))
    velocity = predict(model, z_t, draws.timestep0, batch.text, batch.pooled)
    add(squared_error(velocity, noise - latents))
    del velocity

    if procedure.num_auxiliary_points:
        rolled = roll_out(model, batch, draws, procedure, z_t)
        for states, timesteps, targets in auxiliary_points(rolled, batch, draws, procedure):
            repeat = len(states) // len(latents)
            text, pooled = batch.text.repeat(repeat, 1, 1), batch.pooled.repeat(repeat, 1)
            velocity = predict(model, states, timesteps, text, pooled)
            add(procedure.auxiliary_weight * squared_error(velocity, targets))
            del velocity
    if held:
        torch.stack(held).sum().backward()
    return total


def roll_out(
    model: SD3Transformer2DModel, batch: MicroBatch, draws: Draws, procedure: Procedure, z_t: Tensor
) -> Tensor:
    """One guided Euler step from sigma0 to sigma1: [B, C, H, W], without a gradient."""
    with torch.set_grad_enabled(procedure.rollout_graph):
        text = torch.cat([batch.text, batch.empty_text.expand_as(batch.text)])
        pooled = torch.cat([batch.pooled, batch.empty_pooled.expand_as(batch.pooled)])
        both = predict(model, z_t.repeat(2, 1, 1, 1), draws.timestep0.repeat(2), text, pooled)
        v_cond, v_uncond = both.chunk(2)
        velocity = v_uncond + procedure.guidance_scale * (v_cond - v_uncond)
        rolled = z_t + _column(draws.sigma1 - draws.sigma0) * velocity
    return rolled.detach()


def auxiliary_points(
    rolled: Tensor, batch: MicroBatch, draws: Draws, procedure: Procedure
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(states, timesteps, targets) of each forward: noised again towards the same noise, with the target (z'
    - z0) / s'.
    """
    points = []
    for sigma, timestep in zip(
        draws.sigma_auxiliary.unbind(1), draws.timestep_auxiliary.unbind(1), strict=True
    ):
        amount = _column((sigma - draws.sigma1) / (1 - draws.sigma1).clamp(min=1e-12))
        states = torch.lerp(rolled, draws.noise, amount)
        points.append((states, timestep, (states - batch.latents) / _column(sigma)))
    if procedure.separate_points:
        return points
    states, timesteps, targets = (torch.cat(parts) for parts in zip(*points, strict=True))
    return [(states, timesteps, targets)]


def predict(
    model: SD3Transformer2DModel, states: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor
) -> Tensor:
    """Velocity [M, C, H, W] float32."""
    out = model(
        hidden_states=states,
        timestep=timesteps,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        return_dict=False,
    )
    return out[0].float()


def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """[M] float32."""
    return (velocity - target).square().flatten(1).mean(dim=1)


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1).float()
