"""Tiny models that several test modules share: same code paths as the published sizes, milliseconds to run."""

from pathlib import Path
from typing import Any

import torch

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel


GOLDEN = Path(__file__).parent / "golden"

AUTOENCODER_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 8,
    "latent_channels": 4,
    "num_latent_tokens": 6,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "latents_mean": 0.1,
    "latents_std": 1.5,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "sample_size": 6,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}

# every form of the tokenizer; differing encoder and decoder sizes would hide behind equal ones
AUTOENCODER_FORMS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope_modulated": {"modulated_decoder": True, "decoder_class_token": False},
    "absolute": {"position_embedding": "absolute"},
    "absolute_modulated": {"position_embedding": "absolute", "modulated_decoder": True},
    "image_tokens": {"num_latent_tokens": 0},
    "gaussian_posterior": {"gaussian_posterior": True},
    "asymmetric": {
        "decoder_hidden_size": 48,
        "decoder_num_layers": 3,
        "decoder_num_attention_heads": 3,
        "decoder_mlp_ratio": 2.0,
        "encoder_class_token": False,
        "out_channels": 1,
    },
}


@torch.no_grad()
def randomize_parameters(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Add noise to every parameter: zero initialisations (adaLN-Zero, LayerScale 1e-5) make comparisons vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
        parameter.add_(noise.to(parameter))
    return model


def tiny_autoencoder(seed: int = 0, **overrides: Any) -> AutoencoderMAE:
    """An [`AutoencoderMAE`] of random weights in evaluation mode, `AUTOENCODER_CONFIG` with `overrides`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderMAE(**{**AUTOENCODER_CONFIG, **overrides})
    return randomize_parameters(model, seed).eval()


def tiny_transformer(seed: int = 0, **overrides: Any) -> SiTTransformer1DModel:
    """A [`SiTTransformer1DModel`] of random weights in evaluation mode, `TRANSFORMER_CONFIG` with `overrides`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiTTransformer1DModel(**{**TRANSFORMER_CONFIG, **overrides})
    return randomize_parameters(model, seed).eval()


def seeded_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal draws that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)
