"""The one place where latents are normalised for a generator and brought back for a decoder.

A tokenizer's `encode` returns, and its `decode` takes, raw latents `z`; a generator sees `(z - mean) / std` with the
statistics in the tokenizer's config (MAETok uses one scalar of each per checkpoint). Trainers and pipelines call these
two functions; only `StreamingLatents`, which knows no tokenizer, does the same arithmetic with statistics it is given.
"""

from collections.abc import Mapping

import torch


def check_latent_statistics(config: Mapping) -> None:
    """
    Raises:
        ValueError: If `config` (a tokenizer's) has no `latents_mean` and `latents_std`.
    """
    missing = [name for name in ("latents_mean", "latents_std") if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the tokenizer's config has no {' and no '.join(f'`{name}`' for name in missing)}, which its generator "
            "needs: measure them over training latents and store them with "
            "`vae.register_to_config(latents_mean=..., latents_std=...)`."
        )


def _statistics(config: Mapping, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_latent_statistics(config)
    statistics = []
    for name in ("latents_mean", "latents_std"):
        value = torch.as_tensor(config[name], dtype=torch.float32)
        if value.ndim > 1 or value.numel() not in (1, like.shape[-1]):
            raise ValueError(
                f"`{name}` must be a scalar or hold one value per latent channel ({like.shape[-1]}), "
                f"got shape {tuple(value.shape)}."
            )
        statistics.append(value.to(like.device, like.dtype))
    return statistics[0], statistics[1]


def normalize_latents(latents: torch.Tensor, config: Mapping) -> torch.Tensor:
    """
    Raw latents of a tokenizer to what a generator sees: `(latents - latents_mean) / latents_std`.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`): Raw latents.
        config (`Mapping`): The tokenizer's config, with `latents_mean` and `latents_std` (scalars or one value a
            channel).

    Returns:
        `torch.Tensor`: Shape and dtype of `latents`.

    Raises:
        ValueError: If the statistics are missing or do not fit the latents.
    """
    mean, std = _statistics(config, latents)
    return (latents - mean) / std


def denormalize_latents(latents: torch.Tensor, config: Mapping) -> torch.Tensor:
    """
    A generator's latents to the raw ones that `decode` takes: `latents * latents_std + latents_mean`.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`): Normalised latents.
        config (`Mapping`): The tokenizer's config, with `latents_mean` and `latents_std` (scalars or one value a
            channel).

    Returns:
        `torch.Tensor`: Shape and dtype of `latents`.

    Raises:
        ValueError: If the statistics are missing or do not fit the latents.
    """
    mean, std = _statistics(config, latents)
    return latents * std + mean
