"""[`SiTRecipe`]: how a generator is trained on a tokenizer's latents."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import ModelMixin

from .recipes import (
    OptimizationRecipe,
    check_at_least_zero,
    check_model_settings,
    check_positive,
)


@dataclass(frozen=True, kw_only=True)
class SiTRecipe(OptimizationRecipe):
    """
    How a generator is trained on a tokenizer's latents (MAETok section 4.1 and appendix B.2; SiT, arXiv 2401.08740).

    Args:
        architecture (`str`, *optional*, defaults to `"sit"`):
            `"sit"` ([`SiTTransformer1DModel`]), `"lightningdit"` ([`LightningDiTTransformer1DModel`]) or `"usit"`
            ([`USiTTransformer1DModel`]).
        finetuning (`bool`, *optional*, defaults to `False`):
            Continue from a trained pipeline's transformer, which must be of this architecture, instead of beginning
            with a new one.
        model (`dict`, *optional*, defaults to `{}`):
            Arguments of the architecture's class. Flags are merged into it. `sample_size` and `in_channels` come from
            the tokenizer; `num_classes` from the data set, unless that does not say. Fine-tuning keeps the trained
            transformer's.
        time_density (`str`, *optional*, defaults to `"uniform"`):
            Density of the training times: `"uniform"`, or `"lognormal"`, whose logarithm of noise over data is normal.
        time_shift (`float`, *optional*, defaults to 1.0):
            Factor s of t' = s t / (1 + (s - 1) t), the square root of latent size / 4096; 1 changes nothing.
        direction_weight (`float`, *optional*, defaults to 0.0):
            Weight of LightningDiT's direction term, 1 - cos of predicted and true velocity over the channels; 0 for
            none.
        guidance_free (`bool`, *optional*, defaults to `False`):
            Train for sampling in one pass per step without guidance (GFT, arXiv 2501.15420). The transformer gets a
            temperature embedding.
        alignment_weight (`float`, *optional*, defaults to 0.0):
            Weight of the alignment of one block with DINOv2's features (REPA, arXiv 2410.06940, where it is 0.5); 0
            for none. It needs the images: latents that are cached do not have them.
        alignment_layer (`int`, *optional*, defaults to 8):
            Number of that block, counted from 1.
        alignment_hidden_size (`int`, *optional*, defaults to 2048):
            Width of the projector from the block to the features.
        alignment_model (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Folder or Hub repository of the DINOv2 model.
        alignment_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the DINOv2 model: `"bfloat16"`, `"float16"` or `"float32"`.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Guidance of the samples that the run shows; 1 for none. A `guidance_free` model has the temperature
            1 / `guidance_scale`.
        guidance_interval (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Times between which they are guided, lowest and highest; outside, a `guidance_free` model has the
            temperature 1.
        num_inference_steps (`int`, *optional*, defaults to 250):
            Solver steps of these samples.
    """

    architecture: Literal["sit", "lightningdit", "usit"] = "sit"
    finetuning: bool = False
    model: dict = field(default_factory=dict)
    time_density: Literal["uniform", "lognormal"] = "uniform"
    time_shift: float = 1.0
    direction_weight: float = 0.0
    guidance_free: bool = False
    alignment_weight: float = 0.0
    alignment_layer: int = 8
    alignment_hidden_size: int = 2048
    alignment_model: str = "facebook/dinov2-base"
    alignment_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    num_inference_steps: int = 250

    def __post_init__(self):
        super().__post_init__()
        if not self.finetuning:
            derived = {
                "sample_size": "the tokenizer",
                "in_channels": "the tokenizer",
                "temperature_embedding": "`guidance_free`",
            }
            check_model_settings(self.transformer_class, self.model, derived)
        check_positive(self, "time_shift", "alignment_layer", "alignment_hidden_size", "num_inference_steps")
        check_at_least_zero(self, "direction_weight", "alignment_weight")
        for name in ("time_shift", "direction_weight", "alignment_weight", "guidance_scale"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        if not self.guidance_scale >= 1:
            raise ValueError(f"`guidance_scale` must be at least 1, which is no guidance, got {self.guidance_scale}.")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be two times, the lower one first, in [0, 1], got {self.guidance_interval}."
            )
        if self.guidance_free and self.model.get("class_dropout_prob", 0.1) == 0:
            raise ValueError(
                "`guidance_free` learns the unguided velocity from dropped classes, but `model` sets "
                "class_dropout_prob=0: the published value is 0.1."
            )

    @property
    def transformer_class(self) -> type[ModelMixin]:
        """`type`: The class of the architecture."""
        from ..models import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel

        return {
            "sit": SiTTransformer1DModel,
            "lightningdit": LightningDiTTransformer1DModel,
            "usit": USiTTransformer1DModel,
        }[self.architecture]

    @property
    def needs_images(self) -> bool:
        """`bool`: Whether the objective takes the images beside their latents, so that these cannot be cached."""
        return self.alignment_weight > 0

    @property
    def sampling_arguments(self) -> dict[str, Any]:
        """`dict[str, Any]`: How [`MAETokDiffusionPipeline`] is called for the samples that a run shows."""
        return {
            "guidance_scale": self.guidance_scale,
            "guidance_interval": tuple(self.guidance_interval),
            "num_inference_steps": self.num_inference_steps,
        }

    def unused_settings(self) -> dict[str, str]:
        unused = super().unused_settings()
        if self.finetuning:
            unused["model"] = "`finetuning` keeps the trained transformer's"
        if self.alignment_weight == 0:
            names = [name for name in self.__dataclass_fields__ if name.startswith("alignment_")]
            names.remove("alignment_weight")
            unused |= dict.fromkeys(names, "`alignment_weight` is 0")
        if self.guidance_scale == 1:
            unused["guidance_interval"] = "`guidance_scale` is 1"
        return unused
