"""Velocity fields whose flow is known in closed form.

Data drawn from a known distribution has a known velocity, `E[alpha' data + sigma' noise | x_t]`. Its ODE carries
standard normal noise to the data, and where its end point is known to the last digit a solver's error is measured, not
estimated.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin

from maetok_hf import FlowMatchEulerMaruyamaScheduler
from maetok_hf.schedulers import path_coefficients


Velocity = Callable[[torch.Tensor, float], torch.Tensor]

MEAN, STD = 1.5, 0.3


def coefficients(t: float, path: str) -> tuple[float, float, float, float]:
    """`alpha`, `sigma` and their derivatives at a time, as numbers."""
    return tuple(c.item() for c in path_coefficients(torch.tensor(t, dtype=torch.float64), path))


def gaussian_velocity(path: str) -> Velocity:
    """
    The exact velocity of data of which every entry is drawn from `N(MEAN, STD^2)`.

    Its ODE carries noise `e` to `MEAN + STD * e`, and its SDE carries `N(0, 1)` to `N(MEAN, STD^2)`.
    """
    field = Gaussian.independent([MEAN], [STD], path)
    return lambda sample, t: field.velocity(sample[..., None], t)[..., 0]


class Gaussian(NamedTuple):
    """Data drawn from `N(mean, covariance)`, along the last axis."""

    mean: torch.Tensor  # (channels,)
    covariance: torch.Tensor  # (channels, channels)
    path: str = "linear"

    @classmethod
    def independent(cls, means: list[float], stds: list[float], path: str = "linear") -> "Gaussian":
        """Channels that know nothing of each other."""
        stds = torch.tensor(stds, dtype=torch.float64)
        return cls(torch.tensor(means, dtype=torch.float64), stds.square().diag(), path)

    def _along_axes(self, sample: torch.Tensor, factor: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Multiply along the covariance's axes by a function of its eigenvalues."""
        eigenvalues, axes = torch.linalg.eigh(self.covariance)
        return (sample.double() @ axes * factor(eigenvalues)) @ axes.T

    def velocity(self, sample: torch.Tensor, t: float) -> torch.Tensor:
        """At any sample of shape `(..., channels)`; of the sample's dtype."""
        alpha, sigma, alpha_derivative, sigma_derivative = coefficients(t, self.path)
        centred = self._along_axes(
            sample - alpha * self.mean,
            lambda s: (alpha * alpha_derivative * s + sigma * sigma_derivative) / (alpha**2 * s + sigma**2),
        )
        return (alpha_derivative * self.mean + centred).to(sample.dtype)

    def flow(self, sample: torch.Tensor, start: float = 1.0) -> torch.Tensor:
        """Where the ODE carries a sample of time `start`: every axis keeps its place in units of its own deviation."""
        alpha, sigma, _, _ = coefficients(start, self.path)
        stretched = self._along_axes(sample - alpha * self.mean, lambda s: (s / (alpha**2 * s + sigma**2)).sqrt())
        return self.mean + stretched


