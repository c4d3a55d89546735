"""Mask modelling: how many patches of each image are replaced by the mask token, and which (MAETok, section 3.2)."""

import math
import statistics
from collections.abc import Sequence

import torch

from ..seeding import keyed_generator
from .draws import draw_rows


# below this probability the inverse CDF between the bounds has lost its digits in float64
_MIN_TRUNCATED_MASS = 1e-9
# a product of floats is up to 1e-13 above a whole number that it should be, as in 0.07 * 100
_ROUNDING = 1e-9
MASK_RATIO_DENSITIES = ("truncated_normal", "uniform")


def _check_ratio(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def sample_mask_ratio(
    generator: torch.Generator,
    mean: float = 0.6,
    std: float = 0.25,
    low: float = 0.4,
    high: float = 0.6,
    density: str = "truncated_normal",
) -> float:
    """
    Draw the mask ratio of a step from `[low, high]`.

    The draw is an inverse CDF of exactly one uniform number whatever the arguments, so changing the bounds never
    shifts the draws that follow in the same stream.

    Args:
        generator (`torch.Generator`): CPU generator of the draw.
        mean (`float`, *optional*, defaults to 0.6): Mean of the normal before truncation.
        std (`float`, *optional*, defaults to 0.25): Standard deviation of the normal before truncation.
        low (`float`, *optional*, defaults to 0.4): Smallest ratio.
        high (`float`, *optional*, defaults to 0.6): Largest ratio; equal to `low` for a fixed ratio.
        density (`str`, *optional*, defaults to `"truncated_normal"`): A normal truncated to the bounds (the released
            code), or `"uniform"` between them, for which `mean` and `std` do not matter (the paper names the bounds).

    Returns:
        `float`: Fraction of the patches to mask, in `[low, high]`.

    Raises:
        ValueError: If the bounds are reversed or outside `[0, 1]`, if `std` is not positive, if the normal has
            practically no mass between the bounds, or if `density` is unknown.
    """
    if density not in MASK_RATIO_DENSITIES:
        raise ValueError(f"`density` must be one of {', '.join(map(repr, MASK_RATIO_DENSITIES))}, got {density!r}.")
    _check_ratio("low", low)
    _check_ratio("high", high)
    if low > high:
        raise ValueError(f"`low` must not exceed `high`, got low={low} and high={high}.")
    if not std > 0:
        raise ValueError(f"`std` must be positive, got {std}; for a fixed ratio set `low` equal to `high`.")
    uniform = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    if low == high:
        return float(low)
    if density == "uniform":
        return min(low + (high - low) * uniform.item(), high)

    normal = statistics.NormalDist(mean, std)
    cdf_low, cdf_high = normal.cdf(low), normal.cdf(high)
    mass = cdf_high - cdf_low
    if mass < _MIN_TRUNCATED_MASS:
        raise ValueError(
            f"a normal with `mean`={mean} and `std`={std} has no mass in [{low}, {high}]: move the mean closer to the "
            "bounds or raise `std`."
        )
    return min(max(normal.inv_cdf(cdf_low + uniform.item() * mass), low), high)


def linear_mask_ratio(step: int, num_steps: int, start: float = 0.6, end: float = 0.0) -> float:
    """
    Mask ratio of decoder fine-tuning, going linearly from `start` to `end` (MAETok, section 3.3).

    Over `num_steps` steps means that the first of them has `start` and the last, step `num_steps - 1`, has `end`: a
    run of just as many steps ends without masks. Because a mask has `ceil(ratio * N)` patches, that step is the first
    without any, and the steps before it mask a single one.

    Args:
        step (`int`): Optimiser step, counted from 0.
        num_steps (`int`): Steps of the way, both ends included; a single one has `end`.
        start (`float`, *optional*, defaults to 0.6): Ratio at step 0.
        end (`float`, *optional*, defaults to 0.0): Ratio from step `num_steps - 1` on.

    Returns:
        `float`: Fraction of the patches to mask.

    Raises:
        ValueError: If `step` is negative, `num_steps` is not positive, or a ratio is outside `[0, 1]`.
    """
    _check_ratio("start", start)
    _check_ratio("end", end)
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    if num_steps <= 0:
        raise ValueError(f"`num_steps` must be positive, got {num_steps}.")
    progress = min(step / (num_steps - 1), 1.0) if num_steps > 1 else 1.0
    return (1.0 - progress) * start + progress * end


def sample_mask(num_tokens: int, mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """
    Mask `ceil(mask_ratio * num_tokens)` patches of one image, every subset of that size being equally likely.

    Args:
        num_tokens (`int`): Number of patches of the image.
        mask_ratio (`float`): Fraction of the patches to mask, in `[0, 1]`.
        generator (`torch.Generator`): CPU generator of the draw.

    Returns:
        `torch.BoolTensor` of shape `(num_tokens,)`, True where the patch is replaced by the mask token.

    Raises:
        ValueError: If `num_tokens` is not positive or `mask_ratio` is outside `[0, 1]`.
    """
    _check_ratio("mask_ratio", mask_ratio)
    if num_tokens <= 0:
        raise ValueError(f"`num_tokens` must be positive, got {num_tokens}.")
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    num_masked = math.ceil(mask_ratio * num_tokens - _ROUNDING)
    mask[torch.randperm(num_tokens, generator=generator)[:num_masked]] = True
    return mask


def sample_step_mask_ratio(
    seed: int,
    step: int,
    mean: float = 0.6,
    std: float = 0.25,
    low: float = 0.4,
    high: float = 0.6,
    density: str = "truncated_normal",
) -> float:
    """
    The one mask ratio of a step, keyed by `(seed, "mask_ratio", step)`: equal in every process and micro-batch.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimiser step.
        mean, std, low, high, density (*optional*): See [`sample_mask_ratio`].

    Returns:
        `float`: A ratio in `[low, high]`.

    Raises:
        ValueError: As [`sample_mask_ratio`] does.
    """
    return sample_mask_ratio(keyed_generator(seed, "mask_ratio", step), mean, std, low, high, density)


def sample_masks(
    seed: int,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
    num_tokens: int,
    mask_ratio: float,
) -> torch.Tensor:
    """
    The masks of a batch, each keyed by `(seed, "mask", step, sample index)`.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimiser step.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.
        num_tokens (`int`): Number of patches per image, `N`.
        mask_ratio (`float`): Fraction of the patches to mask, in `[0, 1]`.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, N)` on the CPU, with exactly `ceil(mask_ratio * N)` True in each row.

    Raises:
        ValueError: If `num_tokens`, `mask_ratio` or `sample_indices` is invalid.
        TypeError: If `seed`, `step` or an index is not an integer.
    """
    return draw_rows(
        lambda generator: sample_mask(num_tokens, mask_ratio, generator), seed, "mask", step, sample_indices
    )
