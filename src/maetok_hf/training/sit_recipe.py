"""[`SiTRecipe`]: how a generator is trained on a tokenizer's latents."""

import math
from dataclasses import dataclass, field
from typing import Literal

from diffusers import ModelMixin

from .flow_recipe import FlowRecipe
from .recipes import check_at_least_zero, check_model_settings, check_positive


@dataclass(frozen=True, kw_only=True)
class SiTRecipe(FlowRecipe):
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
        guidance_free (`bool`, *optional*, defaults to `False`):
            Train for sampling in one pass per step without guidance (GFT, arXiv 2501.15420). The transformer gets a
            temperature embedding.
        alignment_weight (`float`, *optional*, defaults to 0.0):
            Weight of the alignment of one block with DINOv2's features (REPA, arXiv 2410.06940, where it is 0.5); 0
            for none. It needs the images, or latents that were cached with `--alignment_model`.
        alignment_layer (`int`, *optional*, defaults to 8):
            Number of that block, counted from 1.
        alignment_hidden_size (`int`, *optional*, defaults to 2048):
            Width of the projector from the block to the features.
        alignment_model (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Folder or Hub repository of the DINOv2 model. With features that are cached it takes no part in the
            training, but must be theirs, as must its precision.
        alignment_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the DINOv2 model: `"bfloat16"`, `"float16"` or `"float32"`.
    """

    architecture: Literal["sit", "lightningdit", "usit"] = "sit"
    finetuning: bool = False
    model: dict = field(default_factory=dict)
    guidance_free: bool = False
    alignment_weight: float = 0.0
    alignment_layer: int = 8
    alignment_hidden_size: int = 2048
    alignment_model: str = "facebook/dinov2-base"
    alignment_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self):
        super().__post_init__()
        if not self.finetuning:
            derived = {
                "sample_size": "the tokenizer",
                "in_channels": "the tokenizer",
                "temperature_embedding": "`guidance_free`",
            }
            check_model_settings(self.transformer_class, self.model, derived)
        check_positive(self, "alignment_layer", "alignment_hidden_size")
        check_at_least_zero(self, "alignment_weight")
        if math.isinf(self.alignment_weight):
            raise ValueError(f"`alignment_weight` must be finite, got {self.alignment_weight}.")
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

    def unused_settings(self) -> dict[str, str]:
        unused = super().unused_settings()
        if self.finetuning:
            unused["model"] = "`finetuning` keeps the trained transformer's"
        if self.alignment_weight == 0:
            names = [name for name in self.__dataclass_fields__ if name.startswith("alignment_")]
            names.remove("alignment_weight")
            unused |= dict.fromkeys(names, "`alignment_weight` is 0")
        return unused
