"""Which rows make up which micro-batch, for any number of processes and data workers.

The rows of an epoch are put in an order that is a function of (seed, epoch): chunks of neighbouring rows are permuted,
dealt into blocks of about `block_size` rows, and the rows of each block are permuted. This sequence is cut into
`num_streams` contiguous streams, and the epoch's micro-batch `m` is the next one of stream `m mod num_streams`. A
process takes every `world_size`-th micro-batch and a worker every `num_workers`-th of these. Since nothing else
enters, the micro-batches do not depend on how they are spread over processes, accumulation steps, workers, restarts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..seeding import keyed_generator
from .batches import check_integer
from .order import EpochOrder, epoch_order
from .workers import enter_worker


class MicroBatches(torch.utils.data.IterableDataset):
    """
    What [`StreamingImages`] and [`StreamingLatents`] share: the order of rows, its parts, and where a run continues.

    Args:
        source (`ImageSource` or `LatentSource`): The data set: rows by chunk.
        batch_size, seed, shuffle, block_size: See [`StreamingImages`].
        rank, world_size, gradient_accumulation_steps, num_workers, num_streams: See [`StreamingImages`].
        start_micro_batch: See [`StreamingImages`].

    Raises:
        ValueError: If an argument is out of range, if `num_streams` does not fit, or if the data set is smaller than
            one global batch.
    """

    def __init__(
        self,
        source: Any,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        block_size: int,
        rank: int,
        world_size: int,
        gradient_accumulation_steps: int,
        num_workers: int,
        num_streams: int | None,
        start_micro_batch: int,
    ):
        self.source = source
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

    def open_stream(self, order: EpochOrder, epoch: int) -> "EpochStream":
        """
        Args:
            order ([`EpochOrder`]): The order of the epoch.
            epoch (`int`): The epoch.

        Returns:
            [`EpochStream`]: One stream of it, at no particular place.
        """
        raise NotImplementedError

    def walk(self) -> Iterator[tuple[int, int, "EpochStream", int]]:
        """
        Yields:
            `tuple`: For each micro-batch of this worker: number of the worker, number of the micro-batch in this
            process' run, its stream, and the position of its first row in the epoch.
        """
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
                streams[stream] = self.open_stream(order, epoch)
            yield worker, number, streams[stream], (stream * share + min(stream, extra) + turn) * self.batch_size
            if turn + 1 == share + (stream < extra):
                del streams[stream]  # with its block
            number += num_workers


class EpochStream:
    """
    One stream of one epoch, with its current block in memory.

    Args:
        data ([`MicroBatches`]): The data set.
        order ([`EpochOrder`]): The order of the epoch.
        epoch (`int`): The epoch.
    """

    def __init__(self, data: MicroBatches, order: EpochOrder, epoch: int):
        self.data = data
        self.order = order
        self.epoch = epoch
        self.block = -1

    def load(self, block: int) -> None:
        """Make a block the current one."""
        raise NotImplementedError

    def offset_of(self, position: int) -> int:
        """Where in its block a position of the epoch's rows is; the block becomes the current one."""
        block = self.order.block_of(position)
        if block != self.block:
            self.load(block)
            self.block = block
        return position - int(self.order.block_rows[block])

    def chunks_of(self, block: int) -> list[int]:
        """The chunks of a block."""
        return self.order.chunks[self.order.block_chunks[block] : self.order.block_chunks[block + 1]].tolist()

    def row_order(self, block: int) -> np.ndarray:
        """The places, in the chunks one after the other, that the rows of a block come from."""
        num_rows = int(self.order.block_rows[block + 1] - self.order.block_rows[block])
        if not self.data.shuffle:
            return np.arange(num_rows)
        return torch.randperm(num_rows, generator=keyed_generator(self.data.seed, "rows", self.epoch, block)).numpy()