class Mixture(NamedTuple):
    """Every entry drawn for itself from `sum_k weights_k N(means_k, stds_k^2)`."""

    weights: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    path: str = "linear"

    @classmethod
    def three_modes(cls, path: str = "linear") -> "Mixture":
        """Modes of unequal weight, width and distance."""
        values = [0.5, 0.3, 0.2], [-1.2, 0.4, 1.6], [0.35, 0.25, 0.5]
        return cls(*(torch.tensor(v, dtype=torch.float64) for v in values), path)

    def velocity(self, sample: torch.Tensor, t: float) -> torch.Tensor:
        """Mean of the components' velocities under their posterior; of the sample's shape and dtype."""
        alpha, sigma, alpha_derivative, sigma_derivative = coefficients(t, self.path)
        variances = alpha**2 * self.stds**2 + sigma**2
        covariances = alpha * alpha_derivative * self.stds**2 + sigma * sigma_derivative
        centred = sample.double()[..., None] - alpha * self.means
        posterior = (self.weights.log() - variances.log() / 2 - centred**2 / variances / 2).softmax(-1)
        velocities = alpha_derivative * self.means + covariances / variances * centred
        return (posterior * velocities).sum(-1).to(sample.dtype)

    def cdf(self, sample: torch.Tensor, t: float = 0.0) -> torch.Tensor:
        """Share of the samples of time `t` below a value."""
        alpha, sigma, _, _ = coefficients(t, self.path)
        stds = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr((sample.double()[..., None] - alpha * self.means) / stds)).sum(-1)

    def flow(self, sample: torch.Tensor, start: float = 1.0) -> torch.Tensor:
        """Where the ODE carries a sample of time `start`: paths in one dimension never cross, so ranks are kept."""
        rank = self.cdf(sample, start)
        low, high = torch.full_like(rank, -20.0), torch.full_like(rank, 20.0)
        for _ in range(60):  # bisection, to the last bit
            middle = (low + high) / 2
            below = self.cdf(middle) < rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def guided_gaussian(
    better: Gaussian, worse: Gaussian, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and deviation of what `worse + scale * (better - worse)` inside an interval, and `better` outside, carries
    standard normal noise to; channels are independent.

    A velocity that is affine in x keeps Gaussians Gaussian: its slope is the derivative of the logarithm of the
    deviation, `A_i = (log std_i)'`. Guidance combines slopes, so it combines logarithms: over the whole path the
    deviation becomes `std_better^scale / std_worse^(scale - 1)`. The mean in units of the deviation is an integral.
    """
    low, high = interval
    path = better.path

    def std(field: Gaussian, t: float) -> torch.Tensor:
        alpha, sigma, _, _ = coefficients(t, path)
        return (alpha**2 * field.covariance.diagonal() + sigma**2).sqrt()

    def gain(t: float) -> torch.Tensor:
        return (std(better, t) / std(worse, t)).log()

    def guided_std(t: float) -> torch.Tensor:
        passed = gain(min(max(t, low), high)) - gain(high)
        return std(better, t) * ((scale - 1) * passed).exp()

    def push(t: float, scale: float) -> torch.Tensor:
        """The velocity's constant part."""
        origin = torch.zeros_like(better.mean)
        better_push, worse_push = better.velocity(origin, t), worse.velocity(origin, t)
        return worse_push + scale * (better_push - worse_push)

    nodes, weights = np.polynomial.legendre.leggauss(100)
    relative_mean = torch.zeros_like(better.mean)
    for begin, end, s in ((1.0, high, 1.0), (high, low, scale), (low, 0.0, 1.0)):
        for node, weight in zip(nodes, weights, strict=True):
            t = (begin + end) / 2 + (end - begin) / 2 * node
            relative_mean = relative_mean + (end - begin) / 2 * weight * push(t, s) / guided_std(t)
    return guided_std(0.0) * relative_mean, guided_std(0.0)


def full_gaussian(path: str = "linear") -> Gaussian:
    """Three channels that depend on each other."""
    covariance = [[1.0, 0.4, 0.0], [0.4, 0.5, -0.2], [0.0, -0.2, 0.3]]
    mean = torch.tensor([1.5, -0.5, 0.2], dtype=torch.float64)
    return Gaussian(mean, torch.tensor(covariance, dtype=torch.float64), path)


def sde_moments(scheduler: FlowMatchEulerMaruyamaScheduler, field: Gaussian) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and covariance that an SDE sampler, whose grid is set, gives standard normal noise on a Gaussian's velocity.

    Every step is affine, `x -> x M + c + q n`, so a few probes say what it does to all samples.
    """
    count = len(field.mean)
    mean = torch.zeros(count, dtype=torch.float64)
    covariance = torch.eye(count, dtype=torch.float64)
    probes = torch.cat([torch.zeros(1, count), torch.eye(count), torch.zeros(1, count)]).double()
    noise = torch.zeros_like(probes)
    noise[-1] = 1
    for time, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        moved = scheduler.step(field.velocity(probes, time), timestep, probes, noise=noise).prev_sample
        offset, matrix, spread = moved[0], moved[1:-1] - moved[0], moved[-1] - moved[0]
        mean = mean @ matrix + offset
        covariance = matrix.T @ covariance @ matrix + spread.square().diag()
    return mean, covariance


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


def fit_order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The p of `error = constant / steps^p` that fits best."""
    return -np.polyfit(np.log(steps), [math.log(error) for error in errors], 1)[0]
