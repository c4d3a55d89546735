"""Latents of one side of a data set in files that grow block by block: what is written survives a kill.

    train.latents   the latents, one after the other
    train.rows      int64 pairs: class, and number of the row in the data set of images
    train.json      how much of both counts; rewritten after each block

Read back, latents are mapped from the file and never in memory as a whole.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..training.checkpointing import write_json


_ROW_BYTES = 16  # of class and row


class LatentChunk(NamedTuple):
    """
    Latents that are written together.

    Args:
        number (`int`): Position among the blocks; blocks without any row may be skipped.
        latents (`torch.Tensor` of shape `(num_rows, num_tokens, num_channels)`): In the type of the file.
        labels (`torch.Tensor` of shape `(num_rows,)`): int64, -1 without classes.
        indices (`torch.Tensor` of shape `(num_rows,)`): int64, rows of the data set of images.
        num_unlabeled (`int`): Rows that are left out because they have no class.
    """

    number: int
    latents: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    num_unlabeled: int


class StoredLatents(NamedTuple):
    """
    What is read back.

    Args:
        latents (`torch.Tensor` of shape `(num_rows, num_tokens, num_channels)`): Mapped from the file.
        labels (`torch.Tensor` of shape `(num_rows,)`): int64.
        indices (`torch.Tensor` of shape `(num_rows,)`): int64.
    """

    latents: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class LatentFile:
    """
    The files of one side.

    Args:
        folder (`str` or `Path`): Where they are, for latents of one tokenizer and one choice of images alone.
        name (`str`): How their names begin.
        shape (`tuple[int, int]`): Tokens and channels.
        dtype (`torch.dtype`): Type of the latents.
    """

    def __init__(self, folder: str | Path, name: str, shape: tuple[int, int], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype
        self._latents, self._rows, self._progress = (
            Path(folder) / f"{name}.{ending}" for ending in ("latents", "rows", "json")
        )
        self._done = {"next_block": 0, "num_rows": 0, "num_unlabeled": 0, "complete": False}
        if self._progress.is_file():
            self._done = json.loads(self._progress.read_text(encoding="utf-8"))

    @property
    def next_block(self) -> int:
        """`int`: Number of the first block that is not written."""
        return self._done["next_block"]

    @property
    def num_rows(self) -> int:
        """`int`: Rows that are written."""
        return self._done["num_rows"]

    @property
    def num_unlabeled(self) -> int:
        """`int`: Rows that were left out because they have no class."""
        return self._done["num_unlabeled"]

    @property
    def complete(self) -> bool:
        """`bool`: Whether no block is missing."""
        return self._done["complete"]

    @property
    def row_bytes(self) -> int:
        """`int`: Bytes of one row in both files."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize + _ROW_BYTES

    def append(self, block: LatentChunk) -> None:
        """
        Write a block. It counts as written when both files are on the disk.

        Args:
            block ([`LatentChunk`]): The next one.
        """
        assert block.latents.dtype == self.dtype and block.latents.shape[1:] == self.shape
        rows = torch.stack([block.labels, block.indices], dim=1)
        latent_bytes = self.row_bytes - _ROW_BYTES
        for path, values, size in ((self._latents, block.latents, latent_bytes), (self._rows, rows, _ROW_BYTES)):
            with open(path, "r+b" if path.is_file() else "wb") as file:
                # Of a run that was killed here, more may be there than counts.
                file.truncate(self.num_rows * size)
                file.seek(self.num_rows * size)
                file.write(values.contiguous().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
        self._record(
            next_block=block.number + 1,
            num_rows=self.num_rows + len(rows),
            num_unlabeled=self.num_unlabeled + block.num_unlabeled,
        )

    def finish(self) -> None:
        """Say that no block is missing."""
        self._record(complete=True)

    def _record(self, **facts: int | bool) -> None:
        self._done = self._done | facts
        write_json(self._progress, self._done)

    def read(self) -> StoredLatents:
        """
        Returns:
            [`StoredLatents`]: All rows, of which there must be one at least.
        """
        count, numel = self.num_rows, self.shape[0] * self.shape[1]
        latents = torch.from_file(str(self._latents), shared=False, size=count * numel, dtype=self.dtype)
        rows = torch.from_file(str(self._rows), shared=False, size=2 * count, dtype=torch.int64).view(count, 2)
        return StoredLatents(latents.view(count, *self.shape), rows[:, 0].clone(), rows[:, 1].clone())

    def remove(self) -> None:
        """Remove the files."""
        for path in (self._progress, self._latents, self._rows):
            path.unlink(missing_ok=True)
