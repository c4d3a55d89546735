"""The generators' objective: velocity matching on a path from data (t = 0) to noise (t = 1) (arXiv 2401.08740)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..schedulers.paths import check_path, path_coefficients
from .draws import draw_rows, sample_noise


TIME_DENSITIES = ("uniform", "lognormal")


def _check_density(density: str) -> None:
    if density not in TIME_DENSITIES:
        raise ValueError(f"`density` must be one of {', '.join(map(repr, TIME_DENSITIES))}, got {density!r}.")


def _per_image(t: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Times of shape `(B,)` or `(B, 1, ...)` made to broadcast over the other axes of `data`."""
    if t.numel() != data.shape[0] or t.shape[:1] != data.shape[:1]:
        raise ValueError(
            f"one time per image is needed, of shape ({data.shape[0]},) or ({data.shape[0]}, 1, ...), got "
            f"{tuple(t.shape)}."
        )
    return t.reshape(-1, *[1] * (data.ndim - 1))


def interpolate(data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, path: str) -> torch.Tensor:
    """
    The point of the path at time `t`: `alpha(t) * data + sigma(t) * noise`.

    Args:
        data (`torch.Tensor` of shape `(batch_size, ...)`): Normalised latents.
        noise (`torch.Tensor` of the shape of `data`): Standard normal noise.
        t (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, 1, ...)`): Times in `[0, 1]`; 0 is data, 1 is
            noise.
        path (`str`): `"linear"` or `"cosine"`, see [`~maetok_hf.schedulers.paths.path_coefficients`].

    Returns:
        `torch.Tensor` of the shape of `data`.

    Raises:
        ValueError: If `path` is unknown or `t` does not hold one time per image.
    """
    coefficients = path_coefficients(_per_image(t, data), path)
    return coefficients.alpha * data + coefficients.sigma * noise


def velocity_target(data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, path: str) -> torch.Tensor:
    """
    Time derivative of [`interpolate`], pointing from data to noise: `noise - data` on the linear path.

    The arguments, the result and the errors are those of [`interpolate`].
    """
    coefficients = path_coefficients(_per_image(t, data), path)
    return coefficients.alpha_derivative * data + coefficients.sigma_derivative * noise


def time_from_draw(draw: torch.Tensor, density: str, path: str, shift: float = 1.0) -> torch.Tensor:
    """
    Turn a random draw into a time.

    Args:
        draw (`torch.Tensor`): For `"uniform"` a uniform number in `[0, 1]`, which is the time itself; for
            `"lognormal"` a standard normal number `n`, giving the noise-to-data ratio `s = exp(n)` and the time whose
            `sigma / alpha` is `s`: `s / (1 + s)` on the linear path, `(2 / pi) atan(s)` on the cosine path.
        density (`str`): `"uniform"` or `"lognormal"`.
        path (`str`): `"linear"` or `"cosine"`.
        shift (`float`, *optional*, defaults to 1.0): Moves times towards the noise when above 1, by
            `t' = shift * t / (1 + (shift - 1) * t)`.

    Returns:
        `torch.Tensor` of the shape of `draw`: times in `[0, 1]`.

    Raises:
        ValueError: If `density` or `path` is unknown, or `shift` is not positive and finite.
    """
    _check_density(density)
    check_path(path)
    if density == "uniform":
        t = draw
    elif path == "linear":
        t = torch.sigmoid(draw)
    else:
        t = torch.atan(torch.exp(draw)) * (2 / math.pi)
    return shift_time(t, shift)


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Time shift `t' = shift * t / (1 + (shift - 1) * t)`, which fixes 0 and 1.

    Args:
        t (`torch.Tensor`): Times in `[0, 1]`, any shape.
        shift (`float`): Positive; 1 leaves the times as they are, more moves them towards the noise. For latents of
            `L x C` numbers `sqrt(L * C / 4096)` keeps the noise level of 128 x 32.

    Returns:
        `torch.Tensor` of the shape of `t`.

    Raises:
        ValueError: If `shift` is not positive and finite.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"`shift` must be positive and finite, got {shift}.")
    return shift * t / (1 + (shift - 1) * t)


