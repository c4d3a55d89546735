"""The SDE sampler of SiT and MAETok: Euler-Maruyama on the reverse-time SDE of a flow-matching model."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .paths import check_path, path_coefficients


@dataclass
class FlowMatchEulerMaruyamaSchedulerOutput(BaseOutput):
    """
    Output of the scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor` of the shape of `sample`): The sample at the next, less noisy time.
    """

    prev_sample: torch.Tensor


class FlowMatchEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Euler-Maruyama for flow-matching models (SiT, [arXiv 2401.08740](https://huggingface.co/papers/2401.08740), section
    3.1), the sampler of the MAETok paper.

    With the score `s(x, t) = ((alpha / alpha') v - x) / (sigma^2 - (alpha / alpha') sigma' sigma)` of a velocity model
    `v` and the diffusion coefficient `w(t) = 2 t` (on either path), a step from t to t + dt (dt < 0) is
    `x + (v - w / 2 s) dt + sqrt(w |dt|) n` with standard normal `n`. Times run over `linspace(1, last_step_size,
    steps)`, then to 0 in a last step without noise, so that `steps` steps take `steps - 1` draws.

    Timesteps are on the 0..`num_train_timesteps` scale, as in diffusers' flow-match schedulers; `sigmas` holds the
    times in [0, 1] in float64.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): Scale of the timesteps.
        shift (`float`, *optional*, defaults to 1.0): Time shift `t' = shift * t / (1 + (shift - 1) * t)` of the grid.
        path (`str`, *optional*, defaults to `"linear"`): Path the model was trained on, `"linear"` or `"cosine"`.
        last_step_size (`float`, *optional*, defaults to 0.04): Time at which the last step starts, before any shift.

    Raises:
        ValueError: If the path is unknown or a number is out of range.
    """

    _compatibles = []
    order = 1
    # the state starts as standard normal noise
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        path: str = "linear",
        last_step_size: float = 0.04,
    ):
        check_path(path)
        if num_train_timesteps <= 0:
            raise ValueError(f"`num_train_timesteps` must be positive, got {num_train_timesteps}.")
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"`shift` must be positive and finite, got {shift}.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` must lie in (0, 1), got {last_step_size}.")
        self.num_inference_steps = None
        self._set_grid(np.linspace(1, 1 / num_train_timesteps, num_train_timesteps), None)

    def _set_grid(self, times: np.ndarray, device: str | torch.device | None) -> None:
        shift = self.config.shift
        times = shift * times / (1 + (shift - 1) * times)
        # on the CPU: read as Python numbers at every step, without a device sync
        self.sigmas = torch.from_numpy(np.append(times, 0.0))
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the current step; counts up with every `step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, set by a pipeline with `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Set the index of the first step.

        Args:
            begin_index (`int`, *optional*, defaults to 0): Index into `timesteps`.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Set the grid of a sampling run.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, each one model evaluation.
            device (`str` or `torch.device`, *optional*): Where `timesteps` goes; `sigmas` stays on the CPU.
            sigmas (`list[float]`, *optional*): Start times of the steps in (0, 1], decreasing; the last step ends at
                0.
            timesteps (`list[float]`, *optional*): The same, times `num_train_timesteps`.

        Raises:
            ValueError: If the number of steps is not positive, or a custom grid is not decreasing within (0, 1], or
                more than one way of giving the grid disagrees.
        """
        if sigmas is not None and timesteps is not None:
            raise ValueError("pass either `sigmas` or `timesteps`, not both.")
        if timesteps is not None:
            sigmas = [float(t) / self.config.num_train_timesteps for t in timesteps]
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps <= 0:
                raise ValueError(f"`num_inference_steps` must be positive, got {num_inference_steps}.")
            times = np.linspace(1.0, self.config.last_step_size, num_inference_steps)
        else:
            times = np.asarray(sigmas, dtype=np.float64)
            if num_inference_steps is not None and num_inference_steps != len(times):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but the grid has {len(times)} entries."
                )
            valid = (
                times.ndim == 1 and times.size > 0 and times[0] <= 1 and times[-1] > 0 and (np.diff(times) < 0).all()
            )
            if not valid:
                raise ValueError(
                    f"a custom grid must decrease within (0, 1] (times `num_train_timesteps`), got {sigmas}."
                )
        self.num_inference_steps = len(times)
        self._set_grid(times, device)

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        Position of a timestep in a schedule.

        Args:
            timestep (`float` or `torch.Tensor`): One of the schedule's timesteps.
            schedule_timesteps (`torch.Tensor`, *optional*): The schedule; the scheduler's own `timesteps` by default.

        Returns:
            `int`: Its index.

        Raises:
            ValueError: If it is not one of them.
        """
        found = ((self.timesteps if schedule_timesteps is None else schedule_timesteps) == timestep).nonzero()
        if len(found) == 0:
            raise ValueError(f"`timestep` {float(timestep)} is not one of the scheduler's `timesteps`.")
        return found[0].item()

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        if self.begin_index is None:
            if isinstance(timestep, torch.Tensor):
                timestep = timestep.to(self.timesteps.device)
            self._step_index = self.index_for_timestep(timestep)
        else:
            self._step_index = self._begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Flow-matching models take the sample as it is: returns `sample`, whatever the `timestep`."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The forward process: `alpha(t) * sample + sigma(t) * noise`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): Data.
            timestep (`float` or `torch.Tensor`): One value or one per sample, in [0, `num_train_timesteps`].
            noise (`torch.Tensor` of the shape of `sample`): Standard normal noise.

        Returns:
            `torch.Tensor`: Shape and dtype of `sample`.

        Raises:
            ValueError: If a timestep is out of range, or `noise` does not have the shape of `sample`.
        """
        if noise.shape != sample.shape:
            raise ValueError(
                f"`noise` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(noise.shape)}."
            )
        t = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device) / self.config.num_train_timesteps
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"`timestep` must lie in [0, {self.config.num_train_timesteps}], got {timestep}.")
        # times rounded to bfloat16 would be off by up to 0.4 %, so the coefficients are rounded instead
        alpha, sigma = (c.to(sample.dtype) for c in path_coefficients(t, self.config.path)[:2])
        shape = (-1, *(1,) * (sample.ndim - 1))
        return alpha.reshape(shape) * sample + sigma.reshape(shape) * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerMaruyamaSchedulerOutput | tuple:
        """
        One Euler-Maruyama step.

        Args:
            model_output (`torch.Tensor`): The model's velocity at `timestep`, of the shape of `sample`.
            timestep (`float` or `torch.Tensor`): The current one of `timesteps`.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): The current sample.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise, one or one a
                sample.
            noise (`torch.Tensor` of the shape of `sample`, *optional*): The noise itself, instead of drawing it from
                `generator`. The last step adds none.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`FlowMatchEulerMaruyamaSchedulerOutput`] with `prev_sample` in float32, or in float64 if `sample` is; a
            1-tuple of it if `return_dict` is `False`.

        Raises:
            ValueError: If `timestep` is an integer (an index) or not one of `timesteps`, the schedule has ended,
                `noise` does not have the shape of `sample`, or a list of generators is not one per sample.
        """
        if isinstance(timestep, (int, np.integer)) or (
            isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()
        ):
            raise ValueError(
                f"`timestep` must be one of the scheduler's `timesteps`, not an integer such as an index, got "
                f"{timestep}."
            )
        if noise is not None and noise.shape != sample.shape:
            raise ValueError(
                f"`noise` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(noise.shape)}."
            )
        if isinstance(generator, list) and len(generator) != sample.shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but there are {sample.shape[0]} samples: give one per "
                "sample, or a single generator for all."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done: call `set_timesteps` before another run.")

        t, t_next = self.sigmas[self._step_index], self.sigmas[self._step_index + 1]
        dt = (t_next - t).item()
        # drift = v - w/2 * score, written as coefficients of v and x that are plain numbers
        alpha, sigma, alpha_derivative, sigma_derivative = path_coefficients(t, self.config.path)
        ratio = alpha / alpha_derivative
        half_w_over_denominator = t / (sigma**2 - ratio * sigma_derivative * sigma)  # w / 2 = t
        on_velocity = (1 - half_w_over_denominator * ratio).item()
        on_sample = half_w_over_denominator.item()

        state_dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        sample = sample.to(state_dtype)
        drift = on_velocity * model_output.to(state_dtype) + on_sample * sample
        prev_sample = sample + drift * dt

        if t_next.item() > 0:
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=state_dtype)
            prev_sample = prev_sample + math.sqrt(-2 * t.item() * dt) * noise.to(sample.device, state_dtype)

        self._step_index += 1
        return FlowMatchEulerMaruyamaSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
