"""Published checkpoints as models of this library and of diffusers."""

from .configs import revert_autoencoder_config, revert_transformer_config
from .convert import AuthorsCheckpoint, convert_autoencoder, convert_transformer
from .state_dict import revert_autoencoder_state_dict, revert_transformer_state_dict
from .va_vae import convert_va_vae
from .verification import ConversionError, verify_autoencoder, verify_transformer


__all__ = [
    "AuthorsCheckpoint",
    "ConversionError",
    "convert_autoencoder",
    "convert_transformer",
    "convert_va_vae",
    "revert_autoencoder_config",
    "revert_autoencoder_state_dict",
    "revert_transformer_config",
    "revert_transformer_state_dict",
    "verify_autoencoder",
    "verify_transformer",
]
