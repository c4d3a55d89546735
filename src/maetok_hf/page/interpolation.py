"""Pictures between two: of two images, or of two classes from the same noise.

Both are straight lines between latents. The transformers take classes as indices, so that there is nothing between two
classes to give them; the latents of two images of the same noise have a middle, which the tokenizer decodes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image

from ..models.latents import normalize_latents
from ..pipelines import MAETokDiffusionPipeline
from .generation import GenerationSettings, decode_latents, sample
from .reconstruction import Upload, encode_upload


MIN_PICTURES, MAX_PICTURES = 3, 16


def weights(num_pictures: int) -> list[float]:
    """
    Weights of the second end.

    Args:
        num_pictures (`int`): Pictures with both ends.

    Returns:
        `list[float]`: From 0 to 1 in equal steps.

    Raises:
        ValueError: If there are too few pictures or too many.
    """
    if isinstance(num_pictures, bool) or not isinstance(num_pictures, int):
        raise ValueError(f"The number of pictures must be a whole number, got {num_pictures!r}.")
    if not MIN_PICTURES <= num_pictures <= MAX_PICTURES:
        raise ValueError(f"The number of pictures must be from {MIN_PICTURES} to {MAX_PICTURES}, got {num_pictures}.")
    return [i / (num_pictures - 1) for i in range(num_pictures)]


def between(first: torch.Tensor, second: torch.Tensor, num_pictures: int) -> torch.Tensor:
    """
    A straight line.

    Args:
        first (`torch.Tensor` of shape `(1, num_tokens, channels)`): One end.
        second (`torch.Tensor` of the shape of `first`): The other.
        num_pictures (`int`): Points on it with both ends.

    Returns:
        `torch.Tensor` of shape `(num_pictures, num_tokens, channels)`: The points.

    Raises:
        ValueError: If there are too few pictures or too many.
    """
    w = torch.tensor(weights(num_pictures), dtype=first.dtype, device=first.device)[:, None, None]
    return (1 - w) * first + w * second


def interpolate_images(
    pipe: MAETokDiffusionPipeline, first: Upload, second: Upload, num_pictures: int
) -> list[Image.Image]:
    """
    From one image to another through the tokenizer's latents.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, whose tokenizer is used.
        first ([`Upload`]): One image.
        second ([`Upload`]): The other.
        num_pictures (`int`): Pictures with both ends, which are reconstructions.

    Returns:
        `list[PIL.Image.Image]`: The pictures.

    Raises:
        ValueError: If there are too few pictures or too many.
    """
    weights(num_pictures)
    ends = [normalize_latents(encode_upload(pipe, upload)[1].float(), pipe.vae.config) for upload in (first, second)]
    return decode_latents(pipe, between(*ends, num_pictures))


def interpolate_classes(
    pipe: MAETokDiffusionPipeline,
    settings: GenerationSettings,
    second_class: int,
    num_pictures: int,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """
    From an image of one class to one of another class that was made of the same noise.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        settings ([`GenerationSettings`]): How both are made; its class is the first one.
        second_class (`int`): The other class.
        num_pictures (`int`): Pictures with both ends.
        on_step (`Callable[[int, int], None]`, *optional*): Called with the evaluations that are done, and all.

    Returns:
        `list[PIL.Image.Image]`: The pictures; the ends are those that [`~maetok_hf.page.generation.sample`] gives.

    Raises:
        ValueError: If the pipeline cannot do what is asked for.
    """
    weights(num_pictures)
    ends = [replace(settings, num_images=1, class_index=index) for index in (settings.class_index, second_class)]
    for end in ends:
        end.check(pipe)

    def report(part: int) -> Callable[[int, int], None]:
        return lambda done, total: on_step(part * total + done, 2 * total) if on_step is not None else None

    latents = [sample(pipe, end, report(part), output_type="latent") for part, end in enumerate(ends)]
    return decode_latents(pipe, between(*latents, num_pictures))
