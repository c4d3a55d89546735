"""Transformers whose velocity is known in closed form, before or after training, and a pipeline around them."""

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin

from maetok_hf import MAETokDiffusionPipeline
from tests.pipelines.helpers import SCHEDULERS
from tests.schedulers.fields import Gaussian, Mixture
from tests.testing_utils import tiny_autoencoder


class AnalyticTransformer(ModelMixin, CacheMixin, ConfigMixin):
    """
    The exact velocity of each class; the last field is the null class's.

    With a temperature it predicts the optimum of guidance-free training, `null + (conditional - null) / temperature`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 1,
        in_channels: int = 3,
        num_classes: int = 1,
        class_dropout_prob: float = 0.1,
        path: str = "linear",
        temperature_embedding: bool = False,
    ):
        super().__init__()
        self.fields: list[Gaussian | Mixture] = []
        self.temperatures: list[float] = []
        # says where and in which precision it works
        self.register_buffer("anchor", torch.zeros(1, dtype=torch.float64))

    def forward(self, hidden_states, timestep, class_labels, return_dict=True, guidance_temperature=None):
        assert (guidance_temperature is not None) == self.config.temperature_embedding
        velocities = torch.stack([field.velocity(hidden_states, timestep[0].item()) for field in self.fields])
        velocity = velocities[class_labels, torch.arange(len(class_labels))]
        if guidance_temperature is not None:
            self.temperatures.append(guidance_temperature.unique().item())
            velocity = velocities[-1] + (velocity - velocities[-1]) / guidance_temperature[:, None, None]
        assert not return_dict
        return (velocity,)


class AffineTransformer(ModelMixin, CacheMixin, ConfigMixin):
    """
    A model that guidance-free training can bring to its optimum: one class, velocities affine in the sample and in the
    inverse temperature, and coefficients of their own at each time of a uniform grid.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int,
        sample_size: int = 1,
        in_channels: int = 3,
        num_classes: int = 1,
        class_dropout_prob: float = 0.1,
        path: str = "linear",
        temperature_embedding: bool = True,
    ):
        super().__init__()
        # of the null class, of the class, and of the class over the temperature: slopes and offsets
        self.coefficients = torch.nn.Parameter(torch.zeros(3, 2, num_steps, in_channels, dtype=torch.float64))

    def forward(
        self,
        hidden_states,
        timestep,
        class_labels,
        return_dict=True,
        class_drop_mask=None,
        guidance_temperature=None,
    ):
        if class_drop_mask is not None:
            class_labels = torch.where(class_drop_mask, self.config.num_classes, class_labels)
        index = (timestep * self.config.num_steps).round().long() - 1
        null, class_, over_temperature = self.coefficients[:, :, index]  # each (2, batch, channels)
        conditional = class_ + over_temperature / guidance_temperature[:, None]
        slope, offset = torch.where((class_labels == self.config.num_classes)[:, None], null, conditional)[:, :, None]
        assert not return_dict
        return (slope * hidden_states + offset,)


def analytic_transformer(*fields: Gaussian | Mixture, **config) -> AnalyticTransformer:
    """One field for each class and one for the null class, on the path of the fields."""
    model = AnalyticTransformer(num_classes=len(fields) - 1, path=fields[0].path, **config)
    model.fields = list(fields)
    return model


def analytic_pipeline(
    transformer: AnalyticTransformer | AffineTransformer,
    scheduler: str | SchedulerMixin = "heun",
    guidance_transformer: AnalyticTransformer | None = None,
) -> MAETokDiffusionPipeline:
    """The tokenizer is never asked for anything but the shape of its latents."""
    pipe = MAETokDiffusionPipeline(
        tiny_autoencoder(
            num_latent_tokens=transformer.config.sample_size, latent_channels=transformer.config.in_channels
        ),
        transformer,
        SCHEDULERS[scheduler]() if isinstance(scheduler, str) else scheduler,
        guidance_transformer=guidance_transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
