"""Held-out images in their own order, for validation and evaluation."""

import logging
from collections.abc import Iterator
from typing import Any

import torch

from .sources import CorruptImageError, ImageSource
from .streaming import check_integer
from .transforms import ImageTransform


logger = logging.getLogger(__name__)


class HeldOutImages(torch.utils.data.IterableDataset):
    """
    The first rows of a data set, in order, cropped at the centre, in batches.

    Process `rank` yields the batches `rank`, `rank + world_size`, ...; data workers share these in the same way, so a
    `DataLoader(batch_size=None)` yields them in order. Each batch is a dict with `pixel_values` (float32 in `[-1, 1]`,
    of shape `(n, 3, resolution, resolution)`), `class_labels` (int64, -1 for a missing label; absent without a label
    column) and `indices` (int64, the position in the data set). `n` is `batch_size`, less in the last batch and where
    a corrupt image is left out, which is logged.

    Args:
        source ([`ImageSource`]): The data set, from [`open_images`].
        resolution (`int`): Height and width in pixels.
        batch_size (`int`): Rows of a batch.
        num_samples (`int`, *optional*): Number of rows, by default all.
        rank (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.

    Raises:
        ValueError: If an argument is out of range, or `num_samples` exceeds the rows of the data set.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        resolution: int,
        batch_size: int,
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not isinstance(source, ImageSource):
            raise ValueError(f"`source` must be an `ImageSource`, got {type(source)}: make one with `open_images`.")
        self.source = source
        self.transform = ImageTransform(resolution)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.num_samples = check_integer("num_samples", source.num_rows if num_samples is None else num_samples, 1)
        if self.num_samples > source.num_rows:
            raise ValueError(
                f"`num_samples={num_samples}` exceeds the {source.num_rows} rows of {source.description}."
            )
        self.world_size = check_integer("world_size", world_size, 1)
        self.rank = check_integer("rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"`rank` must be below `world_size={world_size}`, got {rank}.")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        chunk, rows = -1, []
        first = (self.rank + worker * self.world_size) * self.batch_size
        for start in range(first, self.num_samples, num_workers * self.world_size * self.batch_size):
            samples = []
            for index in range(start, min(start + self.batch_size, self.num_samples)):
                if not rows or not 0 <= index - self.source.chunk_starts[chunk] < len(rows):
                    chunk = int(self.source.chunk_starts.searchsorted(index, side="right")) - 1
                    rows = self.source.read_chunk(chunk)
                try:
                    image, label = self.source.decode(rows[index - int(self.source.chunk_starts[chunk])])
                except CorruptImageError as error:
                    logger.warning("Row %d of %s is left out: %s", index, self.source.description, error)
                    continue
                samples.append((self.transform(image), label, index))
            if samples:
                yield self._collate(samples)

    def _collate(self, samples: list[tuple[torch.Tensor, int, int]]) -> dict[str, torch.Tensor]:
        pixel_values, labels, indices = zip(*samples, strict=True)
        batch = {"pixel_values": torch.stack(pixel_values)}
        if self.source.columns.label is not None:
            batch["class_labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch | {"indices": torch.tensor(indices, dtype=torch.int64)}

    def stacked(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, torch.Tensor]`: All batches of this process as one, in memory.

        Raises:
            ValueError: If there is none: every image is corrupt, or this process has no share.
        """
        batches = list(self)
        if not batches:
            raise ValueError(f"{self.source.description} has no usable image for process {self.rank}.")
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
