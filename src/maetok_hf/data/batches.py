"""What the loaders share: batches of 8-bit images."""

from typing import Any

import torch

from .columns import ImageColumns
from .counts import count_names
from .sources import Sample
from .transforms import ImageTransform, size_names


def check_integer(name: str, value: Any, minimum: int) -> int:
    """
    Raises:
        ValueError: If `value` is not an integer of at least `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    return value


class BatchBuilder:
    """
    Samples on their way into a batch.

    Args:
        transform ([`ImageTransform`]): The crop.
        columns ([`ImageColumns`]): What is read besides images.
        images (`torch.Tensor`): Where the images are put, uint8 of shape `(batch_size, 3, resolution, resolution)`.
    """

    def __init__(self, transform: ImageTransform, columns: ImageColumns, images: torch.Tensor):
        self.transform = transform
        self.columns = columns
        self.images = images
        self.labels: list[int] = []
        self.captions: list[str | None] = []
        self.indices: list[int] = []
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.indices)

    def add(self, sample: Sample, index: int, generator: torch.Generator | None = None) -> None:
        """
        Crop an image and add it.

        Args:
            sample ([`Sample`]): The decoded row.
            index (`int`): Its position in the data set.
            generator (`torch.Generator`, *optional*): Source of the crop and the flip, if they are random.
        """
        self.transform.write(sample.image, self.images[len(self)], generator)
        self.labels.append(sample.label)
        self.captions.append(sample.caption)
        self.indices.append(index)
        self.names += sample.names + size_names(sample.image.size, self.transform.resolution)

    def batch(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: `images`, `class_labels` and `captions` where they are read, `indices` and `counts`.
        """
        batch: dict[str, Any] = {"images": self.images[: len(self)]}
        if self.columns.label is not None:
            batch["class_labels"] = torch.tensor(self.labels, dtype=torch.int64)
        if self.columns.caption is not None:
            batch["captions"] = self.captions
        return batch | {"indices": torch.tensor(self.indices, dtype=torch.int64), "counts": count_names(self.names)}
