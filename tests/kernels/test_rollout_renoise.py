"""States against float64, in both layouts, given and drawn noise, eager and interpreted."""

import pytest
import torch
from guards import assert_close, canaries, guarded, worst

from soar_mega.flow import normal
from soar_mega.kernels import rollout_renoise

SEED = 11
# one ragged block with an odd width; two blocks, not a multiple of 16; aligned, batch 1
SHAPES = [((3, 5, 7), 2, 3), ((5, 10, 22), 1, 1), ((4, 16, 16), 1, 6)]


def case(shape, batch, per_sample, dtype=torch.float32):
    """Six sources [B, *shape] and rows [B, N, 6]; all coefficients are of order one."""
    generator = torch.Generator().manual_seed(10 * batch + per_sample)
    sources = [guarded(torch.randn(batch, *shape, generator=generator).to(dtype)) for _ in range(6)]
    return sources, torch.randn(batch, per_sample, 6, generator=generator, dtype=torch.float64)


def oracle(sources, rows):
    return torch.einsum("bnj,jb...->bn...", rows, torch.stack(sources).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "batch", "per_sample"), SHAPES)
def test_states_match_float64(backend, shape, batch, per_sample, dtype):
    sources, rows = case(shape, batch, per_sample, dtype)
    with canaries():
        states = rollout_renoise(*sources[:4], rows, eps=sources[4], z1_aux=sources[5], dtype=dtype)
    assert states.dtype == dtype
    assert_close(states, oracle(sources, rows))


@pytest.mark.parametrize(("shape", "patch"), [((3, 6, 10), 2), ((4, 8, 8), 2), ((2, 4, 12), 4)])
def test_patches_are_what_a_patch_embedding_reads(backend, shape, patch):
    sources, rows = case(shape, 2, 3)
    with canaries():
        patches = rollout_renoise(*sources[:4], rows, eps=sources[4], z1_aux=sources[5], patch_size=patch)
    weight = torch.randn(8, shape[0], patch, patch, dtype=torch.float64)
    embedded = torch.nn.functional.conv2d(oracle(sources, rows).flatten(0, 1), weight, stride=patch)
    expected = embedded.flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    assert worst(patches.double() @ weight.flatten(1).T, expected) < 1e-6


@pytest.mark.parametrize("patch", [None, 2])
def test_drawn_noise_is_the_noise_of_flow(backend, patch):
    """Points of two samples and paths in the order of a micro-batch, one sample coming twice."""
    shape, batch = (3, 6, 10), 3
    sources, _ = case(shape, batch, 1)
    position = torch.tensor([7, 2**32 + 5, 2**40 - 1])
    sample, path = torch.tensor([1, 1, 1, 2, 0, 1]), torch.tensor([0, 0, 3, 1, 0, 0])
    rows = torch.randn(6, 6, dtype=torch.float64)
    given = [x[sample] for x in sources]
    for column, stream in ((1, "noise"), (4, "rollout"), (5, "endpoint")):
        given[column] = normal(SEED, stream, position[sample], 0 if column == 1 else path, shape)
    expected = torch.einsum("pj,jp...->p...", rows, torch.stack(given).double())
    if patch:
        expected = torch.nn.functional.unfold(expected, patch, stride=patch).transpose(1, 2)
    with canaries():
        states = rollout_renoise(
            sources[0], None, sources[2], sources[3], rows,
            sample=sample, path=path, draw=("z1", "eps", "z1_aux"), seed=SEED, position=position, patch_size=patch,
        )  # fmt: skip
    assert worst(states, expected) < 1e-6


def test_a_source_with_no_coefficient_is_not_read(backend):
    sources, rows = case((3, 5, 7), 2, 3)
    rows[..., 2:] = 0
    nothing = torch.full_like(sources[0], torch.nan)
    states = rollout_renoise(sources[0], sources[1], nothing, nothing, rows)
    assert worst(states, oracle(sources, rows)) < 5e-7


@pytest.mark.parametrize("patch", [None, 2])
@pytest.mark.parametrize("learned", [(0, 1, 2, 3, 4, 5), (1, 3)])
def test_gradients_of_the_sources_match_float64(backend, patch, learned):
    sources, rows = case((3, 6, 10), 2, 3)
    sources = [x.requires_grad_(column in learned) for column, x in enumerate(sources)]
    exact = [x.detach().double().requires_grad_() for x in sources]
    upstream = torch.randn(2, 3, 3, 6, 10)
    states = rollout_renoise(*sources[:4], rows, eps=sources[4], z1_aux=sources[5], patch_size=patch)
    if patch:
        tokens = torch.nn.functional.unfold(upstream.flatten(0, 1), patch, stride=patch).transpose(1, 2)
        (states * tokens.unflatten(0, (2, 3))).sum().backward()
    else:
        (states * upstream).sum().backward()
    (oracle(exact, rows) * upstream).sum().backward()
    for column, (mine, reference) in enumerate(zip(sources, exact)):
        if column in learned:
            assert worst(mine.grad, reference.grad) < 5e-7
        else:
            assert mine.grad is None
