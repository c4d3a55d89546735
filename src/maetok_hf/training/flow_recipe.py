"""[`FlowRecipe`]: what all training on the flow-matching objective has in common."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .recipes import OptimizationRecipe, check_at_least_zero, check_positive


@dataclass(frozen=True, kw_only=True)
class FlowRecipe(OptimizationRecipe):
    """
    Times and terms of the flow-matching objective (SiT, arXiv 2401.08740), and the samples that a run shows.

    Args:
        time_density (`str`, *optional*, defaults to `"uniform"`):
            Density of the training times: `"uniform"`, or `"lognormal"`, whose logarithm of noise over data is normal.
        time_shift (`float`, *optional*, defaults to 1.0):
            Factor s of t' = s t / (1 + (s - 1) t), the square root of latent size / 4096; 1 changes nothing.
        direction_weight (`float`, *optional*, defaults to 0.0):
            Weight of LightningDiT's direction term, 1 - cos of predicted and true velocity over the channels; 0 for
            none.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Guidance of the samples that the run shows, and of the exported pipeline's calls that give none; 1 for no
            guidance. A model of guidance-free training has the temperature 1 / `guidance_scale`.
        guidance_interval (`list[float]`, *optional*, defaults to `[0.0, 1.0]`):
            Times between which they are guided, lowest and highest; outside, a model of guidance-free training has the
            temperature 1.
        num_inference_steps (`int`, *optional*, defaults to 250):
            Solver steps of these samples, and of the pipeline's calls that give none.
    """

    time_density: Literal["uniform", "lognormal"] = "uniform"
    time_shift: float = 1.0
    direction_weight: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    num_inference_steps: int = 250

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "time_shift", "num_inference_steps")
        check_at_least_zero(self, "direction_weight")
        for name in ("time_shift", "direction_weight", "guidance_scale"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        if not self.guidance_scale >= 1:
            raise ValueError(f"`guidance_scale` must be at least 1, which is no guidance, got {self.guidance_scale}.")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be two times, the lower one first, in [0, 1], got {self.guidance_interval}."
            )

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
        if self.guidance_scale == 1:
            unused["guidance_interval"] = "`guidance_scale` is 1"
        return unused
