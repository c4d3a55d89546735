"""Shuffled, resumable micro-batches of images for any number of processes and data workers.

The rows of an epoch are put in an order that is a function of (seed, epoch): chunks of neighbouring rows are permuted,
dealt into blocks of about `block_size` rows, and the rows of each block are permuted. This sequence is cut into
`num_streams` contiguous streams, and the epoch's micro-batch `m` is the next one of stream `m mod num_streams`. A
process takes every `world_size`-th micro-batch and a worker every `num_workers`-th of these. Since nothing else
enters, the micro-batches do not depend on how they are spread over processes, accumulation steps, workers, restarts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..seeding import keyed_generator
from .batches import BatchBuilder, check_integer
from .explain import reading
from .loader import ImageSlots, SlotLoader
from .order import EpochOrder, check_resolutions, epoch_order, resolution_at
from .sources import CorruptImageError, ImageSource, Row, Sample
from .transforms import ImageTransform
from .workers import enter_worker


# Rows tried in the place of one that cannot be used before the data set is given up.
MAX_REPLACEMENT_ATTEMPTS = 1024


class StreamingImages(torch.utils.data.IterableDataset):
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
            block of encoded images in memory, and a restart reads at most one block a stream again.
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
        self.source = source
        self.resolutions = check_resolutions(resolution, resolution_weights)
        self.resolution_weights = resolution_weights
        self.transforms = {size: ImageTransform(size, crop, random_flip) for size in self.resolutions}
        self.batch_size = check_integer("batch_size", batch_size, 1)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"`seed` must be an integer, got {seed!r}.")
        self.seed = seed
        self.shuffle = shuffle
        self.block_size = check_integer("block_size", block_size, 1)
        self.world_size = check_integer("world_size", world_size, 1)
        self.rank = check_integer("rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"`rank` must be below `world_size={world_size}`, got {rank}.")
        self.gradient_accumulation_steps = check_integer("gradient_accumulation_steps", gradient_accumulation_steps, 1)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        readers = world_size * max(1, num_workers)
        self.num_streams = check_integer("num_streams", readers if num_streams is None else num_streams, 1)
        if self.num_streams % readers:
            raise ValueError(
                f"`num_streams={num_streams}` must be a multiple of `world_size * max(1, num_workers)` = {world_size} "
                f"* {max(1, num_workers)} = {readers}: round it up to {-(-num_streams // readers) * readers}, or "
                "change `num_workers`."
            )
        if require_labels and source.columns.label is None:
            raise ValueError(
                f"`require_labels=True`, but no label column of {source.description} is read: name it with "
                "`label_column` in `open_images`."
            )
        self.require_labels = require_labels

        micro_batches_per_step = world_size * gradient_accumulation_steps
        global_batch_size = batch_size * micro_batches_per_step
        self.num_micro_batches = source.num_rows // global_batch_size * micro_batches_per_step  # of all processes
        if self.num_micro_batches == 0:
            raise ValueError(
                f"{source.description} has {source.num_rows} rows, fewer than one global batch of {global_batch_size} "
                f"(`batch_size={batch_size}` * `world_size={world_size}` * "
                f"`gradient_accumulation_steps={gradient_accumulation_steps}`): lower one of the three."
            )
        self.micro_batches_per_epoch = self.num_micro_batches // world_size
        self.num_dropped = source.num_rows - self.num_micro_batches * batch_size
        self.slots: ImageSlots | None = None  # set in the workers of `dataloader`
        self.set_start(start_micro_batch)

    def set_start(self, micro_batch: int) -> None:
        """
        Set where the next iteration starts.

        Args:
            micro_batch (`int`): Micro-batches this process has consumed since the start of the run.

        Raises:
            ValueError: If it is negative or not an integer.
        """
        self.start_micro_batch = check_integer("start_micro_batch", micro_batch, 0)

    def epoch_of(self, micro_batch: int) -> int:
        """The epoch of this process' micro-batch `micro_batch`, counted from the start of the run."""
        return micro_batch // self.micro_batches_per_epoch

    def resolution_of(self, micro_batch: int) -> int:
        """The resolution of this process' micro-batch `micro_batch`, counted from the start of the run."""
        step = micro_batch // self.gradient_accumulation_steps
        return resolution_at(self.seed, step, self.resolutions, self.resolution_weights)

    def dataloader(self, pin_memory: bool = False, prefetch_factor: int | None = None) -> torch.utils.data.DataLoader:
        """
        A loader with this data set's number of workers that yields its micro-batches in order.

        Its workers outlive SIGINT and one SIGTERM, so that a signal to the whole process group leaves this process
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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = enter_worker()
        if num_workers not in (1, self.num_workers):
            raise ValueError(
                f"The loader has {num_workers} workers, but this data set was made for "
                f"`num_workers={self.num_workers}`: use its `dataloader()`."
            )
        number, epoch, order, streams = self.start_micro_batch + worker, None, None, {}
        while True:
            if epoch != self.epoch_of(number):
                epoch = self.epoch_of(number)
                order = epoch_order(self.source, self.seed, epoch, self.block_size, self.shuffle)
                streams = {}
            micro_batch = self.rank + number % self.micro_batches_per_epoch * self.world_size
            stream, turn = micro_batch % self.num_streams, micro_batch // self.num_streams
            share, extra = divmod(self.num_micro_batches, self.num_streams)
            if stream not in streams:
                streams[stream] = _Stream(self, order, epoch)
            start = (stream * share + min(stream, extra) + turn) * self.batch_size
            resolution = self.resolution_of(number)
            shape = (self.batch_size, 3, resolution, resolution)
            images = torch.empty(shape, dtype=torch.uint8) if self.slots is None else self.slots.claim(worker, shape)
            with reading(self.source.description):
                batch = streams[stream].micro_batch(start, self.transforms[resolution], images)
            problems = batch.pop("problems")
            if self.slots is None:
                for row, message in problems:
                    self.source.warn(row, message)
                yield batch
            else:
                yield self.slots.pack(batch, worker) | {"problems": problems}
            if turn + 1 == share + (stream < extra):
                del streams[stream]  # with its block
            number += num_workers


class _Stream:
    """One stream of one epoch: its current block and what is made of it."""

    def __init__(self, images: StreamingImages, order: EpochOrder, epoch: int):
        self.images = images
        self.order = order
        self.epoch = epoch
        self.block = -1
        self.rows: list[Row] = []
        self.indices: list[int] = []

    def read_block(self, block: int) -> tuple[list[Row], list[int]]:
        """Raw rows of a block and their positions in the data set, in the order of this epoch."""
        source, rows, indices = self.images.source, [], []
        for chunk in self.order.chunks[self.order.block_chunks[block] : self.order.block_chunks[block + 1]].tolist():
            start = int(source.chunk_starts[chunk])
            rows += source.read_chunk(chunk)
            indices += range(start, start + int(source.chunk_sizes[chunk]))
        if self.images.shuffle:
            generator = keyed_generator(self.images.seed, "rows", self.epoch, block)
            permutation = torch.randperm(len(rows), generator=generator).tolist()
            rows, indices = [rows[i] for i in permutation], [indices[i] for i in permutation]
        return rows, indices

    def micro_batch(self, start: int, transform: ImageTransform, pixels: torch.Tensor) -> dict[str, Any]:
        """The samples at positions `start`, `start + 1`, ... of the epoch's rows, their images put into `pixels`."""
        images, replaced, problems = self.images, [], []
        builder = BatchBuilder(transform, images.source.columns, pixels)
        for position in range(start, start + images.batch_size):
            block = self.order.block_of(position)
            if block != self.block:
                self.block, (self.rows, self.indices) = block, self.read_block(block)
            offset = position - int(self.order.block_rows[self.block])
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
