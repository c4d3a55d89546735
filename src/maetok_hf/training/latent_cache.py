"""Latents of a whole data set on disk, encoded once, and their keyed order."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..seeding import keyed_generator


class LatentCache:
    """
    Normalised latents of every usable image of a data set, and of its mirror images if the training flips.

    Made by [`~LatentCache.allocate`], [`~LatentCache.fill`] and [`~LatentCache.complete`]. The arrays are
    memory-mapped, so the processes of a machine share one copy.

    Args:
        folder (`str` or `Path`): The cache.

    Attributes:
        num_images (`int`): Images.
        num_views (`int`): 1, or 2 with the mirror images.

    Raises:
        ValueError: If no image has a valid class.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self._latents = np.load(folder / "latents.npy", mmap_mode="r")  # (views, rows, L, C)
        self._labels = torch.from_numpy(np.load(folder / "labels.npy"))  # (rows,), -1: not usable
        self._rows = torch.nonzero(self._labels >= 0).flatten()
        self.num_views, self.num_images = self._latents.shape[0], len(self._rows)
        if self.num_images == 0:
            raise ValueError(f"The cache {folder} holds no image with a valid class.")

    @staticmethod
    def is_complete(folder: str | Path, identity: Mapping[str, Any]) -> bool:
        """Whether a folder holds the cache of this identity (data set, tokenizer, crop)."""
        path = Path(folder) / "identity.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(identity))

    @staticmethod
    def allocate(folder: str | Path, num_rows: int, num_views: int, shape: tuple[int, int]) -> None:
        """
        Make the files of a new cache under a temporary name; one process calls this, before [`~LatentCache.fill`].

        Args:
            folder (`str` or `Path`): The cache.
            num_rows (`int`): Rows of the data set.
            num_views (`int`): 1, or 2 with the mirror images.
            shape (`tuple[int, int]`): Tokens and channels of a latent.

        Raises:
            OSError: If there is no room for it.
        """
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        latents = np.lib.format.open_memmap(
            partial / "latents.npy", mode="w+", dtype=np.float32, shape=(num_views, num_rows, *shape)
        )
        needed, free = latents.nbytes, shutil.disk_usage(partial).free
        del latents
        # The file is sparse: a disk that runs full later would end the process with a bus error and no message.
        if needed > free:
            shutil.rmtree(partial)
            raise OSError(
                f"The latents need {needed / 2**30:.1f} GiB and {partial.parent} has {free / 2**30:.1f} GiB: make "
                "room, or train without `cache_latents`."
            )
        labels = np.lib.format.open_memmap(partial / "labels.npy", mode="w+", dtype=np.int64, shape=(num_rows,))
        labels[:] = -1

    @staticmethod
    def fill(
        folder: str | Path,
        batches: Iterable[Mapping[str, torch.Tensor]],
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """
        Encode this process's share of the images.

        Args:
            folder (`str` or `Path`): The cache.
            batches (`Iterable[Mapping[str, torch.Tensor]]`): Batches of [`~maetok_hf.data.HeldOutImages`], with
                `images` (uint8), `class_labels` and `indices`.
            encode (`Callable[[torch.Tensor], torch.Tensor]`): 8-bit images to normalised latents.
        """
        latents = np.load(_partial(folder) / "latents.npy", mmap_mode="r+")
        labels = np.load(_partial(folder) / "labels.npy", mmap_mode="r+")
        for batch in batches:
            rows, images = batch["indices"].numpy(), batch["images"]
            for view in range(latents.shape[0]):
                encoded = encode(images if view == 0 else images.flip(-1))
                latents[view, rows] = encoded.float().cpu().numpy()
            labels[rows] = batch["class_labels"].numpy()
        latents.flush()
        labels.flush()

    @staticmethod
    def complete(folder: str | Path, identity: Mapping[str, Any]) -> None:
        """Give the filled cache its name; one process calls this once all have filled their share."""
        partial = _partial(folder)
        (partial / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)

    def micro_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        gradient_accumulation_steps: int,
        start_micro_batch: int,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """
        Endless micro-batches of this process, in an order keyed by (seed, epoch).

        As with [`~maetok_hf.data.StreamingImages`], an epoch is whole global batches, and the micro-batches do not
        depend on how they are spread over processes, accumulation steps and restarts.

        Args:
            batch_size (`int`): Images per micro-batch.
            seed (`int`): Seed of the run.
            rank (`int`): Number of this process.
            world_size (`int`): Number of processes.
            gradient_accumulation_steps (`int`): Micro-batches per step and process.
            start_micro_batch (`int`): Micro-batches that this process has already consumed since the start of the run.

        Yields:
            `dict`: `latents` `(batch_size, tokens, channels)`, `class_labels` `(batch_size,)`, `indices`
                `(batch_size,)`.

        Raises:
            ValueError: If there are fewer images than one global batch.
        """
        per_step = world_size * gradient_accumulation_steps
        steps = self.num_images // (batch_size * per_step)
        if steps == 0:
            raise ValueError(
                f"There are {self.num_images} images, fewer than one global batch of {batch_size * per_step}: lower "
                "`total_batch_size`."
            )
        per_epoch = steps * gradient_accumulation_steps
        current, order = None, None
        number = start_micro_batch
        while True:
            epoch, within = divmod(number, per_epoch)
            if epoch != current:
                current = epoch
                order = torch.randperm(self.num_images, generator=keyed_generator(seed, "latents", epoch))
            first = (within * world_size + rank) * batch_size
            rows = self._rows[order[first : first + batch_size]]
            yield {
                "latents": torch.from_numpy(self._latents[self._views(seed, epoch, rows), rows.numpy()]),
                "class_labels": self._labels[rows],
                "indices": rows,
            }
            number += 1

    def _views(self, seed: int, epoch: int, rows: torch.Tensor) -> np.ndarray:
        if self.num_views == 1:
            return np.zeros(len(rows), dtype=np.int64)
        generators = (keyed_generator(seed, "flip", epoch, row) for row in rows.tolist())
        return np.array([int(torch.randint(2, (), generator=generator)) for generator in generators])


def _partial(folder: str | Path) -> Path:
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.partial")
