import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from soar_mega.flow import WEIGHTINGS, loss_weight


@pytest.mark.parametrize("scheme", WEIGHTINGS)
def test_weights_are_those_of_diffusers(scheme):
    sigma = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    weight = loss_weight(scheme, sigma)
    assert weight.dtype == torch.float64
    torch.testing.assert_close(
        weight, compute_loss_weighting_for_sd3(scheme, sigma).double(), rtol=1e-6, atol=0
    )


def test_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="none, sigma_sqrt, cosmap"):
        loss_weight("snr", torch.ones(1))
