"""
The captions of images as a target: the LAION-COCO variant of MAETok (arXiv 2502.03444), for captioned data.

One more auxiliary decoder predicts the BPE token indices of an image's caption from the same latents, all positions at
once, and is compared with them by cross-entropy.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.vit import ViTDecoder
from .targets import explained_loading


# the index that `torch.nn.functional.cross_entropy` leaves out by default
IGNORE_INDEX = -100


class CaptionTokenizer:
    """
    Captions to token indices, each caption by itself: a row depends on nothing but its caption.

    Only the caption's own tokens are kept. Start and end tokens are left out, since the first says nothing about the
    image, and the second would be wrong where a caption is cut.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer of transformers.
        max_length (`int`, *optional*, defaults to 77): Token positions `T`, CLIP's number. A longer caption is cut.

    Raises:
        ValueError: If `max_length` is not positive.
    """

    def __init__(self, tokenizer: Any, max_length: int = 77):
        if max_length <= 0:
            raise ValueError(f"`max_length` must be positive, got {max_length}.")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike = "openai/clip-vit-large-patch14", max_length: int = 77
    ) -> "CaptionTokenizer":
        """
        Load the tokenizer with transformers.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*, defaults to
                `"openai/clip-vit-large-patch14"`): Folder or Hub repository of a tokenizer, CLIP's BPE by default.
            max_length (`int`, *optional*, defaults to 77): See [`CaptionTokenizer`].

        Returns:
            [`CaptionTokenizer`]

        Raises:
            OSError: If the tokenizer cannot be found or read.
        """
        from transformers import AutoTokenizer

        with explained_loading(pretrained_model_name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path)
        return cls(tokenizer, max_length)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token index, added tokens included."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def __call__(self, captions: Sequence[str | None]) -> torch.Tensor:
        """
        Args:
            captions (`Sequence[str | None]`): One caption per image; `None` or a blank one where there is none.

        Returns:
            `torch.LongTensor` of shape `(batch_size, max_length)`: Indices in `[0, vocab_size)`, then
            `IGNORE_INDEX` up to the end; nothing else in the rows of missing captions.

        Raises:
            ValueError: If `captions` is one string, or a caption is neither a string nor `None`.
        """
        if isinstance(captions, str):
            raise ValueError(f"`captions` must be one caption per image, got a single string: pass [{captions!r}].")
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise ValueError(f"`captions` must be strings or `None`, got {caption!r}.")
        token_indices = torch.full((len(captions), self.max_length), IGNORE_INDEX, dtype=torch.int64)
        texts = [(caption or "").strip() for caption in captions]
        encoded = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.max_length)
        for row, indices in zip(token_indices, encoded["input_ids"], strict=True):
            row[: len(indices)] = torch.tensor(indices, dtype=torch.int64)
        return token_indices


class TextDecoder(nn.Module):
    """
    An auxiliary decoder that predicts the caption's token at every text position, in the form of the other ones: mask
    tokens, here one per text position with a learned place, the latents after them, latent-modulated blocks. It exists
    in training only and is never saved with the tokenizer.

    Latents that are image tokens stand at patches, and a text position is no patch. So they are read like any other
    latent tokens, by attention, instead of taking the place of the mask tokens as in decoders of patch features. Their
    number is then fixed by the image size that the decoder is built for.

    Args:
        vocab_size (`int`): Number of token indices that can be predicted.
        max_length (`int`): Text positions, `T`.
        latent_channels (`int`): Channels of a latent token.
        num_latent_tokens (`int`): Number of latent tokens; for image tokens, the number of patches.
        hidden_size (`int`, *optional*, defaults to 192): Width.
        num_layers (`int`, *optional*, defaults to 3): Blocks.
        num_attention_heads (`int`, *optional*, defaults to 3): Attention heads.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial tokens.

    Raises:
        ValueError: If a size is not positive or the heads do not divide the width.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        latent_channels: int,
        num_latent_tokens: int,
        hidden_size: int = 192,
        num_layers: int = 3,
        num_attention_heads: int = 3,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "max_length": max_length,
            "latent_channels": latent_channels,
            "num_latent_tokens": num_latent_tokens,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
        }
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({hidden_size}) must be a multiple of `num_attention_heads` ({num_attention_heads})."
            )
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.num_latent_tokens = num_latent_tokens
        self.decoder = ViTDecoder(
            out_features=vocab_size,
            latent_channels=latent_channels,
            num_latent_tokens=num_latent_tokens,
            grid_size=(1, max_length),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            position_embedding="absolute",
            modulated=True,
            initializer_range=initializer_range,
        )

    @classmethod
    def from_tokenizer_config(
        cls,
        config: Mapping[str, Any],
        vocab_size: int,
        max_length: int,
        hidden_size: int = 192,
        num_layers: int = 3,
        num_attention_heads: int = 3,
    ) -> "TextDecoder":
        """
        The text decoder that fits an image tokenizer's latents.

        Args:
            config (`Mapping[str, Any]`): Config of the [`AutoencoderMAE`].
            vocab_size (`int`): Number of token indices, see [`CaptionTokenizer.vocab_size`].
            max_length (`int`): Text positions.
            hidden_size, num_layers, num_attention_heads (`int`): See [`TextDecoder`].

        Returns:
            [`TextDecoder`]: With fresh weights.

        Raises:
            ValueError: If a size is invalid.
        """
        num_patches = (config["sample_size"] // config["patch_size"]) ** 2
        return cls(
            vocab_size=vocab_size,
            max_length=max_length,
            latent_channels=config["latent_channels"],
            num_latent_tokens=config["num_latent_tokens"] or num_patches,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            initializer_range=config["initializer_range"],
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latent (`torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`): Raw latents.

        Returns:
            `torch.Tensor` of shape `(batch_size, max_length, vocab_size)`: Logits of the token at every position.

        Raises:
            ValueError: If the number of latent tokens is another one.
        """
        if latent.shape[1] != self.num_latent_tokens:
            raise ValueError(
                f"`latent` has {latent.shape[1]} tokens, but the text decoder is built for {self.num_latent_tokens}: "
                "train a tokenizer whose latents are image tokens on captions at one image size."
            )
        return self.decoder(latent)


def caption_loss(logits: torch.Tensor, token_indices: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the captions' tokens, mean over all real tokens of the batch, in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, T, vocab_size)`): Output of a [`TextDecoder`].
        token_indices (`torch.LongTensor` of shape `(batch_size, T)`): Output of a [`CaptionTokenizer`], on the same
            device.

    Returns:
        `torch.FloatTensor`: Scalar in nats, in `[0, inf)`; 0, with zero gradients, if no image has a caption.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.shape[:-1] != token_indices.shape:
        raise ValueError(
            f"`token_indices` of shape {tuple(token_indices.shape)} must have one index for each prediction, but "
            f"`logits` has shape {tuple(logits.shape)}: use the same `max_length` in tokenizer and decoder."
        )
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), token_indices.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / (token_indices != IGNORE_INDEX).sum().clamp(min=1)
