"""Losses and gradients against float64, of given and drawn noise, eager and interpreted."""

import pytest
import torch
from guards import assert_close, canaries, guarded, worst

from soar_mega.flow import normal
from soar_mega.kernels import correction_loss

SHAPES = [((3, 5, 7), 2, 3), ((5, 10, 22), 1, 1), ((4, 16, 16), 1, 6)]


def case(shape, batch, per_sample, dtype=torch.float32):
    generator = torch.Generator().manual_seed(10 * batch + per_sample)
    sources = [guarded(torch.randn(batch, *shape, generator=generator)) for _ in range(6)]
    rows = torch.randn(batch, per_sample, 6, generator=generator, dtype=torch.float64)
    velocity = torch.randn(batch, per_sample, *shape, generator=generator).to(dtype)
    return guarded(velocity.requires_grad_()), sources, rows


def error_of(velocity, sources, rows):
    target = torch.einsum("bnj,jb...->bn...", rows, torch.stack(sources).double())
    return velocity.detach().double() - target


def oracle(velocity, sources, rows):
    """Losses [B, N] float64."""
    return error_of(velocity, sources, rows).square().flatten(2).mean(dim=2)


def oracle_gradient(velocity, sources, rows, weight):
    """Of the sum of weight [B, N] times the losses."""
    error = error_of(velocity, sources, rows)
    return error * (2 / error[0, 0].numel() * weight)[..., None, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "batch", "per_sample"), SHAPES)
def test_losses_and_gradients_match_float64(backend, shape, batch, per_sample, dtype):
    velocity, sources, rows = case(shape, batch, per_sample, dtype)
    weight = torch.linspace(0.5, 2.0, batch * per_sample, dtype=torch.float64).view(batch, per_sample)
    upstream = 2.0 ** torch.arange(batch * per_sample).view(batch, per_sample)  # exact in bfloat16
    with canaries():
        losses = correction_loss(
            velocity, *sources[:4], rows, eps=sources[4], z1_aux=sources[5], weight=weight
        )
    (losses * upstream).sum().backward()
    expected = oracle(velocity, sources, rows)
    gradient = oracle_gradient(velocity, sources, rows, weight * upstream)
    assert losses.dtype == torch.float32 and velocity.grad.dtype == dtype
    assert worst(losses, expected * weight) < 5e-7
    assert_close(velocity.grad, gradient)


def test_drawn_noise_is_the_noise_of_flow(backend):
    """Points of two samples and paths in the order of a micro-batch, one sample coming twice."""
    shape = (3, 6, 10)
    _, sources, _ = case(shape, 3, 1)
    position = torch.tensor([7, 2**32 + 5, 2**40 - 1])
    sample, path = torch.tensor([1, 1, 1, 2, 0, 1]), torch.tensor([0, 0, 3, 1, 0, 0])
    rows = torch.randn(6, 6, dtype=torch.float64)
    velocity = guarded(torch.randn(6, *shape))
    given = [x[sample] for x in sources]
    for column, stream in ((1, "noise"), (4, "rollout"), (5, "endpoint")):
        given[column] = normal(11, stream, position[sample], 0 if column == 1 else path, shape)
    target = torch.einsum("pj,jp...->p...", rows, torch.stack(given).double())
    with canaries():
        losses = correction_loss(
            velocity, sources[0], None, sources[2], sources[3], rows,
            sample=sample, path=path, draw=("z1", "eps", "z1_aux"), seed=11, position=position,
        )  # fmt: skip
    assert worst(losses, (velocity.double() - target).square().flatten(1).mean(dim=1)) < 1e-6


def test_a_small_sigma_keeps_its_target(backend):
    """Rows divided by sigma in float64: large terms that nearly cancel leave the errors of float32 terms only."""
    velocity, sources, rows = case((4, 8, 8), 1, 1)
    sigma = 1e-3
    rows[...] = torch.tensor([(1 - sigma - 1) / sigma, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    expected = oracle(velocity, sources, rows)
    assert worst(correction_loss(velocity, *sources[:2], None, None, rows), expected) < 5e-7


def test_without_a_gradient_none_is_written(backend):
    velocity, sources, rows = case((3, 5, 7), 2, 3)
    written = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(written.append, lambda x: x):
        losses = correction_loss(velocity, *sources[:4], rows, eps=sources[4], z1_aux=sources[5])
    assert not losses.requires_grad and not written
    expected = oracle(velocity, sources, rows)
    assert worst(losses, expected) < 5e-7


def test_equal_inputs_give_equal_bits(interpreted):
    velocity, sources, rows = case((5, 10, 22), 1, 1)
    rows[..., 2:] = 0
    first, second = (
        correction_loss(velocity, *sources[:2], None, None, rows * 0 + 1 * (torch.arange(6) < 2))
        for _ in "ab"
    )
    assert torch.equal(first, second)
