"""What comes when: the order of the rows of an epoch and the resolution of a step, as functions of the seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..seeding import keyed_generator
from .sources import ImageSource


@dataclass(frozen=True)
class EpochOrder:
    """
    The order of one epoch.

    Args:
        chunks (`np.ndarray`): The chunks in their order, of shape `(num_chunks,)`.
        block_chunks (`np.ndarray`): Position in `chunks` where each block begins, and the end, `(num_blocks + 1,)`.
        block_rows (`np.ndarray`): Position in the epoch's rows where each block begins, and the end,
            `(num_blocks + 1,)`.
    """

    chunks: np.ndarray
    block_chunks: np.ndarray
    block_rows: np.ndarray

    @property
    def num_blocks(self) -> int:
        return len(self.block_rows) - 1

    def block_of(self, position: int) -> int:
        """The block that holds a position of the epoch's rows."""
        return int(np.searchsorted(self.block_rows, position, side="right")) - 1


def epoch_order(source: ImageSource, seed: int, epoch: int, block_size: int, shuffle: bool) -> EpochOrder:
    """
    Order the chunks of an epoch and deal them into blocks of at most `block_size` rows (a single larger chunk is a
    block of its own).

    Args:
        source ([`ImageSource`]): The data set.
        seed, epoch (`int`): Key of the permutation.
        block_size (`int`): Rows of a block.
        shuffle (`bool`): `False` keeps the order of the data set.

    Returns:
        [`EpochOrder`]: The order.
    """
    chunks = np.arange(len(source.chunk_sizes))
    if shuffle:
        generator = keyed_generator(seed, "blocks", epoch)
        if source.sequential:
            ranks = torch.randperm(int(source.chunk_shards[-1]) + 1, generator=generator).numpy()
            chunks = np.argsort(ranks[source.chunk_shards], kind="stable")
        else:
            chunks = torch.randperm(len(chunks), generator=generator).numpy()
    block_chunks, block_rows, filled, total = [0], [0], 0, 0
    for position, size in enumerate(source.chunk_sizes[chunks].tolist()):
        if filled and filled + size > block_size:
            block_chunks.append(position)
            block_rows.append(total)
            filled = 0
        filled += size
        total += size
    return EpochOrder(chunks, np.array([*block_chunks, len(chunks)]), np.array([*block_rows, total]))


def check_resolutions(resolution: int | Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """
    Args:
        resolution (`int` or `Sequence[int]`): One resolution or several.
        weights (`Sequence[float]`, *optional*): Their relative frequencies.

    Returns:
        `tuple[int, ...]`: The resolutions.

    Raises:
        ValueError: If there is none, if one is no positive integer or comes twice, or if the weights do not fit them.
    """
    resolutions = tuple(resolution) if isinstance(resolution, Sequence) else (resolution,)
    valid = [isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in resolutions]
    if not resolutions or not all(valid) or len(set(resolutions)) < len(resolutions):
        raise ValueError(
            f"`resolution` must be a positive integer or several different ones, got {resolution!r}; how often each "
            "comes is said by `resolution_weights`."
        )
    if weights is not None:
        fit = len(weights) == len(resolutions) and all(math.isfinite(w) and w >= 0 for w in weights)
        if not fit or sum(weights) <= 0:
            raise ValueError(
                f"`resolution_weights` must be one number for each of the {len(resolutions)} resolutions, none "
                f"negative and not all zero, got {weights!r}."
            )
    return resolutions


def resolution_at(seed: int, step: int, resolutions: Sequence[int], weights: Sequence[float] | None = None) -> int:
    """
    Resolution of all images of an optimizer step, drawn for `(seed, step)`: the same in every process, in every
    micro-batch and after a restart.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): Optimizer step, from 0.
        resolutions (`Sequence[int]`): The resolutions to draw from.
        weights (`Sequence[float]`, *optional*): Relative frequency of each; by default all are equally frequent.

    Returns:
        `int`: One of `resolutions`.
    """
    if len(resolutions) == 1:
        return resolutions[0]
    bounds = np.cumsum(np.ones(len(resolutions)) if weights is None else weights)
    draw = torch.rand((), generator=keyed_generator(seed, "resolution", step), dtype=torch.float64).item()
    # The last comparison is left out: rounding must not lead beyond the end. `right` passes over weights of zero.
    return resolutions[int(np.searchsorted(bounds[:-1], draw * bounds[-1], side="right"))]
