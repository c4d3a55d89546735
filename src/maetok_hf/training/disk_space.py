"""Whether the checkpoints of a run will fit on the disk, asked before any work is done."""

import warnings
from collections.abc import Iterable
from itertools import chain

import torch
from diffusers.training_utils import EMAModel
from torch import nn


# Adam's two moments; checkpoints hold them for every parameter that is trained.
MOMENTS_PER_PARAMETER = 2


def checkpoint_size(models: Iterable[nn.Module], averages: Iterable[EMAModel]) -> int:
    """
    Bytes of one checkpoint: weights, averages and the two moments of every trained parameter.

    Args:
        models (`Iterable[nn.Module]`): The models and further modules that a checkpoint holds, sharded or not.
        averages (`Iterable[EMAModel]`): The moving averages that it holds.

    Returns:
        `int`: Bytes of the tensors; the rest of a checkpoint is small.
    """
    models = list(models)
    states = chain.from_iterable(model.state_dict().values() for model in models)
    size = sum(_num_bytes(tensor) for tensor in states)
    size += sum(_num_bytes(tensor) for ema in averages for tensor in ema.shadow_params)
    trained = {parameter for model in models for parameter in model.parameters() if parameter.requires_grad}
    return size + MOMENTS_PER_PARAMETER * sum(_num_bytes(parameter) for parameter in trained)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_disk_space(folder: str, free: int, size: int, total_limit: int, existing: int = 0) -> None:
    """
    Refuse a disk on which no further checkpoint fits, and warn of one that will not hold all that are to be kept.

    An old checkpoint is removed only after the new one is complete, so for a moment there is one more than the limit.

    Args:
        folder (`str`): Where checkpoints go, for the messages.
        free (`int`): Free bytes there.
        size (`int`): Bytes of one checkpoint, from [`checkpoint_size`].
        total_limit (`int`): Checkpoints to keep.
        existing (`int`, *optional*, defaults to 0): Checkpoints that lie there already.

    Raises:
        ValueError: If not even one more checkpoint fits.
    """
    have = f"{free / 1e9:.2f} GB free and one checkpoint takes {size / 1e9:.2f} GB"
    if free < size:
        raise ValueError(f"`output_dir` {folder} has {have}: make room, or choose a folder on another disk.")
    missing = max(total_limit + 1 - existing, 1)
    if free < missing * size:
        warnings.warn(
            f"`output_dir` {folder} has {have}, but {missing} more will be there while one replaces another "
            f"(`checkpoints_total_limit` = {total_limit}): make room, or lower the limit.",
            stacklevel=2,
        )
