"""The generators' objective: velocity matching on a path from data (t = 0) to noise (t = 1) (arXiv 2401.08740)."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..schedulers.paths import check_path, path_coefficients
from .alignment import FeatureAlignment, recorded_output
from .draws import draw_rows, sample_noise
from .guidance_free import check_guidance_free, effective_temperature, mix_velocities, unguided_velocity


TIME_DENSITIES = ("uniform", "lognormal")
# Below this length a velocity has no direction: a model that begins as zero, as all of ours do, would otherwise have
# enormous gradients in its first step.
DIRECTION_EPSILON = 1e-2


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
    difference = _promoted(model_output, target) - target
    return difference.square().flatten(1).mean(dim=1)


def direction_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    `1 - cos` of the angle between predicted and true velocity of every token, in the space of its channels (the last
    axis), averaged over the tokens, in float32 or better (LightningDiT, arXiv 2501.01423, section 4.2).

    Args:
        model_output (`torch.Tensor` of shape `(batch_size, ..., channels)`): Predicted velocity.
        target (`torch.Tensor` of the same shape): Velocity of the path.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: One loss per image, in `[0, 2]`.

    Raises:
        ValueError: If the shapes differ.
    """
    cosine = F.cosine_similarity(_promoted(model_output, target), target, dim=-1, eps=DIRECTION_EPSILON)
    return 1 - cosine.flatten(1).mean(dim=1)


