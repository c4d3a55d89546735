"""The images of a study, in memory: a few thousand small ones."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from ..data import ImageRanges, open_images


BATCH_SIZE = 256


@dataclass(frozen=True, eq=False)
class Split:
    """
    Images with their classes.

    Args:
        images (`torch.ByteTensor` of shape `(n, 3, resolution, resolution)`): In `[0, 255]`.
        labels (`torch.LongTensor` of shape `(n,)`): Classes.
        num_classes (`int`): How many there are.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> list[int]:
        """`list[int]`: Images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()


def load_split(folder: Path, split: str, resolution: int) -> Split:
    """
    Read a split, with the crop of the training scripts.

    Args:
        folder (`Path`): The data set.
        split (`str`): The split.
        resolution (`int`): Side of the images.

    Returns:
        [`Split`]: All its images.

    Raises:
        ValueError: If one cannot be read, or they have no classes.
    """
    source = open_images(str(folder), split=split)
    if source.num_classes is None:
        raise ValueError(f"{folder} says no number of classes: give it a `ClassLabel` column.")
    everything = [range(source.num_rows)]
    images, labels = [], []
    for batch in ImageRanges(source, resolution=resolution, batch_size=BATCH_SIZE, ranges=everything).dataloader():
        if batch["left_out"]:
            raise ValueError(
                f"Row {batch['left_out'][0]} of split {split!r} in {folder} cannot be read: make it again."
            )
        images.append(batch["images"].clone())
        labels.append(batch["class_labels"])
    return Split(torch.cat(images), torch.cat(labels), source.num_classes)


def proportional_labels(counts: list[int], num_images: int) -> list[int]:
    """
    Classes for generated images, of which each has its share among the real ones in every beginning of the list, to
    within one image: so neither a set nor its first part differs from the real one in its classes.

    Args:
        counts (`list[int]`): Real images of each class.
        num_images (`int`): How many classes to give.

    Returns:
        `list[int]`: The class of each image; the classes in turn if all have equally many.
    """
    total, given, labels = sum(counts), [0] * len(counts), []
    for number in range(1, num_images + 1):
        # The quota method of Balinski and Young: of the classes that do not have their share yet, the one that is the
        # first to lack a whole image. The one that lacks most would leave rare classes behind by more than an image.
        lacking = [label for label, count in enumerate(counts) if total * given[label] < number * count]
        label = min(lacking, key=lambda label: Fraction(given[label] + 1, counts[label]))
        given[label] += 1
        labels.append(label)
    return labels
