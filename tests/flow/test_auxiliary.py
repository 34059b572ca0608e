import pytest
import torch

from soar_mega.flow import Schedule, auxiliary_latents, normal


def problem(batch: int = 3, points: int = 4) -> dict[str, torch.Tensor]:
    """Arguments of auxiliary_latents for random latents and legal sigmas."""
    position = torch.arange(batch)
    made = {
        name: normal(0, name, position, 0, (2, 4, 4)) for name in ("z0", "z1", "v_uncond", "v_cond", "eps")
    }
    sigma1 = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)
    fraction = torch.linspace(0, 1, points, dtype=torch.float64)
    sigmas = {
        "sigma0": sigma1 + 0.05,
        "sigma1": sigma1,
        "sigma_aux": sigma1[:, None] + (1 - sigma1[:, None]) * fraction,
    }
    return {**made, **sigmas, "cfg_scale": 3.0}


def published_points(x, u0, u_aux, shift: float, sampling_steps: int, guidance: float):
    """The published ODE path in float64, table look-up to re-noise: states [B, N, C, H, W], sigmas [B, N]."""
    table = torch.tensor(
        [shift * t / (1 + (shift - 1) * t) for t in (i / 1000 for i in range(1000, 0, -1))]
    ).double()

    def look_up(t):
        return table[((1 - t) * 1000).long().clamp(0, 999)]

    def four(s):
        return s[:, None, None, None]

    sigma0 = look_up(u0)
    sigma1 = look_up((u0 - 1 / sampling_steps).clamp(min=0))
    z0, z1, v_uncond, v_cond = (x[name].double() for name in ("z0", "z1", "v_uncond", "v_cond"))
    start = (1 - four(sigma0)) * z0 + four(sigma0) * z1
    end = start + (v_uncond + guidance * (v_cond - v_uncond)) * four(sigma1 - sigma0)
    states, sigmas = [], []
    for n in range(u_aux.shape[1]):
        sigma = sigma1 + u_aux[:, n] * (1 - sigma1)
        alpha = four((sigma - sigma1) / (1 - sigma1).clamp(min=1e-8))
        states.append((1 - alpha) * end + alpha * z1)
        sigmas.append(sigma)
    return torch.stack(states, 1), torch.stack(sigmas, 1)


def test_grid_and_ode_reproduce_the_published_points():
    x = problem(batch=64)
    generator = torch.Generator().manual_seed(0)
    u0 = torch.sigmoid(torch.randn(64, dtype=torch.float64, generator=generator))
    u0[:3] = torch.tensor([0.9999, 0.001234, 0.02])
    u_aux = torch.rand(64, 6, dtype=torch.float64, generator=generator)
    expected, sigmas = published_points(x, u0, u_aux, 3.0, 40, 4.5)

    schedule = Schedule(3.0, grid=True)
    sigma0, sigma1 = schedule.sigma(u0), schedule.rollout_end(u0, 1 / 40)
    sigma_aux = sigma1[:, None] + (1 - sigma1[:, None]) * u_aux
    ours = auxiliary_latents(x["z0"], x["z1"], sigma0, sigma1, x["v_uncond"], x["v_cond"], 4.5, sigma_aux)
    assert ours.dtype == torch.float32 and ours.shape == (64, 6, 2, 4, 4)
    torch.testing.assert_close(sigma_aux, sigmas, rtol=0, atol=1e-6)
    assert float((ours.double() - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("variant", ["simple", "sde", "flow_sde", "cps"])
def test_first_point_is_the_rollout_and_last_is_the_endpoint(variant):
    x = problem()
    fresh = normal(0, "fresh", torch.arange(3), 0, (2, 4, 4))
    latents = auxiliary_latents(**x, variant=variant, eta=0.5, z1_aux=fresh)
    assert torch.equal(latents[:, -1], fresh)
    no_noise = auxiliary_latents(**{**x, "eps": torch.zeros_like(fresh)}, variant=variant, eta=0.5)
    assert not torch.allclose(latents[:, 0], no_noise[:, 0])
    assert torch.equal(no_noise[:, -1], x["z1"])


def test_noise_per_point_equals_noise_per_sample_when_shared():
    x = problem()
    shared = auxiliary_latents(**x, variant="cps", eta=0.5, z1_aux=x["eps"])
    many = x["eps"][:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(shared, auxiliary_latents(**{**x, "eps": many}, variant="cps", eta=0.5, z1_aux=many))


def test_scale_one_needs_no_unconditional_velocity_and_no_points_is_no_error():
    x = {**problem(), "cfg_scale": 1.0}
    torch.testing.assert_close(auxiliary_latents(**{**x, "v_uncond": None}), auxiliary_latents(**x))
    x["sigma_aux"] = x["sigma_aux"][:, :0]
    assert auxiliary_latents(**x).shape == (3, 0, 2, 4, 4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"z0": torch.zeros(3, 2, 4)}, "z0"),
        ({"z1": torch.zeros(3, 2, 4, 5)}, "z1"),
        ({"v_cond": torch.zeros(2, 2, 4, 4)}, "v_cond"),
        ({"v_uncond": torch.zeros(2, 2, 4, 4)}, "v_uncond"),
        ({"v_uncond": None}, "v_uncond"),
        ({"sigma0": torch.zeros(3, 1)}, "sigma0"),
        ({"sigma1": torch.zeros(2)}, "sigma1"),
        ({"sigma_aux": torch.ones(3)}, "sigma_aux"),
        ({"sigma_aux": torch.ones(2, 4)}, "sigma_aux"),
        ({"sigma_aux": torch.full((3, 4), 0.05)}, "sigma_aux"),
        ({"sigma_aux": torch.full((3, 4), 1.01)}, "sigma_aux"),
        ({"eps": None, "variant": "sde"}, "eps"),
        (
            {"eps": None, "variant": "sde", "sigma0": torch.tensor([0.1, 0.6, 0.95], dtype=torch.float64)},
            "eps",
        ),
        ({"eps": torch.zeros(3, 2, 4, 4, 4)}, "eps"),
        ({"z1_aux": torch.zeros(3, 1)}, "z1_aux"),
        ({"variant": "euler"}, "euler"),
    ],
)
def test_bad_arguments_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        auxiliary_latents(**{**problem(), **change})
