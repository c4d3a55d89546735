"""The interpolation paths between data (t = 0) and noise (t = 1), shared by the schedulers and the training objective.

A path is `x_t = alpha(t) * data + sigma(t) * noise`; its velocity, the quantity the transformers predict, is
`alpha'(t) * data + sigma'(t) * noise` (SiT, arXiv 2401.08740, section 2, with time running towards the noise).
"""

import math
from typing import NamedTuple

import torch


PATHS = ("linear", "cosine")


class PathCoefficients(NamedTuple):
    """`alpha`, `sigma` and their time derivatives, each of the shape of `t`."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    alpha_derivative: torch.Tensor
    sigma_derivative: torch.Tensor


def check_path(path: str) -> None:
    """
    Raises:
        ValueError: If `path` is not one of `PATHS`.
    """
    if path not in PATHS:
        raise ValueError(f"`path` must be one of {', '.join(map(repr, PATHS))}, got {path!r}.")


def path_coefficients(t: torch.Tensor, path: str) -> PathCoefficients:
    """
    Coefficients of a path at times `t`.

    Args:
        t (`torch.Tensor`): Times in `[0, 1]`, any shape; 0 is data, 1 is noise.
        path (`str`): `"linear"` (`alpha = 1 - t`, `sigma = t`) or `"cosine"` (`alpha = cos(pi t / 2)`,
            `sigma = sin(pi t / 2)`).

    Returns:
        [`PathCoefficients`]: Tensors of the shape and dtype of `t`.

    Raises:
        ValueError: If `path` is unknown.
    """
    check_path(path)
    if path == "linear":
        return PathCoefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
    angle = t * (math.pi / 2)
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    return PathCoefficients(alpha, sigma, -sigma * (math.pi / 2), alpha * (math.pi / 2))
