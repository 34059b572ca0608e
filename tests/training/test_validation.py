"""The held-out loss against its definition."""

import torch
from torch import Tensor

from soar_mega.data.batch import Batch
from soar_mega.flow import Schedule, normal
from soar_mega.models.common.conditions import Conditions
from soar_mega.training.validation import quartile_losses


def make_batch(positions: list[int]) -> Batch:
    position = torch.tensor(positions)
    return Batch(
        seed=0,
        position=position,
        valid=torch.ones(len(positions), dtype=torch.bool),
        latent_shape=(2, 4, 4),
        text_length=3,
        latents=normal(5, "test", position, 0, (2, 4, 4)),
        text=torch.zeros(len(positions), 3, 8),
        pooled=torch.zeros(len(positions), 8),
    )


def test_losses_are_of_states_on_the_ray_at_one_sigma_in_each_quarter() -> None:
    batch = make_batch([3, 8, 1])
    seen: list[tuple[Tensor, Tensor]] = []

    def nothing(latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        assert conditions.text is batch.text and conditions.pooled is batch.pooled
        seen.append((latents, sigma))
        return torch.zeros_like(latents)

    losses = quartile_losses(nothing, batch, Schedule(3.0))
    assert losses.shape == (3, 4) and batch.latents is not None
    for quarter, (state, sigma) in enumerate(seen):
        assert ((sigma >= quarter / 4) & (sigma <= (quarter + 1) / 4)).all() and len(set(sigma.tolist())) == 3
        s = sigma[:, None, None, None]
        z0 = batch.latents.double()
        z1 = (state.double() - (1 - s) * z0) / s  # the endpoint that the state betrays
        expected = (z1 - z0).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(losses[:, quarter], expected, rtol=1e-3, atol=0)
        assert 0.5 < z1.std().item() < 1.5


def test_losses_depend_on_a_sample_and_not_on_its_batch() -> None:
    def velocity(latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return latents * sigma.float()[:, None, None, None]

    whole = quartile_losses(velocity, make_batch([3, 8, 1]), Schedule(1.0))
    alone = quartile_losses(velocity, make_batch([8]), Schedule(1.0))
    assert torch.equal(whole[1:2], alone)
