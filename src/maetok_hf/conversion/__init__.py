from .convert import convert_autoencoder, convert_transformer
from .va_vae import convert_va_vae


__all__ = ["convert_autoencoder", "convert_transformer", "convert_va_vae"]
