"""rollout_renoise, correction_loss and the noise on CUDA: float64, rounding, and the eager twins' bits."""

import pytest
import torch
from guards import assert_close, canaries, guarded, worst

from soar_mega.flow.noise import normal, philox, stream_key
from soar_mega.kernels import STREAMS, correction_loss, rollout_renoise
from soar_mega.kernels.point_tables import signed_key

SHAPES = [((3, 5, 7), 2, 3), ((5, 10, 22), 1, 1), ((4, 16, 16), 1, 6), ((16, 64, 64), 4, 6)]
DRAWN = {"draw": tuple(STREAMS), "seed": 11}


def case(shape, batch, per_sample):
    generator = torch.Generator().manual_seed(10 * batch + per_sample)
    sources = [guarded(torch.randn(batch, *shape, generator=generator).cuda()) for _ in range(6)]
    return sources, torch.randn(batch, per_sample, 6, generator=generator, dtype=torch.float64)


def exact(sources, rows):
    return torch.einsum("bnj,jb...->bn...", rows.cuda(), torch.stack(sources).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "batch", "per_sample"), SHAPES)
def test_states_match_float64(shape, batch, per_sample, dtype):
    sources, rows = case(shape, batch, per_sample)
    with canaries():
        states = rollout_renoise(*sources[:4], rows, eps=sources[4], z1_aux=sources[5], dtype=dtype)
    assert_close(states, exact(sources, rows))


@pytest.mark.parametrize("patch", [None, 2])
def test_drawn_noise_and_patches_are_those_of_the_eager_twin(patch):
    sources, rows = case((16, 64, 64), 4, 6)
    position = torch.tensor([3, 2**32 + 1, 2**40 - 1, 0])
    sample = torch.arange(4).repeat_interleave(6)
    path = torch.arange(3).repeat_interleave(2).repeat(4)
    keys = DRAWN | {"sample": sample, "path": path, "position": position, "patch_size": patch}
    z0, _, v_uncond, v_cond = sources[:4]
    found = rollout_renoise(z0, None, v_uncond, v_cond, rows.flatten(0, 1), **keys)
    twin = rollout_renoise(z0.cpu(), None, v_uncond.cpu(), v_cond.cpu(), rows.flatten(0, 1), **keys)
    assert worst(found.cpu(), twin) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "batch", "per_sample"), SHAPES)
def test_losses_and_gradients_match_float64(shape, batch, per_sample, dtype):
    sources, rows = case(shape, batch, per_sample)
    velocity = guarded(torch.randn(batch, per_sample, *shape).cuda().to(dtype)).requires_grad_()
    with canaries():
        losses = correction_loss(velocity, *sources[:4], rows, eps=sources[4], z1_aux=sources[5])
    losses.sum().backward()
    error = velocity.detach().double() - exact(sources, rows)
    assert worst(losses, error.square().flatten(2).mean(dim=2)) < 5e-7
    assert_close(velocity.grad, 2 * error / error[0, 0].numel())
    again = correction_loss(velocity, *sources[:4], rows, eps=sources[4], z1_aux=sources[5])
    assert torch.equal(losses, again)


def test_words_and_normals_are_those_of_flow():
    import probes

    position = 2**40 + 12345
    numbers = torch.tensor([signed_key(5, "rollout"), 3, position]).cuda()
    words = torch.empty(4, 64, dtype=torch.int64, device="cuda")
    probes.words_kernel[(1,)](numbers, words, 64)
    counter = torch.tensor([[quad, 3, position & 0xFFFFFFFF, position >> 32] for quad in range(64)])
    assert torch.equal(words.T.cpu(), philox(counter, stream_key(5, "rollout")))
    block, single = torch.empty(2, 256, device="cuda").unbind()
    probes.normals_kernel[(1,)](numbers, block, single, 256, 256)
    expected = normal(5, "rollout", torch.tensor([position]), 3, (512,))[0, 256:]
    assert worst(block.cpu(), expected) < 1e-6 and worst(single.cpu(), expected) < 1e-6


def test_rows_beyond_two_to_the_31_elements():
    """The last sample of 2^31 elements and more, where the device has the memory."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    z0 = torch.empty(2**31 // 2**16 + 2, 16, 64, 64, dtype=torch.bfloat16, device="cuda")
    z0[-1] = 3.0
    rows = torch.tensor([[2.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    states = rollout_renoise(z0, None, None, None, rows, sample=torch.tensor([len(z0) - 1]))
    assert bool((states == 6.0).all())
