"""Latents and classes of a data set, in memory or in a file."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch


@torch.no_grad()
def collect_latents(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    file: str | Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Encode images with any tokenizer.

    Args:
        batches (`Iterable[tuple[torch.Tensor, torch.Tensor]]`): Pairs of images, as `encode` takes them, and integer
            classes of shape `(batch_size,)`.
        encode (`Callable[[torch.Tensor], torch.Tensor]`): Gives the latents of a batch, of shape `(batch_size, ...)`.
            Model, device and normalisation are its business.
        file (`str` or `Path`, *optional*): Where to write the latents, for data sets that do not fit into memory. The
            result is then mapped from this file, and writing to it does not change the file.

    Returns:
        `tuple`: Latents of shape `(num_images, ...)` in float32 and classes of shape `(num_images,)` in int64, both on
            the CPU and in the order of `batches`.

    Raises:
        ValueError: If there is no batch, a batch has not one latent for each class, or batches differ in the shape of
            their latents.
    """
    parts, labels, shape = [], [], None
    stream = None if file is None else open(file, "wb")
    try:
        for images, classes in batches:
            latents = encode(images).detach().to("cpu", torch.float32)
            if len(latents) != len(classes):
                raise ValueError(f"`encode` gave {len(latents)} latents for a batch of {len(classes)} classes.")
            if latents.shape[1:] != (shape or latents.shape[1:]):
                raise ValueError(
                    f"`encode` gave latents of shape {tuple(latents.shape[1:])} after others of {tuple(shape)}: crop "
                    "the images to one size."
                )
            shape = latents.shape[1:]
            labels.append(classes.to("cpu", torch.int64))
            if stream is None:
                parts.append(latents)
            else:
                stream.write(latents.contiguous().numpy().tobytes())
    finally:
        if stream is not None:
            stream.close()
    if not labels:
        raise ValueError("`batches` gave no batch, so there are no latents.")
    classes = torch.cat(labels)
    if file is None:
        return torch.cat(parts), classes
    latents = torch.from_file(str(file), shared=False, size=len(classes) * shape.numel(), dtype=torch.float32)
    return latents.view(len(classes), *shape), classes
