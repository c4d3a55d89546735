"""Heun's method on the grid that SiT samples with."""

import numpy as np
import torch
from diffusers import FlowMatchHeunDiscreteScheduler


class FlowMatchHeunScheduler(FlowMatchHeunDiscreteScheduler):
    """
    diffusers' [`FlowMatchHeunDiscreteScheduler`] that takes its grid as an argument, as the flow-match Euler scheduler
    does.

    By default the grid is uniform, `linspace(1, 1 / steps, steps)` and then 0; the parent ends its grid just above 0
    and spends a whole step there. The last step has no corrector, so that `steps` steps take `2 * steps - 1`
    evaluations.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Set the grid of a sampling run.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps.
            device (`str` or `torch.device`, *optional*): Where the timesteps go.
            sigmas (`list[float]`, *optional*): Start times of the steps in (0, 1], decreasing; the last step ends at
                0.

        Raises:
            ValueError: If the number of steps is not positive, or a custom grid is not decreasing within (0, 1] or has
                another number of steps.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps <= 0:
                raise ValueError(f"`num_inference_steps` must be positive, got {num_inference_steps}.")
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        times = np.asarray(sigmas, dtype=np.float64)
        if num_inference_steps is not None and num_inference_steps != len(times):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but the grid has {len(times)} entries.")
        if not (times.ndim == 1 and times.size > 0 and times[0] <= 1 and times[-1] > 0 and (np.diff(times) < 0).all()):
            raise ValueError(f"a custom grid must decrease within (0, 1], got {sigmas}.")

        shift = self.config.shift
        times = shift * times / (1 + (shift - 1) * times)
        # the parent's layout: every time but the first is visited twice, as a corrector and as a predictor
        visited = np.concatenate([times[:1], times[1:].repeat(2)])
        self.num_inference_steps = len(times)
        # on the CPU: the parent compares them with numbers at every step, which would mean waiting for a device
        self.sigmas = torch.from_numpy(np.append(visited, 0.0)).to(torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.prev_derivative = None
        self.dt = None
        self._step_index = None
        self._begin_index = None