def flow_matching_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Squared error of the velocity, averaged over tokens and channels, in float32 or better.

    Args:
        model_output (`torch.Tensor` of shape `(batch_size, ...)`): Predicted velocity.
        target (`torch.Tensor` of the same shape): Velocity of the path.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: One loss per image.

    Raises:
        ValueError: If the shapes differ.
    """
    if model_output.shape != target.shape:
        raise ValueError(
            f"`model_output` has shape {tuple(model_output.shape)} but `target` has shape {tuple(target.shape)}."
        )
    # a low-precision output is promoted to the target's float32
    difference = model_output.to(torch.promote_types(model_output.dtype, torch.float32)) - target
    return difference.square().flatten(1).mean(dim=1)


class FlowDraws(NamedTuple):
    """
    The random numbers of one training batch; the fields are the arguments of [`FlowMatchingObjective`].

    Attributes:
        draw (`torch.FloatTensor` of shape `(batch_size,)`): What [`time_from_draw`] takes.
        noise (`torch.FloatTensor` of shape `(batch_size, num_tokens, channels)`): Standard normal noise.
        class_drop_mask (`torch.BoolTensor` of shape `(batch_size,)`): True where the null class replaces the label.
    """

    draw: torch.Tensor
    noise: torch.Tensor
    class_drop_mask: torch.Tensor


def sample_flow_draws(
    seed: int,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
    shape: Sequence[int],
    density: str = "uniform",
    class_dropout_prob: float = 0.1,
) -> FlowDraws:
    """
    The draws of a batch, each keyed by `(seed, purpose, step, sample index)`, so that an image's draws do not depend
    on the batch it is in.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimiser step.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.
        shape (`Sequence[int]`): Shape of one image's latents, `(num_tokens, channels)`.
        density (`str`, *optional*, defaults to `"uniform"`): Density of the times, `"uniform"` or `"lognormal"`.
        class_dropout_prob (`float`, *optional*, defaults to 0.1): Probability that the label is dropped, in `[0, 1]`.

    Returns:
        [`FlowDraws`]: Tensors on the CPU.

    Raises:
        ValueError: If `density` is unknown, `class_dropout_prob` is outside `[0, 1]` or `sample_indices` is invalid.
        TypeError: If `seed`, `step` or an index is not an integer.
    """
    _check_density(density)
    if not 0.0 <= class_dropout_prob <= 1.0:
        raise ValueError(f"`class_dropout_prob` must be in [0, 1], got {class_dropout_prob}.")

    def uniform(generator: torch.Generator) -> torch.Tensor:
        return torch.rand((), generator=generator, dtype=torch.float32)

    if density == "uniform":
        draw = draw_rows(uniform, seed, "flow_time", step, sample_indices)
    else:
        draw = sample_noise(seed, "flow_time", step, sample_indices, ())
    return FlowDraws(
        draw=draw,
        noise=sample_noise(seed, "flow_noise", step, sample_indices, shape),
        class_drop_mask=draw_rows(uniform, seed, "class_drop", step, sample_indices) < class_dropout_prob,
    )


class FlowMatchingObjective(nn.Module):
    """
    Velocity-matching loss of a class-conditional transformer. It holds the transformer, so that preparing and
    forwarding the objective is what synchronises gradients between processes; it draws nothing itself.

    Args:
        transformer ([`SiTTransformer1DModel`]): The network; its config gives the path.
        density (`str`, *optional*, defaults to `"uniform"`): Density of the times, `"uniform"` or `"lognormal"`; the
            draws given to `forward` must be of the same density.
        time_shift (`float`, *optional*, defaults to 1.0): See [`shift_time`].

    Raises:
        ValueError: If `density` is unknown or `time_shift` is not positive and finite.
    """

    def __init__(self, transformer: nn.Module, density: str = "uniform", time_shift: float = 1.0):
        super().__init__()
        time_from_draw(torch.zeros(1), density, transformer.config.path, time_shift)  # refuse bad settings now
        self.transformer = transformer
        self.density = density
        self.time_shift = time_shift

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        draw: torch.Tensor,
        noise: torch.Tensor,
        class_drop_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`):
                Data, *normalised* by [`~maetok_hf.models.latents.normalize_latents`].
            class_labels (`torch.LongTensor` of shape `(batch_size,)`): Labels in `[0, num_classes]`.
            draw (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, 1, 1)`): See [`time_from_draw`].
            noise (`torch.Tensor` of the shape of `latents`): Standard normal noise.
            class_drop_mask (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                True where the null class replaces the label. By default no label is dropped.

        Returns:
            `dict[str, torch.Tensor]`: `"loss"` (scalar, mean over the batch) and `"loss_per_image"` of shape
            `(batch_size,)`, detached.

        Raises:
            ValueError: If the noise is not of the shape of the latents or `draw` does not hold one number per image.
        """
        if noise.shape != latents.shape:
            raise ValueError(f"`noise` has shape {tuple(noise.shape)} but `latents` has shape {tuple(latents.shape)}.")
        path = self.transformer.config.path
        t = time_from_draw(_per_image(draw, latents).flatten(), self.density, path, self.time_shift)
        if class_drop_mask is None:
            # without a mask the transformer would draw one itself in training mode
            class_drop_mask = torch.zeros(latents.shape[0], dtype=torch.bool, device=latents.device)

        prediction = self.transformer(
            interpolate(latents, noise, t, path), t, class_labels, return_dict=False, class_drop_mask=class_drop_mask
        )[0]
        loss = flow_matching_loss(prediction, velocity_target(latents, noise, t, path))
        return {"loss": loss.mean(), "loss_per_image": loss.detach()}
