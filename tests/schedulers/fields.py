"""Velocity fields whose flow is known in closed form."""

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin

from maetok_hf.schedulers import path_coefficients


Velocity = Callable[[torch.Tensor, float], torch.Tensor]

MEAN, STD = 1.5, 0.3


def gaussian_velocity(path: str) -> Velocity:
    """
    The exact velocity of data drawn from `N(MEAN, STD^2)`: `E[alpha' x + sigma' e | x_t]`.

    Its ODE carries noise `e` to `MEAN + STD * e`, and its SDE carries `N(0, 1)` to `N(MEAN, STD^2)`.
    """

    def velocity(sample: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma, alpha_derivative, sigma_derivative = (
            c.item() for c in path_coefficients(torch.tensor(t, dtype=torch.float64), path)
        )
        variance = alpha**2 * STD**2 + sigma**2
        covariance = alpha * alpha_derivative * STD**2 + sigma * sigma_derivative
        return alpha_derivative * MEAN + covariance / variance * (sample - alpha * MEAN)

    return velocity


def integrate(
    scheduler: SchedulerMixin,
    velocity: Velocity,
    sample: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Run a scheduler whose grid is set from its first step to its last."""
    kwargs = {} if generator is None else {"generator": generator}
    for time, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        sample = scheduler.step(velocity(sample, time), timestep, sample, **kwargs).prev_sample
    return sample
