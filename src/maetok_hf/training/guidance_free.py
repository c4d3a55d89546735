"""
Guidance-free training: one network learns what classifier-free guidance computes from two passes (arXiv 2501.15420).

A temperature `beta` in `(0, 1]` conditions the network beside the class. Trained so that
`beta * v(x, c, beta) + (1 - beta) * v(x, null, 1)` is the velocity (equation 9 there, with the second term held
fixed), `v(x, c, beta)` becomes `u + (c - u) / beta` at the optimum, where `c` and `u` are the conditional and the
unconditional velocity: guidance of scale `1 / beta` in one pass. Where the class is dropped `beta` is 1, so that the
null class learns `u`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def check_guidance_free(transformer: nn.Module, guidance_free: bool) -> None:
    """
    Refuse a transformer that is not made for the way it is to be trained.

    Args:
        transformer (`ModelMixin`): The network.
        guidance_free (`bool`): Whether it is to be trained for sampling without guidance.

    Raises:
        ValueError: If it lacks a temperature embedding that the training needs, or has one that it would not train.
    """
    if guidance_free and not transformer.config.temperature_embedding:
        raise ValueError(
            "`guidance_free` needs a transformer with `temperature_embedding`: build it so, or give a trained one its "
            "embedding with `enable_temperature_embedding()`."
        )
    if transformer.config.temperature_embedding and not guidance_free:
        raise ValueError(
            "the transformer has a `temperature_embedding`, which only `guidance_free` training trains: set it, or "
            "use a transformer without."
        )


def effective_temperature(guidance_temperature: torch.Tensor, class_drop_mask: torch.Tensor) -> torch.Tensor:
    """
    The temperature of every image: its own, and 1 where the class is dropped.

    Args:
        guidance_temperature (`torch.Tensor` of shape `(batch_size,)`): Draws in `(0, 1]`.
        class_drop_mask (`torch.BoolTensor` of shape `(batch_size,)`): True where the null class replaces the label.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.

    Raises:
        ValueError: If there is not one temperature per image.
    """
    if guidance_temperature.shape != class_drop_mask.shape:
        raise ValueError(
            f"`guidance_temperature` must hold one temperature per image, of shape {tuple(class_drop_mask.shape)}, "
            f"got {tuple(guidance_temperature.shape)}."
        )
    return torch.where(class_drop_mask, 1.0, guidance_temperature)


def mix_velocities(
    conditional: torch.Tensor, unconditional: torch.Tensor, guidance_temperature: torch.Tensor
) -> torch.Tensor:
    """
    What is compared with the velocity of the path: `beta * conditional + (1 - beta) * unconditional`.

    Args:
        conditional (`torch.Tensor` of shape `(batch_size, ...)`): `v(x, c, beta)`.
        unconditional (`torch.Tensor` of the same shape): `v(x, null, 1)`, held fixed.
        guidance_temperature (`torch.Tensor` of shape `(batch_size,)`): `beta` of every image.

    Returns:
        `torch.Tensor` of the shape of `conditional`, in float32 or better.
    """
    temperature = guidance_temperature.reshape(-1, *[1] * (conditional.ndim - 1))
    # float32 from here on: two velocities in low precision would lose their difference
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    return temperature * conditional.to(dtype) + (1 - temperature) * unconditional.to(dtype)


@torch.no_grad()
def unguided_velocity(transformer: nn.Module, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """
    `v(x, null, 1)` as a constant: without gradient, and in evaluation mode, whatever mode the transformer is in.

    Args:
        transformer (`ModelMixin`): The network.
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`): Noisy latents.
        timestep (`torch.Tensor` of shape `(batch_size,)`): Their times.

    Returns:
        `torch.Tensor` of the shape of `hidden_states`.
    """
    null = torch.full_like(timestep, transformer.config.num_classes, dtype=torch.long)
    with _evaluating(transformer):
        return transformer(
            hidden_states, timestep, null, return_dict=False, guidance_temperature=torch.ones_like(timestep)
        )[0]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule then has the mode it had."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
