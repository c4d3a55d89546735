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
) -> MAETokDiffusionPipeline:
    """A pipeline of tiny models of random weights; `vae` and `transformer` override their configs."""
    pipe = MAETokDiffusionPipeline(
        tiny_autoencoder(**(vae or {})),
        tiny_transformer(**(transformer or {})),
        SCHEDULERS[scheduler]() if isinstance(scheduler, str) else scheduler,
        id2label,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


class Passes:
    """Every call of a pipeline's transformer: its time and its labels."""

    def __init__(self, pipe: MAETokDiffusionPipeline):
        self.times: list[float] = []
        self.labels: list[list[int]] = []
        pipe.transformer.register_forward_pre_hook(self._record)

    def _record(self, module: torch.nn.Module, args: tuple) -> None:
        _, timestep, class_labels = args
        assert (timestep == timestep[0]).all()
        self.times.append(timestep[0].item())
        self.labels.append(class_labels.tolist())

    @property
    def guided_times(self) -> list[float]:
        """Times of the null passes that followed a conditional one."""
        return [t for t, labels in zip(self.times, self.labels, strict=True) if set(labels) == {NULL_CLASS}]
