"""Held-out images in their own order, for validation and evaluation."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .batches import BatchBuilder, check_integer
from .counts import count_names
from .explain import reading
from .loader import WorkerLoader
from .sources import CorruptImageError, ImageSource, Row
from .transforms import ImageTransform
from .workers import enter_worker


class HeldOutImages(torch.utils.data.IterableDataset):
    """
    The first rows of a data set, in order, cropped at the centre, in batches.

    Process `rank` yields the batches `rank`, `rank + world_size`, ...; data workers share these in the same way, so
    [`~HeldOutImages.dataloader`] yields them in order. Each batch is a dict with `images` (uint8, of shape
    `(n, 3, resolution, resolution)`, see [`to_pixel_values`]), `class_labels` (int64, -1 for a missing label; absent
    without a label column), `captions` (`list[str | None]`; absent without a caption column), `indices` (int64, the
    position in the data set) and `counts` (int64, see [`describe_counts`]). `n` is `batch_size`, less in the last
    batch and where a corrupt image is left out, which is counted and logged.

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

    def dataloader(self, num_workers: int = 0) -> torch.utils.data.DataLoader:
        """
        A loader that yields the batches in order.

        Its workers outlive SIGINT and SIGTERM, like those of [`StreamingImages`].

        Args:
            num_workers (`int`, *optional*, defaults to 0): Data workers of this process.

        Returns:
            `torch.utils.data.DataLoader`: The loader.
        """
        return WorkerLoader(self, num_workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = enter_worker()
        first = (self.rank + worker * self.world_size) * self.batch_size
        resolution, chunk, rows, names, batch = self.transform.resolution, -1, [], [], None
        for start in range(first, self.num_samples, num_workers * self.world_size * self.batch_size):
            images = torch.empty(self.batch_size, 3, resolution, resolution, dtype=torch.uint8)
            builder = BatchBuilder(self.transform, self.source.columns, images)
            builder.names += names
            with reading(self.source.description):
                for index in range(start, min(start + self.batch_size, self.num_samples)):
                    if not rows or not 0 <= index - self.source.chunk_starts[chunk] < len(rows):
                        chunk = int(self.source.chunk_starts.searchsorted(index, side="right")) - 1
                        rows = self.source.read_chunk(chunk)
                    self._add(builder, rows[index - int(self.source.chunk_starts[chunk])], index)
            # What is said of a batch that is left out whole is said with the next, or with the last there is.
            names = [] if len(builder) else builder.names
            if len(builder):
                if batch is not None:
                    yield batch
                batch = builder.batch()
        if batch is not None:
            batch["counts"] += count_names(names)
            yield batch

    def _add(self, builder: BatchBuilder, row: Row, index: int) -> None:
        try:
            builder.add(self.source.decode(row), index)
        except CorruptImageError as error:
            builder.names.append("corrupt")
            self.source.warn(index, f"Row {index} of {self.source.description} is left out: {error}")

    def stacked(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: All batches of this process as one, in memory.

        Raises:
            ValueError: If there is none: every image is corrupt, or this process has no share.
        """
        batches = list(self)
        if not batches:
            raise ValueError(f"{self.source.description} has no usable image for process {self.rank}.")
        stacked: dict[str, Any] = {}
        for key in batches[0]:
            values = [batch[key] for batch in batches]
            if key == "counts":
                stacked[key] = torch.stack(values).sum(0)
            elif key == "captions":
                stacked[key] = list(itertools.chain(*values))
            else:
                stacked[key] = torch.cat(values)
        return stacked
