"""The images of given rows, in order and in batches that depend on nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .batches import BatchBuilder, check_integer
from .explain import reading
from .loader import WorkerLoader
from .sources import CorruptImageError, ImageSource
from .transforms import ImageTransform
from .workers import enter_worker


class ImageRanges(torch.utils.data.IterableDataset):
    """
    Ranges of consecutive rows, one after the other, cropped at the centre, in batches that never cross a range.

    Each batch is a dict with `images` (uint8, of shape `(n, 3, resolution, resolution)`, see [`to_pixel_values`]),
    `class_labels` (int64, -1 for a missing label; absent without a label column), `indices` (int64, the position in
    the data set), `counts` (int64, see [`describe_counts`]), `left_out` (`list[int]`, the rows of the batch without a
    usable image) and `range` (`int`, the number of its range). `n` is `batch_size`, less at the end of a range and
    where rows are left out; it may be 0.

    Args:
        source ([`ImageSource`]): The data set, from [`open_images`].
        resolution (`int`): Height and width in pixels.
        batch_size (`int`): Rows of a batch.
        ranges (`Sequence[range]`): The rows.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, source: ImageSource, *, resolution: int, batch_size: int, ranges: Sequence[range]):
        self.source = source
        self.transform = ImageTransform(resolution)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.ranges = list(ranges)
        if any(not 0 <= rows.start < rows.stop <= source.num_rows for rows in self.ranges):
            raise ValueError(f"`ranges` must lie in the {source.num_rows} rows of {source.description}, got {ranges}.")

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
        batches = [
            (number, rows[start : start + self.batch_size])
            for number, rows in enumerate(self.ranges)
            for start in range(0, len(rows), self.batch_size)
        ]
        source, resolution, chunk, chunk_rows = self.source, self.transform.resolution, -1, []
        for number, indices in batches[worker::num_workers]:
            images = torch.empty(self.batch_size, 3, resolution, resolution, dtype=torch.uint8)
            builder, left_out = BatchBuilder(self.transform, source.columns, images), []
            with reading(source.description):
                for index in indices:
                    if not chunk_rows or not 0 <= index - source.chunk_starts[chunk] < len(chunk_rows):
                        chunk = int(source.chunk_starts.searchsorted(index, side="right")) - 1
                        chunk_rows = source.read_chunk(chunk)
                    try:
                        builder.add(source.decode(chunk_rows[index - int(source.chunk_starts[chunk])]), index)
                    except CorruptImageError as error:
                        builder.names.append("corrupt")
                        left_out.append(index)
                        source.warn(index, f"Row {index} of {source.description} is left out: {error}")
            yield builder.batch() | {"left_out": left_out, "range": number}
