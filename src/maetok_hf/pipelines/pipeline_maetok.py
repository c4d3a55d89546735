"""Class labels to images: the pipeline around a MAETok tokenizer and a transformer trained on its latents."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..models.autoencoder_mae import AutoencoderMAE
from ..models.latents import check_latent_statistics, denormalize_latents
from ..models.transformer_sit import SiTTransformer1DModel
from ..schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# times are float32 in some schedulers: the interval's ends still count as inside
_INTERVAL_TOLERANCE = 1e-6


def _check_id2label(id2label: Any) -> dict[int, str] | None:
    """Class names with integer keys, which JSON turns into strings."""
    if id2label is None:
        return None
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` must map class indices to names, such as {{0: 'tench'}}, got {id2label!r}.")
    for index, name in id2label.items():
        if re.fullmatch(r"\d+", str(index)) is None or not isinstance(name, str):
            raise ValueError(f"`id2label` must map class indices to names, but has the entry {index!r}: {name!r}.")
    return {int(index): name for index, name in id2label.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _flatten_labels(class_labels: Any) -> list[int | str]:
    """Indices and names of any accepted form of labels, in order."""
    if isinstance(class_labels, str):
        return [class_labels]
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        return _flatten_labels(class_labels.tolist())
    if isinstance(class_labels, (list, tuple, range)):
        return [label for entry in class_labels for label in _flatten_labels(entry)]
    if isinstance(class_labels, (int, np.integer)) and not isinstance(class_labels, bool):
        return [int(class_labels)]
    raise ValueError(
        f"`class_labels` must hold class indices (integers) or names, got {class_labels!r} of "
        f"{type(class_labels).__name__}."
    )


@contextmanager
def _evaluation_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Models that a trainer hands over in training mode would drop labels and residual branches at random."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class MAETokDiffusionPipeline(DiffusionPipeline):
    r"""
    Class-conditional image generation on MAETok latents ([arXiv
    2502.03444](https://huggingface.co/papers/2502.03444)).

    This pipeline inherits from [`DiffusionPipeline`]. Check the superclass documentation for its generic methods
    (loading, saving, offloading, running on a particular device).

    Args:
        vae ([`AutoencoderMAE`]): Tokenizer; decodes latents into images. Its config holds the latents' statistics.
        transformer ([`SiTTransformer1DModel`]): Velocity model of normalised latents.
        scheduler ([`SchedulerMixin`]):
            [`FlowMatchEulerMaruyamaScheduler`] (the paper's), diffusers' [`FlowMatchEulerDiscreteScheduler`],
            [`FlowMatchHeunScheduler`], or [`UniPCMultistepScheduler`] and [`DPMSolverMultistepScheduler`] with
            `prediction_type="flow_prediction"` and `use_flow_sigmas=True`. It must follow the path the transformer was
            trained on; all but the first one follow the linear path.
        id2label (`dict[int, str]`, *optional*): Names of the classes; a name may list synonyms separated by commas.

    Raises:
        ValueError: If `id2label` does not map class indices to names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderMAE,
        transformer: SiTTransformer1DModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=_check_id2label(id2label))
        self._current_timestep = None
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae.config.patch_size if getattr(self, "vae", None) is not None else 16
        )

    @property
    def id2label(self) -> dict[int, str] | None:
        """`dict[int, str]`: Names of the classes, from the config."""
        return self.config.id2label

    @property
    def labels(self) -> dict[str, list[int]]:
        """`dict[str, list[int]]`: Every class name and synonym with the classes that bear it; empty without
        `id2label`."""
        labels: dict[str, list[int]] = {}
        for index, names in (self.config.id2label or {}).items():
            # a name without synonyms is its own only synonym
            for name in dict.fromkeys([names.strip(), *map(str.strip, names.split(","))]):
                labels.setdefault(name, []).append(int(index))
        return labels

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Class indices of class names.

        Args:
            label (`str` or `list[str]`): Names; one string is one name. A name of `id2label` or one of its
                comma-separated synonyms.

        Returns:
            `list[int]`: One index per name.

        Raises:
            ValueError: If the pipeline has no `id2label`, or a name is unknown or borne by several classes.
        """
        labels = self.labels
        indices = []
        for name in [label] if isinstance(label, str) else label:
            if not labels:
                raise ValueError(
                    f"the class name {name!r} needs `id2label`, which this pipeline does not have: pass the class "
                    "index, or build the pipeline with names, `MAETokDiffusionPipeline(..., id2label={0: 'tench'})`."
                )
            found = labels.get(name.strip(), []) if isinstance(name, str) else []
            if not found:
                similar = difflib.get_close_matches(str(name), labels, n=3)
                hint = f"did you mean {' or '.join(map(repr, similar))}?" if similar else "see `pipe.labels`."
                raise ValueError(f"{name!r} is not a class name of this pipeline: {hint}")
            if len(found) > 1:
                raise ValueError(f"{name!r} is the name of classes {found}: pass the index of the one you mean.")
            indices.append(found[0])
        return indices

    def _get_class_indices(self, class_labels: Any) -> list[int]:
        """Indices of any accepted form of labels, in order."""
        flat = _flatten_labels(class_labels)
        named = iter(self.get_label_ids([label for label in flat if isinstance(label, str)]))
        return [next(named) if isinstance(label, str) else label for label in flat]

    def _check_components(self) -> None:
        """Sizes and paths of the components must fit each other."""
        missing = [name for name in ("vae", "transformer", "scheduler") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"the pipeline was built without its {' and '.join(missing)}: set `pipe.{missing[0]}` before sampling."
            )
        vae, transformer = self.vae.config, self.transformer.config
        pairs = (
            ("tokens", "sample_size", transformer.sample_size, self.vae.latent_sequence_length),
            ("channels", "in_channels", transformer.in_channels, vae.latent_channels),
        )
        for what, name, takes, gives in pairs:
            if takes != gives:
                raise ValueError(
                    f"the transformer's `{name}` is {takes}, but the vae decodes latents of {gives} {what}: these two "
                    "were not trained together."
                )
        names = self.config.id2label or {}
        unknown = [index for index in map(int, names) if not 0 <= index < transformer.num_classes]
        if unknown:
            raise ValueError(
                f"`id2label` names classes {unknown}, but the transformer has {transformer.num_classes} classes."
            )

        scheduler, config = self.scheduler, self.scheduler.config
        if isinstance(scheduler, FlowMatchEulerMaruyamaScheduler):
            path = config.path
        elif isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)) or (
            config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
        ):
            path = "linear"
        else:
            raise ValueError(
                f"the scheduler {type(scheduler).__name__} does not integrate flow-matching models: use "
                "FlowMatchEulerMaruyamaScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunScheduler, or UniPC "
                "or DPM-Solver++ with `prediction_type='flow_prediction'` and `use_flow_sigmas=True`."
            )
        if path != transformer.path:
            raise ValueError(
                f"the transformer was trained on the {transformer.path} path, but {type(scheduler).__name__} follows "
                f"the {path} one: use FlowMatchEulerMaruyamaScheduler(path={transformer.path!r})."
            )
        if config.get("invert_sigmas"):
            raise ValueError("a scheduler with `invert_sigmas=True` runs towards the noise: set it to False.")
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "a scheduler with `use_dynamic_shifting=True` shifts times by the size of 2D latents: set it to False "
                "and give a fixed `shift`."
            )

    def check_inputs(
        self,
        labels: list[int],
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        num_images_per_label: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        sigmas: list[float] | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """
        Check what `__call__` is given, before any computation; see there.

        Raises:
            ValueError: If anything is wrong; the message names the argument, its value and the fix.
        """
        self._check_components()
        num_classes = self.transformer.config.num_classes
        out_of_range = [label for label in labels if not 0 <= label < num_classes]
        if out_of_range:
            raise ValueError(
                f"`class_labels` must lie in [0, {num_classes - 1}], got {out_of_range}; "
                "pass None to sample unconditionally."
            )
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_label", num_images_per_label),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if not _is_number(guidance_scale) or not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(
                f"`guidance_scale` must be a finite number of at least 0 (1 is no guidance), got {guidance_scale!r}."
            )
        is_pair = isinstance(guidance_interval, (list, tuple)) and len(guidance_interval) == 2
        if (
            not is_pair
            or not all(map(_is_number, guidance_interval))
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                "`guidance_interval` must be (low, high), times in [0, 1] with low <= high and noise at 1, got "
                f"{guidance_interval!r}."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if sigmas is not None:
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`sigmas`: {type(self.scheduler).__name__} takes no custom grid; pass `num_inference_steps`."
                )
            grid = np.asarray(sigmas, dtype=np.float64)
            if grid.ndim != 1 or not (grid[0] <= 1 and grid[-1] > 0 and (np.diff(grid) < 0).all()):
                raise ValueError(
                    f"`sigmas` must hold the start time of every step, decreasing within (0, 1], got {sigmas}."
                )

        # class_labels=None is one label, the null class
        batch_size = max(1, len(labels)) * num_images_per_label
        generators = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(g, torch.Generator) for g in generators) and generator is not None:
            raise ValueError(
                f"`generator` must be a `torch.Generator` or a list of them, got {generator!r}: for a seed pass "
                "`torch.Generator().manual_seed(seed)`."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {batch_size} images are asked for: give one per "
                "image, or a single generator for all."
            )
        if latents is not None:
            expected = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
            if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
                raise ValueError(f"`latents` must be a tensor of floats, got {latents!r}.")
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` must have shape {expected} (images, tokens, channels), got {tuple(latents.shape)}."
                )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        if output_type != "latent":
            check_latent_statistics(self.vae.config)

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The initial noise.

        Args:
            batch_size (`int`): Number of images.
            device (`torch.device`): Where the latents go.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the noise, one or one an
                image.
            latents (`torch.Tensor`, *optional*): The noise itself.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`: In float32 or better, whatever
            the models' dtype, since the solver's state lives here.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float64 if latents.dtype == torch.float64 else torch.float32)
        shape = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _set_timesteps(
        self, num_inference_steps: int, sigmas: list[float] | None, device: torch.device
    ) -> list[float]:
        """Set the scheduler's grid and return the time in [0, 1] of each model evaluation."""
        takes_sigmas = "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters
        if sigmas is None and takes_sigmas and not isinstance(self.scheduler, FlowMatchEulerMaruyamaScheduler):
            # the flow-match schedulers' own grid ends just above 0 and wastes a step there; SiT samples on the uniform
            # one
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=np.asarray(sigmas), device=device)
        self.scheduler.set_begin_index(0)
        # timesteps are rounded to integers in some schedulers, sigmas never are; one transfer for the whole run
        return self.scheduler.sigmas.tolist()

    def _predict_velocity(
        self, latents: torch.Tensor, time: float, labels: torch.Tensor, null_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Velocity at `latents` in float32 or better: the conditional pass, guided by a null one if `null_labels` is
        given."""
        model_input = latents.to(self.transformer.dtype)
        timestep = torch.full((latents.shape[0],), time, dtype=torch.float32, device=latents.device)
        with self.transformer.cache_context("cond"):
            velocity = self.transformer(model_input, timestep, labels, return_dict=False)[0]
        velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
        if null_labels is None:
            return velocity
        with self.transformer.cache_context("uncond"):
            null_velocity = self.transformer(model_input, timestep, null_labels, return_dict=False)[0].to(velocity)
        return null_velocity + self.guidance_scale * (velocity - null_velocity)

    @property
    def guidance_scale(self) -> float:
        """`float`: Scale of the current run; a callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """`int`: Number of model evaluation times of the current run."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """`torch.Tensor`: The scheduler's timestep of the current model evaluation, which caches ask for; `None`
        outside a run."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """`bool`: Whether the current run skips its remaining steps; a callback may set `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list | torch.Tensor | None = None,
        guidance_scale: float = 1.9,
        guidance_interval: tuple[float, float] = (0.0, 0.75),
        num_inference_steps: int = 250,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        sigmas: list[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images of classes. The defaults are the published settings at 256 pixels (MAETok, section 4.1).

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                Class indices or names, one or (nested) lists of them; images come in their order. `None` samples
                unconditionally, from the null class.
            guidance_scale (`float`, *optional*, defaults to 1.9):
                Scale s of classifier-free guidance: velocities combine as `null + s * (conditional - null)`. 1 is no
                guidance, and runs no null pass.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.75)`):
                Times `(low, high)` in [0, 1], both inclusive, between which guidance applies; outside, only the
                conditional pass runs ([arXiv 2404.07724](https://huggingface.co/papers/2404.07724)).
            num_inference_steps (`int`, *optional*, defaults to 250): Number of solver steps.
            num_images_per_label (`int`, *optional*, defaults to 1): Images of each label, next to each other.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise. With one generator per image an image does not depend on the others in its batch.
            latents (`torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`, *optional*):
                Initial standard normal noise, instead of drawing it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (float NHWC in [0, 1]), `"pt"` (float NCHW in [0, 1]) or `"latent"` (normalised
                latents).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors that the callback gets.
            sigmas (`list[float]`, *optional*): Custom start times of the steps in (0, 1], instead of the scheduler's
                grid.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or a 1-tuple of them if `return_dict` is `False`.

        Raises:
            ValueError: If an argument is out of range or unknown, or the components do not fit each other; raised
                before any computation.

        Examples:

        ```py
        >>> import torch
        >>> from maetok_hf import MAETokDiffusionPipeline

        >>> pipe = MAETokDiffusionPipeline.from_pretrained("outputs/demo/pipeline")
        >>> image = pipe(class_labels="7", generator=torch.Generator().manual_seed(0)).images[0]
        ```
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        labels = [] if class_labels is None else self._get_class_indices(class_labels)
        if class_labels is not None and not labels:
            raise ValueError("`class_labels` is empty: give at least one class, or None to sample unconditionally.")
        self.check_inputs(
            labels,
            guidance_scale,
            guidance_interval,
            len(sigmas) if sigmas is not None else num_inference_steps,
            num_images_per_label,
            generator,
            latents,
            output_type,
            sigmas,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 2. Prepare labels, noise and the time grid
        null_class = self.transformer.config.num_classes
        unconditional = not labels
        label_ids = torch.tensor(labels or [null_class], device=device).repeat_interleave(num_images_per_label)
        null_labels = torch.full_like(label_ids, null_class)
        latents = self.prepare_latents(len(label_ids), device, generator, latents)
        times = self._set_timesteps(num_inference_steps, sigmas, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        step_kwargs = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        # 3. Integrate from noise to data
        low, high = guidance_interval[0] - _INTERVAL_TOLERANCE, guidance_interval[1] + _INTERVAL_TOLERANCE
        with _evaluation_mode(self.transformer), self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                # Heun's corrector belongs to the step that its predictor began
                corrector = self.scheduler.order == 2 and not self.scheduler.state_in_first_order
                inside = low <= times[i - 1 if corrector else i] <= high
                guided = inside and self.guidance_scale != 1 and not unconditional
                velocity = self._predict_velocity(latents, times[i], label_ids, null_labels if guided else None)
                latents = self.scheduler.step(velocity, t, latents, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    latents = (callback_on_step_end(self, i, t, callback_kwargs) or {}).pop("latents", latents)
                progress_bar.update()

        self._current_timestep = None

        # 4. Decode
        if output_type == "latent":
            image = latents
        else:
            raw = denormalize_latents(latents, self.vae.config).to(self.vae.dtype)
            with _evaluation_mode(self.vae):
                image = self.vae.decode(raw, return_dict=False)[0]
            image = self.image_processor.postprocess(image, output_type=output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
