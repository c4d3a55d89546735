from .autoencoder_mae import AutoencoderMAE
from .latents import denormalize_latents, normalize_latents
from .transformer_sit import SiTTransformer1DModel


__all__ = ["AutoencoderMAE", "SiTTransformer1DModel", "denormalize_latents", "normalize_latents"]
