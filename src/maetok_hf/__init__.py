"""MAETok 1D image tokenizers and the generators on their latents, at home in the Hugging Face ecosystem."""

# diffusers decides whether a component can be loaded by looking these bases up in the library that its index names
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401

from ._register import register
from .conversion import convert_autoencoder, convert_transformer, convert_va_vae
from .models import (
    AutoencoderMAE,
    LightningDiTTransformer1DModel,
    SiTTransformer1DModel,
    USiTTransformer1DModel,
    denormalize_latents,
    normalize_latents,
)
from .pipelines import MAETokDiffusionPipeline
from .schedulers import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler


register()

__version__ = "0.1.0.dev0"

__all__ = [
    "AutoencoderMAE",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchHeunScheduler",
    "LightningDiTTransformer1DModel",
    "MAETokDiffusionPipeline",
    "SiTTransformer1DModel",
    "USiTTransformer1DModel",
    "convert_autoencoder",
    "convert_transformer",
    "convert_va_vae",
    "denormalize_latents",
    "normalize_latents",
]
