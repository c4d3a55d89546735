"""One batch of a set, in which every image has its own source of noise."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..models import denormalize_latents
from ..pipelines import MAETokDiffusionPipeline
from ..seeding import keyed_generator


def split_into_batches(num_images: int, batch_size: int, missing: Iterable[int]) -> list[range]:
    """
    The batches in which a set has images to be made.

    Batches are blocks of consecutive indices, whatever is there already and however many processes there are: results
    may differ in their last bits with the composition of a batch, so an image is always made in the same one.

    Args:
        num_images (`int`): Images of the set.
        batch_size (`int`): Images of a batch; the last one may have fewer.
        missing (`Iterable[int]`): Images that are not there.

    Returns:
        `list[range]`: Indices of each batch with at least one missing image, in order.
    """
    starts = sorted({index // batch_size * batch_size for index in missing})
    return [range(start, min(start + batch_size, num_images)) for start in starts]


@torch.no_grad()
def generate_images(
    pipe: MAETokDiffusionPipeline, indices: Sequence[int], labels: Sequence[int], seed: int, **sampling: Any
) -> torch.Tensor:
    """
    Images of a set by their indices.

    All noise of an image, that of the start and that of the solver's steps, comes from a generator on the CPU keyed by
    `(seed, "sampling", index)`. It does not depend on the batch, the process or the device.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, in evaluation mode.
        indices (`Sequence[int]`): Indices of the images in the set.
        labels (`Sequence[int]`): The class of each.
        seed (`int`): Seed of the set.
        **sampling (`Any`): Further arguments of the pipeline's call: steps and guidance.

    Returns:
        `torch.FloatTensor` of shape `(len(indices), channels, height, width)`: What the decoder gives, images in
            `[-1, 1]` but not clamped, in float32.
    """
    latents = pipe(
        class_labels=[int(label) for label in labels],
        generator=[keyed_generator(seed, "sampling", int(index)) for index in indices],
        output_type="latent",
        **sampling,
    ).images
    # not the pipeline's own images: it maps them to [0, 1] in the decoder's dtype, and bfloat16 has 256 steps there
    raw = denormalize_latents(latents, pipe.vae.config).to(pipe.vae.dtype)
    return pipe.vae.decode(raw, return_dict=False)[0].float()
