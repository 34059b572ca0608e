"""Counted launches and bytes of the SOAR part of a step."""

import torch
from kernel_traffic import GPU, Counter, both_forms

from soar_mega.stages import SoarConfig

LATENTS, SAMPLES, POINTS = (16, 64, 64), 4, 6  # SD3.5-M at 512 px
ELEMENTS = 16 * 64 * 64


def test_fusion_saves_launches_and_bytes():
    stage = SoarConfig(num_auxiliary_points=POINTS, shift=3.0)
    forms = both_forms(stage, LATENTS, SAMPLES, torch.bfloat16, SAMPLES * (1 + POINTS))
    assert forms["eager"].launches >= 8 * forms["fused"].launches
    assert forms["eager"].bytes >= 10 * forms["fused"].bytes
    points = SAMPLES * (1 + POINTS)
    queries = 4 * SAMPLES + 2 * 2 * SAMPLES  # z0; bf16 states of both branches
    states = 3 * 4 * SAMPLES + 2 * points  # z0 and both velocities; z1 is drawn
    losses = 3 * 4 * SAMPLES + 2 * 4 * points  # the same; velocity and gradient
    upstream = 2 * 4 * points  # autograd multiplies the gradient
    expected = ELEMENTS * (queries + states + losses + upstream)
    assert abs(forms["fused"].bytes / expected - 1) < 1e-3  # the rest are tables and partial sums


def test_what_counts_as_a_launch():
    a = torch.empty(8, 16, device=GPU)
    with Counter() as counter:
        b = a.view(16, 8).t()[2:]  # views
        torch.empty(3, device=GPU)
        torch.ones(4) * 2  # on the host
    assert (counter.traffic.launches, counter.traffic.bytes) == (0, 0)
    with Counter() as counter:
        (a + 1).mul_(2)  # 512 + 512, twice
        a[torch.tensor([1, 2])]  # the index goes there: 16; two rows: 128 + 128
        torch.ones(4).to(GPU)  # 16
    assert counter.traffic.bytes == 2 * 1024 + 256 + 16
    assert counter.traffic.launches == 4
    assert b.shape == (6, 16)
