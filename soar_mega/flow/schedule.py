"""The noise schedule: unshifted time u in [0, 1] -> sigma -> model timestep."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TIMESTEPS = 1000  # models are told 1000 sigma; what an architecture makes of it is its own
Spacing = Literal["constant", "dynamic", "even"]  # of a sampler's steps: see `Schedule.inference_sigmas`


@dataclass(frozen=True)
class Schedule:
    """A shifted rectified-flow schedule, as float64 tensors.

    sigma = shift u / (1 + (shift - 1) u), timestep = n sigma with n = num_train_timesteps. With `grid` time
    snaps to the table of the published training code, table[i] = sigma(1 - i/n) for i = 0..n-1: u takes entry
    floor(n (1 - u)), the last one at most, and a sigma between two entries has the lower one's timestep.

    Raises:
        ValueError: a shift that is not positive, or fewer than one training timestep.
    """

    shift: float
    num_train_timesteps: int = TIMESTEPS
    grid: bool = False
    spacing: Spacing = "constant"

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive (1 means unshifted, SD3.5 uses 3), not {self.shift}")
        if self.num_train_timesteps < 1:
            raise ValueError(
                f"num_train_timesteps must be at least 1 (usually 1000), not {self.num_train_timesteps}"
            )

    @property
    def sigma_min(self) -> float:
        """The lowest sigma of training points: sigma(1/n), the last entry of the published table."""
        return float(self._shifted(torch.tensor(1 / self.num_train_timesteps, dtype=torch.float64)))

    def sigma(self, u: Tensor | float) -> Tensor:
        """Sigma of unshifted time u (1 is noise), same shape, float64.

        Raises:
            ValueError: u outside [0, 1].
        """
        u = torch.as_tensor(u, dtype=torch.float64)
        if not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError(
                f"u must lie in [0, 1] (0 clean, 1 noise), got values in [{u.min():g}, {u.max():g}]"
            )
        if self.grid:
            n = self.num_train_timesteps
            # n - floor(n (1 - u)) = ceil(n u); a multiple of 1/n that float64 misses by an ulp counts as one.
            u = (n * u - 1e-9).ceil().clamp(min=1) / n
        return self._shifted(u)

    def unshift(self, sigma: Tensor | float) -> Tensor:
        """Unshifted time of a sigma: the inverse of the continuous schedule, same shape, float64."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return sigma / (sigma + self.shift * (1 - sigma))

    def timestep(self, sigma: Tensor | float) -> Tensor:
        """What the model is told about a sigma: num_train_timesteps sigma, same shape, float64."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if self.grid:
            n = self.num_train_timesteps
            ascending = self._shifted(torch.arange(1, n + 1, dtype=torch.float64, device=sigma.device) / n)
            entry = torch.searchsorted(ascending, sigma.contiguous(), right=True) - 1
            sigma = ascending[entry.clamp(min=0)]
        return self.num_train_timesteps * sigma

    def rollout_end(self, u0: Tensor | float, length: Tensor | float) -> Tensor:
        """Sigma after a way of `length` from time u0, 1/n for one step of n: same shape, float64.

        u1 = max(u0 - length, 0), and its sigma is never below sigma_min: without this floor the second moment of the
        correction diverges.

        Raises:
            ValueError: u0 or what is left of it outside [0, 1].
        """
        u0 = torch.as_tensor(u0, dtype=torch.float64)
        return self.sigma((u0 - length).clamp(min=0)).clamp(min=self.sigma_min)

    def inference_sigmas(self, n: int) -> Tensor:
        """Sigmas of an n-step sampler, [n + 1] float64, from 1 down to 0.

        Those that diffusers' pipelines have from FlowMatchEulerDiscreteScheduler: n equally spaced numbers from 1 down
        to a last one, shifted, then 0. The last one is by `spacing`

            constant  sigma_min: set_timesteps(n) of a constant shift begins with sigmas, and so shifts twice
            dynamic   1/num_train_timesteps: set_timesteps(n, mu=log(shift)) with use_dynamic_shifting
            even      1/n: set_timesteps(sigmas=...), as FLUX's pipelines do at any shift

        Raises:
            ValueError: n below 1.
        """
        check_sampling_steps(n)
        last = {"constant": self.sigma_min, "dynamic": 1 / self.num_train_timesteps, "even": 1 / n}
        steps = self._shifted(torch.linspace(1, last[self.spacing], n, dtype=torch.float64))
        return torch.cat([steps, steps.new_zeros(1)])

    def linear_sigmas(self, n: int) -> Tensor:
        """Sigmas of an n-step sampler whose n steps are equal in unshifted time: [n + 1] float64, from 1 down to 0.

        Raises:
            ValueError: n below 1.
        """
        check_sampling_steps(n)
        return self._shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64))

    def _shifted(self, u: Tensor) -> Tensor:
        # shift u / (1 + (shift - 1) u) in a form that no rounding takes above 1.
        return self.shift * u / (self.shift * u + (1 - u))


def check_sampling_steps(n: int) -> None:
    """ValueError where a sampler has no step."""
    if n < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, not {n}")
