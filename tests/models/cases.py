"""Every model of the library in a tiny size: what laws that hold for all of them are parametrised over."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from maetok_hf import (
    AutoencoderMAE,
    LightningDiTTransformer1DModel,
    SiTTransformer1DModel,
    USiTTransformer1DModel,
)
from tests.testing_utils import (
    AUTOENCODER_CONFIG,
    AUTOENCODER_FORMS,
    TRANSFORMER_CONFIG,
    randomize_parameters,
    seeded_normal,
)


@dataclass(frozen=True)
class ModelCase:
    """A tiny model and inputs of its `forward`."""

    model_class: type[ModelMixin]
    config: dict[str, Any]
    output_shape: tuple[int, ...]

    def fresh(self, seed: int = 0, **overrides: Any) -> ModelMixin:
        """The model as its initialisation leaves it, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model_class(**{**self.config, **overrides})

    def build(self, seed: int = 0, **overrides: Any) -> ModelMixin:
        """Random weights (zero initialisations would make comparisons vacuous), evaluation mode."""
        return randomize_parameters(self.fresh(seed, **overrides), seed).eval()

    def inputs(self, batch_size: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of `forward`, the same tensors on every call."""
        if self.model_class is AutoencoderMAE:
            return {"sample": seeded_normal(batch_size, 3, 32, 32, seed=seed, dtype=dtype).clamp(-1, 1)}
        inputs = {
            "hidden_states": seeded_normal(batch_size, 6, 4, seed=seed, dtype=dtype),
            "timestep": torch.linspace(0.1, 0.9, batch_size),
            "class_labels": torch.arange(batch_size) * 10 % 11,  # class 0, the null class 10, ...
        }
        if self.config.get("temperature_embedding"):
            inputs["guidance_temperature"] = torch.linspace(0.3, 1.0, batch_size)
        return inputs

    def run(self, model: ModelMixin, **kwargs: Any) -> torch.Tensor:
        """The model's output on `inputs(**kwargs)`, without gradients."""
        with torch.no_grad():
            return model(**self.inputs(**kwargs)).sample


AUTOENCODER_CASES = {
    name: ModelCase(AutoencoderMAE, {**AUTOENCODER_CONFIG, **form}, (form.get("out_channels", 3), 32, 32))
    for name, form in AUTOENCODER_FORMS.items()
}
# the generators, with their options spread over them
TRANSFORMER_CASES = {
    "sit": ModelCase(SiTTransformer1DModel, TRANSFORMER_CONFIG, (6, 4)),
    "lightning_dit": ModelCase(
        LightningDiTTransformer1DModel,
        {**TRANSFORMER_CONFIG, "qk_norm": True, "temperature_embedding": True},
        (6, 4),
    ),
    "usit": ModelCase(
        USiTTransformer1DModel, {**TRANSFORMER_CONFIG, "num_layers": 3, "temperature_embedding": True}, (6, 4)
    ),
}
MODEL_CASES = AUTOENCODER_CASES | TRANSFORMER_CASES
