"""Mean and standard deviation of a tokenizer's latents, measured over a stream of batches."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..models.autoencoder_mae import AutoencoderMAE
from ..moments import RunningMoments
from .latent_encoding import encode_tokens


logger = logging.getLogger(__name__)


class LatentStatistics:
    """
    Exact running mean and variance per latent channel in float64, see [`RunningMoments`].

    Args:
        num_channels (`int`): Channels of the latents.
    """

    def __init__(self, num_channels: int):
        self.moments = RunningMoments.zeros(num_channels, diagonal=True)

    def update(self, latents: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latent_tokens, num_channels)`): Raw latents on any
                device.

        Raises:
            ValueError: If the latents have another number of channels.
        """
        if latents.shape[-1] != len(self.moments.mean):
            raise ValueError(
                f"`latents` must have {len(self.moments.mean)} channels, got shape {tuple(latents.shape)}."
            )
        self.moments.update(latents.flatten(0, -2))

    def state(self) -> torch.Tensor:
        """The statistics as one float64 tensor of shape `(3, num_channels)`, to be gathered over processes."""
        return self.moments.state()

    @classmethod
    def merged(cls, states: Iterable[torch.Tensor]) -> "LatentStatistics":
        """
        The statistics of several sets together.

        Args:
            states (`Iterable[torch.Tensor]` of shape `(3, num_channels)`): What [`~LatentStatistics.state`] of each
                gave.
        """
        states = [state.cpu().double() for state in states]
        statistics = cls(states[0].shape[-1])
        statistics.moments = RunningMoments.merged(states, diagonal=True)
        return statistics

    def result(self, kind: str) -> tuple[float | list[float], float | list[float]]:
        """
        Mean and standard deviation, as the config of [`AutoencoderMAE`] takes them.

        Args:
            kind (`str`): `"scalar"` for one number each over all channels, `"channel"` for a list.

        Returns:
            `tuple`: `latents_mean` and `latents_std`.

        Raises:
            ValueError: If `kind` is unknown, nothing was added, a latent was not finite, or a standard deviation is 0.
        """
        if kind not in ("scalar", "channel"):
            raise ValueError(f"`kind` must be 'scalar' or 'channel', got {kind!r}.")
        if self.moments.count == 0:
            raise ValueError("No latents were added, so there is no mean.")
        mean, scatter = self.moments.mean, self.moments.scatter
        if not (mean.isfinite() & scatter.isfinite()).all():
            raise ValueError("The latents are not finite: the tokenizer is broken or its training diverged.")
        variance = self.moments.variance
        if kind == "scalar":
            overall = mean.mean()
            mean, variance = overall, (variance + (mean - overall).square()).mean()
        if not (variance > 0).all():
            raise ValueError("The latents do not vary, so they cannot be normalised: the tokenizer has collapsed.")
        return mean.tolist(), variance.sqrt().tolist()


def measure_latents(
    tokenizers: Mapping[str, AutoencoderMAE],
    batches: Iterable[torch.Tensor],
    kind: str,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, dict[str, Any]]:
    """
    Statistics of the latents of one or more tokenizers, of the same images.

    Every process must call this, with images of its own. A tokenizer whose latents cannot be normalised is named in a
    warning, and left out on every process.

    Args:
        tokenizers (`Mapping[str, AutoencoderMAE]`): In evaluation mode, with as many channels each, by name.
        batches (`Iterable[torch.Tensor]`): Images of shape `(batch_size, 3, height, width)` in `[-1, 1]`, on the
            tokenizers' device.
        kind (`str`): See [`~LatentStatistics.result`].
        gather (`Callable[[torch.Tensor], torch.Tensor]`): Concatenates tensors of all processes along their first
            axis, such as `Accelerator.gather`.

    Returns:
        `dict[str, dict[str, Any]]`: `latents_mean` and `latents_std` for the config of each tokenizer, by its name.
    """
    found = {name: LatentStatistics(tokenizer.config.latent_channels) for name, tokenizer in tokenizers.items()}
    device = torch.device("cpu")
    for images in batches:
        device = images.device
        for name, tokenizer in tokenizers.items():
            found[name].update(encode_tokens(tokenizer, images))
    configs = {}
    for name, statistics in found.items():
        states = gather(statistics.state()[None].to(device))
        try:  # what is wrong shows in the gathered states, so that all processes agree
            mean, std = LatentStatistics.merged(states).result(kind)
        except ValueError as error:
            logger.warning("The statistics of the latents of %s are left out: %s", name, error)
        else:
            configs[name] = {"latents_mean": mean, "latents_std": std}
    return configs


def summarize_statistics(states: Iterable[Sequence[Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """
    Statistics of a whole cache.

    Args:
        states (`Iterable[Sequence[Sequence[float]]]`): [`~LatentStatistics.state`] of every shard, in order, in plain
            numbers.

    Returns:
        `dict[str, dict]`: `latents_mean` and `latents_std` under `"scalar"`, and under `"channel"` unless a channel
        has no variance.

    Raises:
        ValueError: If there are no latents, or they do not vary.
    """
    merged = LatentStatistics.merged(torch.tensor(state, dtype=torch.float64) for state in states)
    found = {}
    for kind in ("scalar", "channel"):
        try:
            mean, std = merged.result(kind)
        except ValueError:
            if kind == "scalar":
                raise
            logger.warning("Some channels of the latents do not vary, so there are no statistics for each channel.")
        else:
            found[kind] = {"latents_mean": mean, "latents_std": std}
    return found
