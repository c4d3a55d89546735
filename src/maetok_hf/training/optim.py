"""Optimisation around the objectives: weight-decay groups, learning-rate schedules and the moving average."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.nn.utils.parametrize import ParametrizationList

from .sharding import ShardedEMAModel


LR_SCHEDULES = ("constant", "cosine")


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    Parameter groups for AdamW in which only the matrices of linear and convolution layers decay.

    Everything else is left alone: norms, biases, embedding tables, and the bare parameters of the models (class, mask
    and latent tokens, position tables, rotary frequencies, LayerScale). Frozen parameters are in neither group.

    Args:
        module (`nn.Module`): The objective or the model to train.
        weight_decay (`float`): Decay of the first group, not negative.

    Returns:
        `list[dict]`: The non-empty ones of the group that decays and the group that does not, in this order.

    Raises:
        ValueError: If `weight_decay` is negative or nothing is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"`weight_decay` must not be negative, got {weight_decay}.")
    decayed, undecayed, seen = [], [], set()
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            # a weight with spectral norm is kept as `original`
            is_weight = name == "weight" or isinstance(submodule, ParametrizationList)
            is_matrix = is_weight and parameter.ndim >= 2 and not isinstance(submodule, nn.Embedding)
            (decayed if is_matrix else undecayed).append(parameter)
    if not seen:
        raise ValueError("`module` has no trainable parameter: every `requires_grad` is False.")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """
    Scale gradients down to a norm, with the result of torch's `clip_grad_norm_` bit for bit.

    Gradients on the CPU that are small enough are not touched: there the norm can be looked at without waiting for a
    device, and a multiplication by 1 costs more than the norm itself.

    Args:
        parameters (`Iterable[nn.Parameter]`): Parameters, some of which may have no gradient.
        max_norm (`float`): Largest norm of all gradients together.

    Returns:
        `torch.Tensor`: The norm before, a scalar.
    """
    parameters = list(parameters)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    on_cpu = type(norm) is torch.Tensor and norm.device.type == "cpu"  # not sharded
    if not on_cpu or not max_norm / (norm + 1e-6) >= 1:  # the sum is torch's; a norm that is NaN is not passed over
        clip_grads_with_norm_(parameters, max_norm, norm, foreach=True if on_cpu else None)
    return norm


def scale_learning_rate(learning_rate: float, batch_size: int, base_batch_size: int = 256) -> float:
    """
    Linear scaling of the learning rate with the batch.

    Args:
        learning_rate (`float`): Rate for `base_batch_size` images.
        batch_size (`int`): Images per optimiser step, over all processes and accumulated micro-batches.
        base_batch_size (`int`, *optional*, defaults to 256): Images that `learning_rate` is given for.

    Returns:
        `float`: `learning_rate * batch_size / base_batch_size`.

    Raises:
        ValueError: If a batch size is not positive.
    """
    if batch_size <= 0 or base_batch_size <= 0:
        raise ValueError(
            f"batch sizes must be positive, got `batch_size`={batch_size} and `base_batch_size`={base_batch_size}."
        )
    return learning_rate * batch_size / base_batch_size


def learning_rate_at(
    step: int,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    num_steps: int,
    final_learning_rate: float = 0.0,
) -> float:
    """
    Learning rate of an optimiser step, a pure function: resuming needs no state.

    Args:
        step (`int`): Optimiser step, counted from 0.
        learning_rate (`float`): Peak rate.
        schedule (`str`): `"constant"`, or `"cosine"`: half a cosine from the peak at the end of the warm-up to
            `final_learning_rate` at `num_steps`, where it stays.
        warmup_steps (`int`): Length of a linear warm-up: step `i` of it has `(i + 1) / warmup_steps` of the peak, so
            no step is spent at rate 0. 0 for none.
        num_steps (`int`): Steps of the run.
        final_learning_rate (`float`, *optional*, defaults to 0.0): Rate at the end of the cosine; must stay 0 for
            `"constant"`, which has no end rate.

    Returns:
        `float`: Learning rate of the step.

    Raises:
        ValueError: If `schedule` is unknown, a count is negative, a cosine has no steps left after the warm-up, or
            `final_learning_rate` is given for `"constant"`.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(map(repr, LR_SCHEDULES))}, got {schedule!r}.")
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"`step` and `warmup_steps` must not be negative, got {step} and {warmup_steps}.")
    if schedule == "constant" and final_learning_rate != 0.0:
        raise ValueError(
            f"`final_learning_rate`={final_learning_rate} has no meaning for the constant schedule: leave it at 0."
        )
    if schedule == "cosine" and num_steps <= warmup_steps:
        raise ValueError(
            f"a cosine schedule needs steps after its warm-up, got `num_steps`={num_steps} and "
            f"`warmup_steps`={warmup_steps}: shorten the warm-up."
        )
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if schedule == "constant":
        return learning_rate
    progress = min((step - warmup_steps) / (num_steps - warmup_steps), 1.0)
    return final_learning_rate + (learning_rate - final_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """
    Set the learning rate of every parameter group, in place where the optimiser keeps it as a tensor.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser, also one that accelerate has wrapped.
        learning_rate (`float`): Rate of the step to come, for example from [`learning_rate_at`].
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def create_ema(model: nn.Module, decay: float = 0.9999) -> ShardedEMAModel:
    """
    Moving average of a diffusers model at a constant decay, as MAETok and SiT train (their decay is 0.9999).

    It is diffusers' `EMAModel`, whose state holds lists of tensors and plain numbers and which averages frozen
    parameters by copying them, so a frozen encoder stays bit-identical; `torch.optim.swa_utils` would deep-copy the
    whole module instead. Its default decay warms up over thousands of steps, which `min_decay` turns off; only its
    first update copies the weights. It lies where the model does, in pieces if the model is sharded, so create it
    after `accelerator.prepare`. It is in float32 whatever the model is: in bfloat16, an update at this decay would be
    rounded away.

    Args:
        model (`ModelMixin`): The tokenizer or the transformer, without the objective around it.
        decay (`float`, *optional*, defaults to 0.9999): Weight of the past in each update, in `[0, 1)`.

    Returns:
        [`~maetok_hf.training.sharding.ShardedEMAModel`]: Its `step(model.parameters())` belongs after each optimiser
        step.

    Raises:
        ValueError: If `decay` is outside `[0, 1)`.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
    decay = float(decay)
    ema = ShardedEMAModel(
        model.parameters(),
        decay=decay,
        min_decay=decay,
        foreach=True,
        model_cls=type(model),
        model_config=model.config,
    )
    ema.to(dtype=torch.float32)
    return ema
