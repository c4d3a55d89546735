"""A data loader whose workers write images where the main process reads them, in memory that is allocated once.

torch's loader takes fresh shared memory for every batch, at a page fault for every 4 KiB, and passes each tensor of a
batch by a connection of its own. Together that costs more than a tenth of what it takes to decode and crop the images.
"""

import errno
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .workers import ending_at_exit, outlive_stop_signal


class ImageSlots:
    """
    Shared memory for the images of some batches, lent to whoever uses a batch until nobody does.

    A worker claims a free slot of its own, writes a batch and says which slot it is; the main process takes the batch
    out as a tensor on that memory, and marks the slot as free when the tensor and all its views are gone. Nothing
    waits: a worker whose slots are all lent takes memory of its own.

    Args:
        num_workers (`int`): Data workers.
        per_worker (`int`): Slots of each.
        num_bytes (`int`): Size of the largest batch.

    Raises:
        OSError: If there is not enough shared memory.
    """

    def __init__(self, num_workers: int, per_worker: int, num_bytes: int):
        memory = torch.empty(num_workers, per_worker, num_bytes, dtype=torch.uint8)
        try:
            self.memory = memory.share_memory_()
        except RuntimeError as error:
            raise OSError(
                errno.ENOSPC,
                f"{memory.nbytes / 2**20:.0f} MiB of shared memory for the batches of {num_workers} data workers are "
                f"not to be had ({error}): lower their number or `prefetch_factor`, or enlarge /dev/shm (`docker run` "
                "takes `--shm-size`).",
            ) from error
        self.lent = torch.zeros(num_workers, per_worker, dtype=torch.uint8).share_memory_()

    def claim(self, worker: int, shape: tuple[int, ...]) -> torch.Tensor:
        """
        Args:
            worker (`int`): The worker that calls.
            shape (`tuple[int, ...]`): Shape of its next batch.

        Returns:
            `torch.Tensor`: uint8 of that shape, uninitialized, in a slot if one is free.
        """
        # The lowest free slot, so that no more memory is in use than needs to be.
        for slot, lent in enumerate(self.lent[worker].tolist()):
            if not lent:
                self.lent[worker, slot] = 1
                return self.memory[worker, slot, : torch.Size(shape).numel()].view(shape)
        return torch.empty(shape, dtype=torch.uint8)

    def pack(self, batch: Mapping[str, Any], worker: int) -> dict[str, Any]:
        """
        Args:
            batch (`Mapping[str, Any]`): A batch whose `images` come from `claim`.
            worker (`int`): The worker that calls.

        Returns:
            `dict[str, Any]`: The batch for [`~ImageSlots.unpack`], cheap to send.
        """
        packed = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        images, memory = batch["images"], self.memory[worker]
        slot, offset = divmod(images.data_ptr() - memory.data_ptr(), memory.stride(0))
        in_slot = 0 <= slot < len(memory) and offset == 0
        return packed | {"images": (worker, slot, tuple(images.shape)) if in_slot else images}

    def unpack(self, packed: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            packed (`Mapping[str, Any]`): What `pack` has returned, in the main process.

        Returns:
            `dict[str, Any]`: The batch.
        """
        batch = {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in packed.items()
        }
        if isinstance(batch["images"], tuple):
            worker, slot, shape = batch["images"]
            array = self.memory[worker, slot].numpy()[: torch.Size(shape).numel()].reshape(shape)
            # The storage of the tensor, which its views share, holds on to this very array.
            weakref.finalize(array, self.lent[worker].numpy().__setitem__, slot, 0).atexit = False
            batch["images"] = torch.from_numpy(array)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


class WorkerLoader(torch.utils.data.DataLoader):
    """
    A loader of ready batches, in order, whose data workers outlive a stop signal and end with this process.

    Args:
        dataset (`torch.utils.data.IterableDataset`): Yields the batches.
        num_workers (`int`): Data workers.
        prefetch_factor (`int`, *optional*): Batches that each worker prepares in advance; torch's default is 2.
    """

    def __init__(
        self, dataset: torch.utils.data.IterableDataset, num_workers: int, prefetch_factor: int | None = None
    ):
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            collate_fn=_as_it_is,  # torch's own would make tensors of the arrays in a packed batch
            worker_init_fn=outlive_stop_signal,
            # Only gives workers a base seed, which nothing reads; without it the global generator would be advanced.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with ending_at_exit():
            return super().__iter__()  # starts the workers


class SlotLoader(WorkerLoader):
    """
    A loader for [`StreamingImages`], whose `slots` it sets in the workers.

    Args:
        dataset ([`StreamingImages`]): The data set.
        num_bytes (`int`): Size of the images of the largest batch.
        pin (`bool`): Copy batches to pinned memory. torch's own thread for that is not used: it would see packed
            batches.
        num_workers, prefetch_factor: See [`WorkerLoader`].
    """

    def __init__(
        self,
        dataset: torch.utils.data.IterableDataset,
        *,
        num_bytes: int,
        pin: bool,
        num_workers: int,
        prefetch_factor: int | None = None,
    ):
        super().__init__(dataset, num_workers, prefetch_factor)
        self.num_bytes = num_bytes
        self.pin = pin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.num_workers == 0:
            return self._unpacked(super().__iter__(), None)
        # Besides those that are prepared there are the batch in use, and the one that is just about to replace it.
        slots = ImageSlots(self.num_workers, self.prefetch_factor + 2, self.num_bytes)
        self.dataset.slots = slots
        try:
            batches = super().__iter__()
        finally:
            self.dataset.slots = None
        return self._unpacked(batches, slots)

    def _unpacked(self, batches: Iterator[dict[str, Any]], slots: ImageSlots | None) -> Iterator[dict[str, Any]]:
        pin = self.pin and torch.accelerator.is_available()
        for batch in batches:
            if slots is not None:
                for row, message in batch.pop("problems"):
                    self.dataset.source.warn(row, message)
                batch = slots.unpack(batch)
            if pin:
                # Frees the slot at once. An asynchronous copy to the device must not start from a slot: a worker
                # could write into it as soon as the tensor is gone, before the copy has ended.
                for key, value in batch.items():
                    if isinstance(value, torch.Tensor):
                        batch[key] = value.pin_memory()
            yield batch
