"""Gradient checkpointing of a share of the blocks: memory against time, in finer steps than all or nothing."""

import functools
from collections.abc import Collection

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed_blocks(num_blocks: int, share: float) -> list[int]:
    """
    Which blocks of a stack are recomputed in the backward pass: evenly spread ones.

    Unless all are, the last one keeps its activations. The backward pass begins with it, and releases them before it
    recomputes another block.

    Args:
        num_blocks (`int`): Blocks of the stack.
        share (`float`): The share that is recomputed, in `[0, 1]`, rounded to whole blocks; above 0 at least one is.

    Returns:
        `list[int]`: Their indices, in order.

    Raises:
        ValueError: If `share` is outside `[0, 1]`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], got {share}.")
    count = max(round(share * num_blocks), int(share > 0))
    kept = num_blocks - count
    # the i-th kept one ends the i-th of `kept` equal parts of the stack
    return [index for index in range(num_blocks) if (index + 1) * kept // num_blocks == index * kept // num_blocks]


def enable_gradient_checkpointing(model: nn.Module, share: float = 1.0) -> None:
    """
    Recompute the activations of some blocks of every stack in the backward pass. The result is the same bit for bit.

    Every stack within the model is one of its own: those of a tokenizer are its encoder and its decoder. A later call
    replaces an earlier one, and so do diffusers' own `enable_gradient_checkpointing()`, which takes all blocks, and
    `disable_gradient_checkpointing()`.

    Args:
        model (`nn.Module`): A model of the library, or a module that holds some.
        share (`float`, *optional*, defaults to 1.0): Share of the blocks of each stack, see [`recomputed_blocks`].

    Raises:
        ValueError: If `share` is outside `[0, 1]`, or the model has no stack of blocks.
    """
    stacks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not stacks:
        raise ValueError(f"`model` is a {type(model).__name__}, which has no blocks with gradient checkpointing.")
    for stack in stacks:
        blocks = stack.transformer_blocks
        chosen = frozenset(blocks[index] for index in recomputed_blocks(len(blocks), share))
        stack.gradient_checkpointing = bool(chosen)
        stack._gradient_checkpointing_func = functools.partial(_run_block, chosen)


def _run_block(chosen: Collection[nn.Module], block: nn.Module, *args) -> torch.Tensor:
    """What models call where checkpointing is on: diffusers' function, for the chosen blocks only."""
    if block in chosen:
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
