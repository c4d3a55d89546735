"""How the variance of latents is spread over directions and over channels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..moments import RunningMoments
from .rows import Rows, iterate_chunks, iterate_rows


def effective_rank(singular_values: torch.Tensor) -> float:
    """
    Effective rank of a matrix (Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
    2007): with p_i = s_i / sum_j s_j the singular values as fractions of their sum,

        exp(-sum_i p_i log p_i)

    It is n for n equal singular values, 1 for a single one, and the number of directions that are used between them.
    The matrix of latents, one a row, minus their mean has the square roots of the eigenvalues of their covariance as
    singular values, up to a factor that changes nothing.

    Args:
        singular_values (`torch.Tensor` of shape `(num_values,)`): Not negative; zeros change nothing.

    Returns:
        `float`: In `[1, num_values]`.

    Raises:
        ValueError: If a value is negative or not finite, or all are zero.
    """
    values = singular_values.double()
    if values.ndim != 1 or not values.isfinite().all() or (values < 0).any() or not (values > 0).any():
        raise ValueError(
            "`singular_values` must be a vector of finite numbers that are not negative and not all zero, got shape "
            f"{tuple(values.shape)} and values {values.flatten()[:5].tolist()}..."
        )
    fractions = values / values.sum()
    return math.exp(-torch.xlogy(fractions, fractions).sum().item())


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """
    What each channel of the latents is like over all samples and positions, in plain numbers for JSON.

    Args:
        count (`int`): Numbers per channel: samples times positions.
        mean (`tuple[float, ...]`): Mean of each channel.
        std (`tuple[float, ...]`): Standard deviation, the root of the mean squared difference from the mean.
        minimum (`tuple[float, ...]`): Smallest number.
        maximum (`tuple[float, ...]`): Largest number.
        effective_rank (`float`): Effective rank of the numbers with a row for each sample and position and a column
            for each channel, minus the mean: the number of channels if they are uncorrelated and of equal variance.
    """

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    effective_rank: float


def channel_statistics(
    latents: Rows, channel_dim: int = -1, device: torch.device | str | None = None
) -> ChannelStatistics:
    """
    Statistics of each channel of the latents, in one pass.

    Args:
        latents (`torch.Tensor`, `Iterable` or `Callable`): Latents of shape `(num_images, ...)`, or chunks of them,
            see [`iterate_rows`].
        channel_dim (`int`, *optional*, defaults to -1): The dimension of the channels: the last one for tokens of
            shape `(num_images, num_tokens, num_channels)`, 1 for maps of shape `(num_images, num_channels, height,
            width)`.
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the latents are.

    Returns:
        [`ChannelStatistics`]: The statistics.

    Raises:
        ValueError: If there are no latents, `channel_dim` is not one of their dimensions or is that of the images,
            all channels are constant, or [`iterate_rows`] refuses the latents.
    """
    moments, minimum, maximum = None, None, None
    for rows in iterate_rows(lambda: _channels_last(latents, channel_dim), device, name="latents"):
        if moments is None:
            moments = RunningMoments.zeros(rows.shape[1], device=rows.device)
            minimum = maximum = rows[0]
        moments.update(rows)
        minimum, maximum = torch.minimum(minimum, rows.amin(dim=0)), torch.maximum(maximum, rows.amax(dim=0))
    if moments is None:
        raise ValueError("`latents` has no samples.")
    if not moments.variance.any():
        raise ValueError("All channels of `latents` are constant: the tokenizer tells no images apart.")
    eigenvalues = without_rounding(torch.linalg.eigvalsh(moments.scatter / moments.count))
    return ChannelStatistics(
        count=moments.count,
        mean=tuple(moments.mean.tolist()),
        std=tuple(moments.variance.sqrt().tolist()),
        minimum=tuple(minimum.tolist()),
        maximum=tuple(maximum.tolist()),
        effective_rank=effective_rank(eigenvalues.sqrt()),
    )


def without_rounding(eigenvalues: torch.Tensor) -> torch.Tensor:
    """
    Eigenvalues of a covariance without those that are rounding errors of zero.

    Args:
        eigenvalues (`torch.Tensor` of shape `(num_features,)`): In any order.

    Returns:
        `torch.Tensor` of shape `(num_features,)`: None of them negative.
    """
    limit = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    return torch.where(eigenvalues > limit, eigenvalues, 0.0)


def _channels_last(latents: Rows, channel_dim: int) -> Iterator[torch.Tensor]:
    for chunk in iterate_chunks(latents, name="latents"):
        if channel_dim in (0, -chunk.ndim) or not -chunk.ndim <= channel_dim < chunk.ndim:
            raise ValueError(
                f"`channel_dim` must be a dimension of the latents, of shape {tuple(chunk.shape)}, other than the "
                f"first, got {channel_dim}."
            )
        yield chunk.movedim(channel_dim, -1).flatten(0, -2)
