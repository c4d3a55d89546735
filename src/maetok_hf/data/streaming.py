"""Shuffled, resumable micro-batches of images for any number of processes and data workers."""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..seeding import keyed_generator
from .batches import BatchBuilder
from .explain import reading
from .loader import ImageSlots, SlotLoader
from .micro_batches import EpochStream, MicroBatches
from .order import EpochOrder, check_resolutions, resolution_at
from .sources import CorruptImageError, ImageSource, Row, Sample
from .transforms import ImageTransform


logger = logging.getLogger(__name__)

# Rows tried in the place of one that cannot be used before the data set is given up.
MAX_REPLACEMENT_ATTEMPTS = 1024


@functools.cache  # once, however many loaders a source has
def _say_how_restarts_read(description: str) -> None:
    logger.info(
        "The shards of %s can only be read from their beginning: a run that continues within one reads, without "
        "decoding, what lies before. Parquet or uncompressed tar files are read at any place.",
        description,
    )


class StreamingImages(MicroBatches):
    """
    Endless, resumable stream of micro-batches of images; the loader of a training loop.

    Iterating yields this process' micro-batches from number `start_micro_batch` on, epoch after epoch. Each is a dict:

    - `images` (`torch.Tensor`): uint8 of shape `(batch_size, 3, resolution, resolution)`; [`to_pixel_values`] makes
      floats in `[-1, 1]` of them, on the device.
    - `class_labels` (`torch.Tensor`): int64 of shape `(batch_size,)`, -1 for a missing label; absent if the source has
      no label column.
    - `captions` (`list[str | None]`): `None` for a missing caption; absent if the source has no caption column.
    - `indices` (`torch.Tensor`): int64 of shape `(batch_size,)`, the position of each sample in the data set. Together
      with `epoch` it keys every further draw for the sample (mask, noise).
    - `replaced` (`torch.Tensor`): bool of shape `(batch_size,)`, `True` where a row could not be used (a corrupt
      image, or no label although `require_labels`) and another row of the same block stands in for it.
    - `counts` (`torch.Tensor`): int64 of shape `(len(COUNT_NAMES),)`, how often which peculiarity of the rows was
      dealt with; sum it over batches and processes and log it by [`describe_counts`].
    - `epoch` (`int`): The epoch, from 0.

    Use it through [`~StreamingImages.dataloader`], and do not let `accelerate` prepare that loader: it is sharded
    already. An epoch consists of whole global batches, so every process takes the same number of steps; the
    `num_dropped` rows left over (others in every epoch) are fewer than one global batch.

    With several resolutions, all images of an optimizer step have the one that [`resolution_at`] draws for the step;
    the samples, their order, crops and flips are the same as with one.

    The micro-batches are a function of `source`, `seed`, `batch_size`, `num_streams`, `block_size` and the global
    batch size. Keep `num_streams` fixed, at a common multiple of `world_size * num_workers`, to get the same run on
    another number of processes or workers.

    Args:
        source ([`ImageSource`]): The data set, from [`open_images`].
        resolution (`int` or `Sequence[int]`): Height and width in pixels; of several, one is drawn for every step.
        batch_size (`int`): Images of a micro-batch (per process and accumulation step).
        seed (`int`): Seed of the order, the crops and the flips.
        crop (`str`, *optional*, defaults to `"center"`): See [`ImageTransform`].
        random_flip (`bool`, *optional*, defaults to `True`): See [`ImageTransform`].
        shuffle (`bool`, *optional*, defaults to `True`): `False` keeps the order of the data set.
        block_size (`int`, *optional*, defaults to 1024): Rows that are shuffled together. Each stream holds one
            block of encoded images in memory, and a restart reads at most one block a stream again, and what lies
            before it in its shards where these can only be read from their beginning (compressed tar files, arrow
            files, an `IterableDataset`).
        rank (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): Micro-batches a process takes per step.
        num_workers (`int`, *optional*, defaults to 0): Data workers of this process.
        num_streams (`int`, *optional*): Number of streams, a multiple of `world_size * max(1, num_workers)`, which is
            the default.
        start_micro_batch (`int`, *optional*, defaults to 0): Micro-batches this process has consumed since the start
            of the run: its optimizer steps times `gradient_accumulation_steps`.
        require_labels (`bool`, *optional*, defaults to `False`): Whether every sample needs a valid class.
        resolution_weights (`Sequence[float]`, *optional*): Relative frequency of each resolution; by default all are
            equally frequent.

    Attributes:
        resolutions (`tuple[int, ...]`): The resolutions.
        micro_batches_per_epoch (`int`): Micro-batches of this process in an epoch.
        num_dropped (`int`): Rows that an epoch leaves out.

    Raises:
        ValueError: If an argument is out of range, if `num_streams` does not fit, if the data set is smaller than one
            global batch, or if labels are required and there is no label column.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        resolution: int | Sequence[int],
        batch_size: int,
        seed: int,
        crop: str = "center",
        random_flip: bool = True,
        shuffle: bool = True,
        block_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        num_workers: int = 0,
        num_streams: int | None = None,
        start_micro_batch: int = 0,
        require_labels: bool = False,
        resolution_weights: Sequence[float] | None = None,
    ):
        if not isinstance(source, ImageSource):
            raise ValueError(f"`source` must be an `ImageSource`, got {type(source)}: make one with `open_images`.")
        self.resolutions = check_resolutions(resolution, resolution_weights)
        self.resolution_weights = resolution_weights
        self.transforms = {size: ImageTransform(size, crop, random_flip) for size in self.resolutions}
        super().__init__(
            source,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            block_size=block_size,
            rank=rank,
            world_size=world_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_workers=num_workers,
            num_streams=num_streams,
            start_micro_batch=start_micro_batch,
        )
        if require_labels and source.columns.label is None:
            raise ValueError(
                f"`require_labels=True`, but no label column of {source.description} is read: name it with "
                "`label_column` in `open_images`."
            )
        if source.sequential:
            _say_how_restarts_read(source.description)
        self.require_labels = require_labels
        self.slots: ImageSlots | None = None  # set in the workers of `dataloader`

    def resolution_of(self, micro_batch: int) -> int:
        """The resolution of this process' micro-batch `micro_batch`, counted from the start of the run."""
        step = micro_batch // self.gradient_accumulation_steps
        return resolution_at(self.seed, step, self.resolutions, self.resolution_weights)

    def dataloader(self, pin_memory: bool = False, prefetch_factor: int | None = None) -> torch.utils.data.DataLoader:
        """
        A loader with this data set's number of workers that yields its micro-batches in order.

        Its workers outlive SIGINT and SIGTERM, so that a signal to the whole process group leaves this process
        the batches it needs to finish its step and save; they end when this process ends. Rows that cannot be used
        are reported by this process, each once, whichever loader of the source meets it how often.

        Args:
            pin_memory (`bool`, *optional*, defaults to `False`): Copy batches to pinned memory, for faster transfer to
                a GPU.
            prefetch_factor (`int`, *optional*): Micro-batches that each worker prepares in advance; torch's default
                is 2.

        Returns:
            `torch.utils.data.DataLoader`: The loader. Its iterator is endless.
        """
        return SlotLoader(
            self,
            num_bytes=self.batch_size * 3 * max(self.resolutions) ** 2,
            pin=pin_memory,
            num_workers=self.num_workers,
            prefetch_factor=prefetch_factor,
        )

    def open_stream(self, order: EpochOrder, epoch: int) -> "_ImageStream":
        return _ImageStream(self, order, epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for worker, number, stream, start in self.walk():
            resolution = self.resolution_of(number)
            shape = (self.batch_size, 3, resolution, resolution)
            images = torch.empty(shape, dtype=torch.uint8) if self.slots is None else self.slots.claim(worker, shape)
            with reading(self.source.description):
                batch = stream.micro_batch(start, self.transforms[resolution], images)
            problems = batch.pop("problems")
            if self.slots is None:
                for row, message in problems:
                    self.source.warn(row, message)
                yield batch
            else:
                yield self.slots.pack(batch, worker) | {"problems": problems}


class _ImageStream(EpochStream):
    """One stream of images."""

    def __init__(self, images: StreamingImages, order: EpochOrder, epoch: int):
        super().__init__(images, order, epoch)
        self.images = images
        self.rows: list[Row] = []
        self.indices: list[int] = []

    def read_block(self, block: int) -> tuple[list[Row], list[int]]:
        """Raw rows of a block and their positions in the data set, in the order of this epoch."""
        source, rows, indices = self.images.source, [], []
        for chunk in self.chunks_of(block):
            start = int(source.chunk_starts[chunk])
            rows += source.read_chunk(chunk)
            indices += range(start, start + int(source.chunk_sizes[chunk]))
        permutation = self.row_order(block).tolist()
        return [rows[i] for i in permutation], [indices[i] for i in permutation]

    def load(self, block: int) -> None:
        self.rows, self.indices = self.read_block(block)

    def micro_batch(self, start: int, transform: ImageTransform, pixels: torch.Tensor) -> dict[str, Any]:
        """The samples at positions `start`, `start + 1`, ... of the epoch's rows, their images put into `pixels`."""
        images, replaced, problems = self.images, [], []
        builder = BatchBuilder(transform, images.source.columns, pixels)
        for position in range(start, start + images.batch_size):
            offset = self.offset_of(position)
            index = self.indices[offset]
            sample, name, problem = self.usable(offset)
            builder.add(sample, index, keyed_generator(images.seed, "augment", self.epoch, index))
            replaced.append(name is not None)
            if name is not None:
                builder.names.append(name)
                problems.append((index, problem))
        return builder.batch() | {
            "replaced": torch.tensor(replaced, dtype=torch.bool),
            "epoch": self.epoch,
            "problems": problems,
        }

    def candidates(self, offset: int) -> Iterator[tuple[Row, int]]:
        """The row at `offset` of the current block, the rows after it (round the block), then the next blocks."""
        for i in range(len(self.rows)):
            at = (offset + i) % len(self.rows)
            yield self.rows[at], self.indices[at]
        for i in range(1, self.order.num_blocks):
            yield from zip(*self.read_block((self.block + i) % self.order.num_blocks), strict=True)

    def usable(self, offset: int) -> tuple[Sample, str | None, str | None]:
        """The row at `offset`, or the first good row after it with the count name and a message for the former."""
        source, index, problem, name = self.images.source, self.indices[offset], None, None
        for attempt, (row, candidate) in enumerate(self.candidates(offset)):
            if attempt == MAX_REPLACEMENT_ATTEMPTS:
                break
            try:
                sample = source.decode(row)
            except CorruptImageError as error:
                problem, name = problem or error, name or "corrupt"
                continue
            if sample.label < 0 and self.images.require_labels:
                problem, name = problem or ValueError(f"its label is {row.label!r}"), name or "unlabeled"
                continue
            if problem is None:
                return sample, None, None
            message = (
                f"Row {index} of {source.description} cannot be used ({problem}); row {candidate} stands in for it in "
                f"epoch {self.epoch}."
            )
            return sample, name, message
        raise ValueError(
            f"No usable row was found in {source.description} at and after row {index}. The first problem was: "
            f"{problem}. Check `image_column` and `label_column`, and whether the split has labels."
        ) from problem
