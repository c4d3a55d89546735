"""A tiny pipeline and a record of what its transformer was asked."""

from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, MAETokDiffusionPipeline
from tests.testing_utils import tiny_autoencoder, tiny_transformer


NULL_CLASS = 10  # of `tiny_transformer`
FLOW_MODE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "sde": lambda: FlowMatchEulerMaruyamaScheduler(),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "heun": lambda: FlowMatchHeunScheduler(),
    "diffusers_heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW_MODE),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW_MODE),
}


def tiny_pipeline(
    scheduler: str | SchedulerMixin = "euler",
    id2label: dict[int, str] | None = None,
    vae: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    guidance_transformer: dict[str, Any] | None = None,
) -> MAETokDiffusionPipeline:
    """A pipeline of tiny models of random weights; `vae` and `transformer` override their configs. Without
    `guidance_transformer`, which is a shallower one, it has none."""
    pipe = MAETokDiffusionPipeline(
        tiny_autoencoder(**(vae or {})),
        tiny_transformer(**(transformer or {})),
        SCHEDULERS[scheduler]() if isinstance(scheduler, str) else scheduler,
        id2label,
        None if guidance_transformer is None else tiny_transformer(1, num_layers=1, **guidance_transformer),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


class Passes:
    """Every call of one of a pipeline's models: its time, its labels and its temperature."""

    def __init__(self, pipe: MAETokDiffusionPipeline, component: str = "transformer"):
        self.times: list[float] = []
        self.labels: list[list[int]] = []
        self.temperatures: list[float | None] = []
        self.inputs: list[torch.Tensor] = []
        getattr(pipe, component).register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states, timestep, class_labels = args
        temperature = kwargs.get("guidance_temperature")
        self.times.append(_only(timestep))
        self.labels.append(class_labels.tolist())
        self.temperatures.append(None if temperature is None else _only(temperature))
        self.inputs.append(hidden_states)

    @property
    def guided_times(self) -> list[float]:
        """Times of the null passes that followed a conditional one."""
        return [t for t, labels in zip(self.times, self.labels, strict=True) if set(labels) == {NULL_CLASS}]


def _only(values: torch.Tensor) -> float:
    """The number that all entries are."""
    assert (values == values[0]).all()
    return values[0].item()
