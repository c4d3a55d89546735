"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738, section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .draws import draw_rows


DIFFAUGMENT_POLICIES = ("color", "translation", "cutout")
# brightness, saturation, contrast; translation down, right; cutout row, column; whether each of the policies happens
NUM_DIFFAUGMENT_DRAWS = 10
TRANSLATION_FRACTION = 1 / 8


def check_policy(policy: Sequence[str], argument: str = "policy") -> tuple[str, ...]:
    """
    Refuse a list of augmentations that [`diffaugment`] does not know.

    Args:
        policy (`Sequence[str]`): Names out of `"color"`, `"translation"` and `"cutout"`; empty for none.
        argument (`str`, *optional*, defaults to `"policy"`): What messages call it.

    Returns:
        `tuple[str, ...]`: The same names.

    Raises:
        ValueError: If a name is unknown or given twice, or `policy` is a single string.
    """
    if isinstance(policy, str):
        raise ValueError(
            f"`{argument}` must be a list of names, got the string {policy!r}: write {policy.split(',')}."
        )
    for name in policy:
        if name not in DIFFAUGMENT_POLICIES:
            raise ValueError(f"`{argument}` names {name!r}: choose from {', '.join(map(repr, DIFFAUGMENT_POLICIES))}.")
    if len(set(policy)) != len(policy):
        raise ValueError(f"`{argument}` must name each augmentation once, got {list(policy)}.")
    return tuple(policy)


def sample_diffaugment_draws(
    seed: int, purpose: str, step: int, sample_indices: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """
    Uniform numbers for [`diffaugment`], keyed per image. Their number does not depend on the policy, so switching one
    augmentation off does not change the others.

    Args:
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw; draws with different names are independent.
        step (`int`): Optimiser step of the draw.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, 10)` in `[0, 1)`, on the CPU.

    Raises:
        ValueError: If `sample_indices` is empty or not one-dimensional.
        TypeError: If `seed`, `step` or an index is not an integer.
    """
    return sample_uniform(seed, purpose, step, sample_indices, NUM_DIFFAUGMENT_DRAWS)


def sample_uniform(
    seed: int, purpose: str, step: int, sample_indices: Sequence[int] | torch.Tensor, num_draws: int
) -> torch.Tensor:
    """
    Uniform numbers for a batch.

    Args:
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw; draws with different names are independent.
        step (`int`): Optimiser step of the draw.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.
        num_draws (`int`): Numbers per image.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, num_draws)` in `[0, 1)`, on the CPU.

    Raises:
        ValueError: If `sample_indices` is empty or not one-dimensional.
        TypeError: If `seed`, `step` or an index is not an integer.
    """

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.rand(num_draws, generator=generator, dtype=torch.float32)

    return draw_rows(draw, seed, purpose, step, sample_indices)


def diffaugment(
    images: torch.Tensor, draws: torch.Tensor, policy: Sequence[str], probability: float = 1.0, cutout: float = 0.5
) -> torch.Tensor:
    """
    Augment each image by its own row of draws. The order is always colour, translation, cutout; gradients flow to the
    images through all of them.

    - `"color"`: brightness shifted by up to 0.5, saturation scaled by 0 to 2, contrast by 0.5 to 1.5. Values are not
      clamped afterwards.
    - `"translation"`: whole pixels, up to an eighth of the side in each direction; what moves in is 0, mid-grey.
    - `"cutout"`: a rectangle of half the height and half the width, its centre anywhere in the image, is set to 0.

    Probability and size of the rectangle are by default those of the DiffAugment paper.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in `[-1, 1]`.
        draws (`torch.Tensor` of shape `(batch_size, 10)`): Numbers in `[0, 1)`, see [`sample_diffaugment_draws`].
        policy (`Sequence[str]`): Names out of `"color"`, `"translation"` and `"cutout"`; empty for none.
        probability (`float`, *optional*, defaults to 1.0): Probability of each of them, independently for each image.
        cutout (`float`, *optional*, defaults to 0.5): Sides of the rectangle as a fraction of the image's.

    Returns:
        `torch.FloatTensor` of the shape of `images`.

    Raises:
        ValueError: If `policy` is invalid or the shapes do not fit.
    """
    policy = check_policy(policy)
    if images.ndim != 4:
        raise ValueError(f"`images` must have shape (batch_size, channels, height, width), got {tuple(images.shape)}.")
    if draws.shape != (images.shape[0], NUM_DIFFAUGMENT_DRAWS):
        raise ValueError(
            f"`draws` must have shape {(images.shape[0], NUM_DIFFAUGMENT_DRAWS)}, got {tuple(draws.shape)}: make them "
            "with `sample_diffaugment_draws`."
        )
    images, draws = images.float(), draws.to(images.device, torch.float32)
    happens = (draws[:, 7:] < probability)[:, :, None, None, None]
    if "color" in policy:
        images = torch.where(happens[:, 0], _color(images, *draws[:, :3].T), images)
    if "translation" in policy:
        images = torch.where(happens[:, 1], _translate(images, *draws[:, 3:5].T), images)
    if "cutout" in policy:
        images = torch.where(happens[:, 2], _cut_out(images, *draws[:, 5:7].T, cutout), images)
    return images


def take_windows(images: torch.Tensor, draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    One window of each image, every position in whole pixels being equally likely.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, H, W)`): Images, not smaller than the window.
        draws (`torch.Tensor` of shape `(batch_size, 2)`): Numbers in `[0, 1)`: top and left of the window as a
            fraction of the room there is.
        height, width (`int`): Size of the window.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height, width)`.
    """
    draws = draws.to(images.device)
    top = _whole(draws[:, 0], images.shape[-2] - height + 1)
    left = _whole(draws[:, 1], images.shape[-1] - width + 1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    batch = torch.arange(images.shape[0], device=images.device)
    # indexing, not slicing: the offsets stay on the device
    windows = images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2)


def _whole(draw: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers in `[0, 1)` to integers in `[0, count)`."""
    # the largest draw, 1 - 2^-24, times a count never rounds up to the count in float32
    return (draw * count).long()


def _color(
    images: torch.Tensor, brightness: torch.Tensor, saturation: torch.Tensor, contrast: torch.Tensor
) -> torch.Tensor:
    images = images + (brightness - 0.5)[:, None, None, None]
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (2 * saturation)[:, None, None, None]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)[:, None, None, None]


def _translate(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    pad_y, pad_x = (int(side * TRANSLATION_FRACTION + 0.5) for side in (height, width))
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    return take_windows(padded, torch.stack([down, right], dim=1), height, width)


def _cut_out(images: torch.Tensor, row: torch.Tensor, column: torch.Tensor, fraction: float) -> torch.Tensor:
    def hidden(draw: torch.Tensor, side: int) -> torch.Tensor:
        size = int(side * fraction + 0.5)
        # an even size has its centre between two pixels, of which there is one more
        start = _whole(draw, side + 1 - size % 2) - size // 2
        position = torch.arange(side, device=draw.device)
        return (position >= start[:, None]) & (position < start[:, None] + size)

    mask = hidden(row, images.shape[-2])[:, :, None] & hidden(column, images.shape[-1])[:, None, :]
    return images.masked_fill(mask[:, None], 0)
