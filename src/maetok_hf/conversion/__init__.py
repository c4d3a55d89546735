from .convert import convert_autoencoder, convert_transformer


__all__ = ["convert_autoencoder", "convert_transformer"]
