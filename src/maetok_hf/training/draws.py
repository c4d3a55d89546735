"""Keyed draws for a batch: the row of an image depends on its own index, never on the batch it happens to be in."""

from collections.abc import Callable, Sequence

import torch

from ..seeding import keyed_seed


def draw_rows(
    draw: Callable[[torch.Generator], torch.Tensor],
    seed: int,
    purpose: str,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
) -> torch.Tensor:
    """
    Draw once per image, each time from a generator keyed by `(seed, purpose, step, sample index)`.

    Args:
        draw (`Callable[[torch.Generator], torch.Tensor]`): Makes the draw of one image.
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw; draws with different names are independent.
        step (`int`): Optimiser step (or epoch) of the draw.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.

    Returns:
        `torch.Tensor` of shape `(batch_size, ...)` on the CPU.

    Raises:
        ValueError: If `sample_indices` is empty or not one-dimensional.
        TypeError: If `seed`, `step` or an index is not an integer.
    """
    if isinstance(sample_indices, torch.Tensor):
        if sample_indices.ndim != 1:
            raise ValueError(
                f"`sample_indices` must have shape (batch_size,), got {tuple(sample_indices.shape)}: flatten it."
            )
        sample_indices = sample_indices.tolist()
    if len(sample_indices) == 0:
        raise ValueError("`sample_indices` must name at least one image, got none.")
    generator = torch.Generator()  # seeding one anew is cheaper than making one, and gives the same numbers
    seeds = (keyed_seed(seed, purpose, step, index) for index in sample_indices)
    return torch.stack([draw(generator.manual_seed(key)) for key in seeds])


def sample_noise(
    seed: int,
    purpose: str,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
    shape: Sequence[int],
) -> torch.Tensor:
    """
    Standard normal noise for a batch.

    Args:
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw; draws with different names are independent.
        step (`int`): Optimiser step (or epoch) of the draw.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.
        shape (`Sequence[int]`): Shape of one image's noise, for example `(num_latent_tokens, latent_channels)`.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, *shape)` on the CPU.

    Raises:
        ValueError: If `sample_indices` is empty or not one-dimensional.
        TypeError: If `seed`, `step` or an index is not an integer.
    """

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)

    return draw_rows(draw, seed, purpose, step, sample_indices)


def seed_global_generator(seed: int, device: torch.device) -> None:
    """
    Seed the one generator that dropout on a device draws from.

    `torch.manual_seed` also seeds those of all other devices; before CUDA is in use it keeps each of these calls, with
    a stack trace, for the day that it is.

    Args:
        seed (`int`): The seed, for example from [`~maetok_hf.seeding.keyed_seed`].
        device (`torch.device`): The device.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)