def _promoted(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The output in float32 at least, if it is of the target's shape."""
    if model_output.shape != target.shape:
        raise ValueError(
            f"`model_output` has shape {tuple(model_output.shape)} but `target` has shape {tuple(target.shape)}."
        )
    return model_output.to(torch.promote_types(model_output.dtype, torch.float32))


class FlowDraws(NamedTuple):
    """
    The random numbers of one training batch; the fields are arguments of [`FlowMatchingObjective`], in its order.

    Attributes:
        draw (`torch.FloatTensor` of shape `(batch_size,)`): What [`time_from_draw`] takes.
        noise (`torch.FloatTensor` of shape `(batch_size, num_tokens, channels)`): Standard normal noise.
        class_drop_mask (`torch.BoolTensor` of shape `(batch_size,)`): True where the null class replaces the label.
        guidance_temperature (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): Temperatures in `(0, 1]`, for
            guidance-free training only.
    """

    draw: torch.Tensor
    noise: torch.Tensor
    class_drop_mask: torch.Tensor
    guidance_temperature: torch.Tensor | None = None


def sample_flow_draws(
    seed: int,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
    shape: Sequence[int],
    density: str = "uniform",
    class_dropout_prob: float = 0.1,
    guidance_free: bool = False,
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
        guidance_free (`bool`, *optional*, defaults to `False`): Whether temperatures are drawn, uniform in `(0, 1]`.
            The other draws are the same with and without.

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
        # `rand` may give 0, which is no temperature, and never 1, which is
        guidance_temperature=1 - draw_rows(uniform, seed, "guidance_temperature", step, sample_indices)
        if guidance_free
        else None,
    )


class FlowMatchingObjective(nn.Module):
    """
    Velocity-matching loss of a class-conditional transformer. It holds the transformer, so that preparing and
    forwarding the objective is what synchronises gradients between processes; it draws nothing itself.

    Terms, returned by name and unweighted:

    - `"velocity"`: squared error of the velocity, mean over tokens and channels.
    - `"direction"`, with a `direction_weight`: see [`direction_loss`].
    - `"alignment"`, with an `alignment`: the distance of one block's features to those of a frozen model.

    Args:
        transformer (`ModelMixin`): The network, with the interface of [`SiTTransformer1DModel`]; its config gives the
            path.
        density (`str`, *optional*, defaults to `"uniform"`): Density of the times, `"uniform"` or `"lognormal"`; the
            draws given to `forward` must be of the same density.
        time_shift (`float`, *optional*, defaults to 1.0): See [`shift_time`].
        direction_weight (`float`, *optional*, defaults to 0.0): Weight of the direction term; 0 leaves it out.
        guidance_free (`bool`, *optional*, defaults to `False`): Train for sampling without guidance, see
            [`~maetok_hf.training.guidance_free`]: the velocity that is compared mixes a pass with the class and a
            temperature, which has the gradient, and a pass with the null class, which has none.
        alignment ([`~maetok_hf.training.alignment.FeatureAlignment`], *optional*): Representation alignment.
        alignment_weight (`float`, *optional*, defaults to 0.5): Weight of the alignment term.

    Raises:
        ValueError: If `density` is unknown, `time_shift` is not positive and finite, a weight is negative or not
            finite, the transformer has no temperature embedding but `guidance_free` is asked for (or the other way
            round), or it has fewer blocks than the `layer` of the alignment.
    """

    def __init__(
        self,
        transformer: nn.Module,
        density: str = "uniform",
        time_shift: float = 1.0,
        direction_weight: float = 0.0,
        guidance_free: bool = False,
        alignment: FeatureAlignment | None = None,
        alignment_weight: float = 0.5,
    ):
        super().__init__()
        time_from_draw(torch.zeros(1), density, transformer.config.path, time_shift)  # refuse bad settings now
        for name, value in {"direction_weight": direction_weight, "alignment_weight": alignment_weight}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
        check_guidance_free(transformer, guidance_free)
        if alignment is not None and alignment.layer > len(transformer.transformer_blocks):
            raise ValueError(
                f"`layer` of the alignment is {alignment.layer}, but the transformer has "
                f"{len(transformer.transformer_blocks)} blocks."
            )
        self.transformer = transformer
        self.density = density
        self.time_shift = time_shift
        self.direction_weight = direction_weight
        self.guidance_free = guidance_free
        self.alignment = alignment
        self.alignment_weight = alignment_weight

    def move_frozen(self, device: torch.device | str) -> "FlowMatchingObjective":
        """
        Move what is not trained, which `.to()` does not reach.

        Args:
            device (`torch.device` or `str`): Where the batches are.

        Returns:
            [`FlowMatchingObjective`]: Itself.
        """
        if self.alignment is not None:
            self.alignment.move_frozen(device)
        return self

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        draw: torch.Tensor,
        noise: torch.Tensor,
        class_drop_mask: torch.Tensor | None = None,
        guidance_temperature: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        token_features: torch.Tensor | None = None,
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
            guidance_temperature (`torch.Tensor` of shape `(batch_size,)`, *optional*): Temperatures in `(0, 1]`,
                needed if, and only if, the training is `guidance_free`. Where the class is dropped, 1 takes its place.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`, *optional*): The images of the
                latents, in `[-1, 1]`, needed if, and only if, there is an `alignment` with a target.
            token_features (`torch.Tensor` of shape `(batch_size, num_tokens, feature_dim)`, *optional*): Their cached
                features, needed if, and only if, there is an `alignment` without a target.

        Returns:
            `dict[str, torch.Tensor]`: `"loss"` (scalar, the weighted sum of the terms, mean over the batch), which
            carries the gradient; `"loss_per_image"` of shape `(batch_size,)` and the terms (scalars), detached.

        Raises:
            ValueError: If the noise is not of the shape of the latents, `draw` or `guidance_temperature` does not hold
                one number per image, or an input is missing or has no effect.
        """
        if noise.shape != latents.shape:
            raise ValueError(f"`noise` has shape {tuple(noise.shape)} but `latents` has shape {tuple(latents.shape)}.")
        _check_needed("guidance_temperature", guidance_temperature, self.guidance_free, "`guidance_free` training")
        sources = {"pixel_values": pixel_values, "token_features": token_features}
        needed = None if self.alignment is None else self.alignment.input_name
        for name, source in sources.items():
            kind = {"pixel_values": "the alignment", "token_features": "an alignment with cached features"}[name]
            _check_needed(name, source, name == needed, kind)
        path = self.transformer.config.path
        t = time_from_draw(_per_image(draw, latents).flatten(), self.density, path, self.time_shift)
        if class_drop_mask is None:
            # without a mask the transformer would draw one itself in training mode
            class_drop_mask = torch.zeros(latents.shape[0], dtype=torch.bool, device=latents.device)

        noisy = interpolate(latents, noise, t, path)
        prediction, features = self._predict(noisy, t, class_labels, class_drop_mask, guidance_temperature)
        target = velocity_target(latents, noise, t, path)
        terms = {"velocity": flow_matching_loss(prediction, target)}
        loss = terms["velocity"]
        if self.direction_weight > 0:
            terms["direction"] = direction_loss(prediction, target)
            loss = loss + self.direction_weight * terms["direction"]
        if self.alignment is not None:
            terms["alignment"] = self.alignment(features, sources[needed])
            loss = loss + self.alignment_weight * terms["alignment"]
        means = {name: term.detach().mean() for name, term in terms.items()}
        return {"loss": loss.mean(), "loss_per_image": loss.detach()} | means

    def _predict(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor,
        class_drop_mask: torch.Tensor,
        guidance_temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The velocity that is compared with the path's and, for an alignment, the output of its block."""
        options = {}
        if self.guidance_free:
            guidance_temperature = effective_temperature(guidance_temperature, class_drop_mask)
            options["guidance_temperature"] = guidance_temperature

        with self._recorded_features() as outputs:
            prediction = self.transformer(
                noisy, t, class_labels, return_dict=False, class_drop_mask=class_drop_mask, **options
            )[0]
        # a U-ViT's other tokens come first
        features = outputs[0][:, -noisy.shape[1] :] if outputs else None
        if self.guidance_free:
            unguided = unguided_velocity(self.transformer, noisy, t)
            prediction = mix_velocities(prediction, unguided, guidance_temperature)
        return prediction, features

    def _recorded_features(self) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """Records the output of the block that is aligned, if there is one."""
        if self.alignment is None:
            return contextlib.nullcontext([])
        return recorded_output(self.transformer.transformer_blocks[self.alignment.layer - 1])


def _check_needed(name: str, value: torch.Tensor | None, needed: bool, by: str) -> None:
    if needed != (value is not None):
        raise ValueError(
            f"`{name}` is needed by {by}: pass it."
            if needed
            else f"`{name}` has no effect without {by}: leave it out."
        )
