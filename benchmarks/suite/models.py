"""Networks of the suite: published sizes, random weights."""

from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from maetok_hf import (
    AutoencoderMAE,
    FlowMatchEulerMaruyamaScheduler,
    LightningDiTTransformer1DModel,
    MAETokDiffusionPipeline,
    SiTTransformer1DModel,
    USiTTransformer1DModel,
)
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_parts import make_tokenizer
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from ..training_step import RECIPES, set_values


NUM_TOKENS, NUM_CHANNELS, NUM_CLASSES = 128, 32, 1000
TRANSFORMERS = {
    "SiT-S": "sit-s-256",
    "SiT-B": "sit-b-256",
    "SiT-L": "sit-l-256",
    "SiT-XL": "sit-xl-256",
    "LightningDiT-XL": "lightningdit-xl-256",
    "USiT-H": "usit-h-256",
    "USiT-2B": "usit-2b-256",
}
SCHEDULERS = {"SDE": FlowMatchEulerMaruyamaScheduler, "ODE": FlowMatchEulerDiscreteScheduler}


def fill(module: nn.Module) -> nn.Module:
    """Give a module that was built without memory its weights."""
    module.to_empty(device="cpu")
    set_values(module)
    return module


def tokenizer(resolution: int = 256) -> AutoencoderMAE:
    """The published tokenizer: ViT-B, 128 tokens of 32 channels, the decoder modulated by the latents."""
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"maetok-b-128-{min(resolution, 512)}.yaml")
    with torch.device("meta"):
        model = make_tokenizer(recipe, 0, None)
    model = fill(model)
    if model.config.sample_size != resolution:
        model.set_sample_size(resolution)
    model.register_to_config(latents_mean=0.0, latents_std=1.0)
    return model


def transformer(size: str, num_tokens: int = NUM_TOKENS, **overrides: Any) -> nn.Module:
    """A generator of a published size."""
    recipe = load_recipe(SiTRecipe, RECIPES / f"{TRANSFORMERS[size]}.yaml")
    kind = {
        "sit": SiTTransformer1DModel,
        "lightningdit": LightningDiTTransformer1DModel,
        "usit": USiTTransformer1DModel,
    }[recipe.architecture]
    with torch.device("meta"):
        model = kind(
            **{
                **recipe.model,
                "sample_size": num_tokens,
                "in_channels": NUM_CHANNELS,
                "num_classes": NUM_CLASSES,
                **overrides,
            }
        )
    return fill(model)


def transformer_inputs(
    batch_size: int, device: torch.device, dtype: torch.dtype, num_tokens: int = NUM_TOKENS
) -> tuple:
    """Latents, times and classes of a pass."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, num_tokens, NUM_CHANNELS, generator=generator)
    times = torch.linspace(0.1, 0.9, batch_size)
    labels = torch.arange(batch_size) * 7 % NUM_CLASSES
    return latents.to(device, dtype), times.to(device), labels.to(device)


def images(batch_size: int, resolution: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Noise in the shape of images."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch_size, 3, resolution, resolution, generator=generator).clamp(-1, 1).to(device, dtype)


def pipeline(size: str, solver: str, weak: str | None = None, guidance_free: bool = False) -> MAETokDiffusionPipeline:
    """A pipeline of published sizes."""
    make = partial(transformer, temperature_embedding=guidance_free)
    pipe = MAETokDiffusionPipeline(
        vae=tokenizer(),
        transformer=make(size),
        scheduler=SCHEDULERS[solver](),
        guidance_transformer=None if weak is None else transformer(weak),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
