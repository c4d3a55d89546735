"""Latents as token sequences from any image autoencoder of diffusers, and how its encoder is recognised."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderRAE, AutoModel, ModelMixin

from ..models import AutoencoderMAE


logger = logging.getLogger(__name__)

# what a tokenizer has for the way back: training it further leaves the latents as they are
DECODER_PREFIXES = ("decoder.", "post_quant_conv.")
DECODER_SETTINGS = ("decoder_", "latents_mean", "latents_std", "up_block_types", "use_post_quant_conv")


def load_tokenizer(
    name_or_path: str,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """
    Load a tokenizer by the class that its config names.

    Args:
        name_or_path (`str`): Folder or Hub repository.
        subfolder (`str`, *optional*): Its folder in there, such as `"vae"` in a pipeline.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the weights but those that a model keeps in float32, which `to(dtype)` would cast as well.

    Returns:
        `ModelMixin`: The frozen tokenizer, in evaluation mode.

    Raises:
        ValueError: If there is a `revision` of a local folder.
    """
    if revision is not None and os.path.isdir(name_or_path):
        raise ValueError(f"`revision={revision!r}` has no meaning for the local folder {name_or_path}: remove it.")
    tokenizer = AutoModel.from_pretrained(name_or_path, subfolder=subfolder, revision=revision, dtype=dtype)
    return tokenizer.requires_grad_(False).eval()


def resolve_commit(name_or_path: str, subfolder: str | None = None, revision: str | None = None) -> str | None:
    """
    The commit of a tokenizer on the Hub, so that what is written down still names it when the branch has moved on.

    Args:
        name_or_path (`str`): Folder or Hub repository.
        subfolder (`str`, *optional*): Its folder in there.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; by default the main branch.

    Returns:
        `str` or `None`: The hash, to be loaded as the `revision`; of a local folder the given one.
    """
    if os.path.isdir(name_or_path):
        return revision
    place = {"subfolder": subfolder, "revision": revision}
    # the configs of all models have the same name
    return AutoencoderMAE.load_config(name_or_path, **place, return_commit_hash=True)[1] or revision


def encode_tokens(tokenizer: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """
    Raw latents: what `encode` returns and `decode` takes, without the scaling that a diffusion model may want.

    Args:
        tokenizer (`ModelMixin`): In evaluation mode, with an `encode` method for images: [`AutoencoderMAE`], or
            diffusers' `AutoencoderKL`, `AutoencoderDC`, `AutoencoderRAE` and the like.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`: The latents, of a Gaussian posterior its
        mode; those of a grid row by row.

    Raises:
        ValueError: If they are no sequence or grid for each image.
    """
    return to_tokens(encode_grid(tokenizer, images))


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Latents of [`encode_grid`] as `(batch_size, num_tokens, num_channels)`: a grid row by row."""
    return latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents


@torch.no_grad()
def encode_grid(tokenizer: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """
    As [`encode_tokens`], in the shape that `decode` takes.

    Args:
        tokenizer (`ModelMixin`): In evaluation mode.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.

    Returns:
        `torch.Tensor`: Latents of shape `(batch_size, num_tokens, num_channels)`, or of a grid
        `(batch_size, num_channels, rows, columns)`.

    Raises:
        ValueError: If they have another shape.
    """
    if isinstance(tokenizer, AutoencoderRAE):
        images = (images + 1) / 2  # the only one that normalises images in [0, 1] itself
    encoded = tokenizer.encode(images, return_dict=False)[0]
    latents = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    if latents.ndim not in (3, 4) or len(latents) != len(images):
        raise ValueError(
            f"{type(tokenizer).__name__} gives latents of shape {tuple(latents.shape)} for {len(images)} images, but "
            "only sequences (batch, tokens, channels) and grids (batch, channels, rows, columns) can be used."
        )
    return latents


def encoder_digest(tokenizer: ModelMixin) -> str:
    """
    A short text that changes with any weight or setting that latents depend on, but not when the decoder is trained
    further (MAETok's second stage) or the latents' statistics are measured.

    Args:
        tokenizer (`ModelMixin`): The tokenizer in the type in which it was loaded.
    """
    settings = {
        name: value for name, value in tokenizer.config.items() if not name.startswith(("_", *DECODER_SETTINGS))
    }
    text = json.dumps([type(tokenizer).__name__, settings], sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    tensors = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith(DECODER_PREFIXES)}
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        digest (`hashlib.blake2b`): What is updated.
        tensors (`Mapping[str, torch.Tensor]`): Tensors by name, in an order that is always the same.
    """
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def check_same_encoder(tokenizer: ModelMixin, metadata: Mapping[str, Any]) -> None:
    """
    Make sure that cached latents come from a tokenizer.

    Args:
        tokenizer (`ModelMixin`): The tokenizer.
        metadata (`Mapping[str, Any]`): `metadata` of the [`~maetok_hf.data.LatentSource`].

    Raises:
        ValueError: If they come from another encoder.
    """
    known = metadata["tokenizer"]
    if encoder_digest(tokenizer) != known["digest"]:
        raise ValueError(
            f"The cached latents come from another encoder ({known['class']} {known['name_or_path']!r}) than that of "
            "the given tokenizer: give that one, or cache the latents of this one."
        )


class ViewEncoder:
    """
    Makes of images what a cache stores: raw latents of each view as token sequences, in the type of the cache.

    Args:
        tokenizer (`ModelMixin`): In evaluation mode.
        num_views (`int`): 1, or 2 with the mirrored images.
        dtype (`str`): `"float16"` or `"float32"`.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"no"`, `"fp16"` or `"bf16"`.
    """

    def __init__(self, tokenizer: ModelMixin, num_views: int, dtype: str, mixed_precision: str = "no"):
        self.tokenizer, self.num_views = tokenizer, num_views
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._autocast = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, float]:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.

        Returns:
            `tuple[torch.Tensor, float]`: Latents on the CPU of shape
            `(num_views, batch_size, num_tokens, num_channels)`, and the sum of their squared rounding errors.

        Raises:
            ValueError: If latents are not finite, or too large for the type.
        """
        views = [images, images.flip(-1)][: self.num_views]
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            latents = torch.stack([encode_tokens(self.tokenizer, view).float() for view in views]).cpu()
        stored = latents.to(self.dtype)
        if not stored.isfinite().all():
            if latents.isfinite().all():
                raise ValueError(
                    f"A latent has the size {latents.abs().max():.3g}, too much for `dtype` float16: use float32."
                )
            raise ValueError(
                "The tokenizer gives latents that are not finite: it is broken, or needs another `mixed_precision`."
            )
        return stored, float((stored.double() - latents.double()).square().sum())
