"""The tokenizer and the generators, made of one attention and one block."""

from .autoencoder_mae import AutoencoderMAE
from .latents import denormalize_latents, normalize_latents
from .transformer_lightning_dit import LightningDiTTransformer1DModel
from .transformer_sit import SiTTransformer1DModel
from .transformer_usit import USiTTransformer1DModel


__all__ = [
    "AutoencoderMAE",
    "LightningDiTTransformer1DModel",
    "SiTTransformer1DModel",
    "USiTTransformer1DModel",
    "denormalize_latents",
    "normalize_latents",
]
