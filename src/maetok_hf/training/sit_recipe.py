"""[`SiTRecipe`]: how a generator is trained on a tokenizer's latents."""

from dataclasses import dataclass, field
from typing import Literal

from .recipes import OptimizationRecipe, check_model_settings, check_positive


@dataclass(frozen=True, kw_only=True)
class SiTRecipe(OptimizationRecipe):
    """
    How a [`SiTTransformer1DModel`] is trained on a tokenizer's latents (MAETok section 4.1; SiT, arXiv 2401.08740).

    Args:
        model (`dict`, *optional*, defaults to `{}`):
            Arguments of [`SiTTransformer1DModel`]. Flags are merged into it. `sample_size` and `in_channels` come from
            the tokenizer; `num_classes` from the data set, unless that does not say.
        time_density (`str`, *optional*, defaults to `"uniform"`):
            Density of the training times: `"uniform"`, or `"lognormal"`, whose logarithm of noise over data is normal.
        time_shift (`float`, *optional*, defaults to 1.0):
            Factor s of t' = s t / (1 + (s - 1) t), the square root of latent size / 4096; 1 changes nothing.
    """

    model: dict = field(default_factory=dict)
    time_density: Literal["uniform", "lognormal"] = "uniform"
    time_shift: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        from ..models.transformer_sit import SiTTransformer1DModel

        derived = {"sample_size": "the tokenizer", "in_channels": "the tokenizer"}
        check_model_settings(SiTTransformer1DModel, self.model, derived)
        check_positive(self, "time_shift")
