"""Class labels to images: the pipeline around a MAETok tokenizer and a transformer trained on its latents."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor

from ..models.autoencoder_mae import AutoencoderMAE
from ..models.latents import check_latent_statistics, denormalize_latents
from ..models.model_card import ModelCardMixin
from ..models.transformer_lightning_dit import LightningDiTTransformer1DModel
from ..models.transformer_sit import SiTTransformer1DModel
from ..models.transformer_usit import USiTTransformer1DModel
from ..schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .card import card_facts
from .components import check_guidance_transformer, check_scheduler, check_transformer
from .guidance import (
    DEFAULT_GUIDANCE_SCALE,
    check_guidance_interval,
    check_guidance_scale,
    combine_velocities,
    has_temperature,
    is_inside,
    resolve_guidance,
)
from .labels import check_id2label, classes_by_name, find_class, flatten_labels


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


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


def _is_compiled(*models: torch.nn.Module) -> bool:
    """Whether models, or blocks of them, go through `torch.compile`."""
    return any(
        is_compiled_module(module) or module._compiled_call_impl is not None
        for model in models
        for module in model.modules()
    )


class MAETokDiffusionPipeline(ModelCardMixin, DiffusionPipeline):
    r"""
    Class-conditional image generation on MAETok latents ([arXiv
    2502.03444](https://huggingface.co/papers/2502.03444)).

    This pipeline inherits from [`DiffusionPipeline`]. Check the superclass documentation for its generic methods
    (loading, saving, offloading, running on a particular device).

    Args:
        vae ([`AutoencoderMAE`]): Tokenizer; decodes latents into images. Its config holds the latents' statistics.
        transformer ([`SiTTransformer1DModel`], [`LightningDiTTransformer1DModel`] or [`USiTTransformer1DModel`]):
            Velocity model of normalised latents.
        scheduler ([`SchedulerMixin`]):
            [`FlowMatchEulerMaruyamaScheduler`] (the paper's), diffusers' [`FlowMatchEulerDiscreteScheduler`],
            [`FlowMatchHeunScheduler`], or [`UniPCMultistepScheduler`] and [`DPMSolverMultistepScheduler`] with
            `prediction_type="flow_prediction"` and `use_flow_sigmas=True`. It must follow the path the transformer was
            trained on; all but the first one follow the linear path.
        id2label (`dict[int, str]`, *optional*): Names of the classes; a name may list synonyms separated by commas.
        guidance_transformer (one of the same three, *optional*):
            Weak model of autoguidance, of the same latents, classes and path as `transformer`, such as a checkpoint
            after a quarter of its training; its size and class may be others. It is saved and loaded with the
            pipeline; `from_pretrained(..., guidance_transformer=None)` leaves it out.
        default_num_inference_steps (`int`, *optional*, defaults to 250):
            Solver steps of a call that gives none. This and the two below are in the config: saved, loaded, and
            replaced by `from_pretrained(..., default_num_inference_steps=50)`. Their defaults are the published
            settings at 256 pixels.
        default_guidance_scale (`float`, *optional*, defaults to 1.9): Scale of guidance of a call that gives none.
        default_guidance_interval (`list[float]`, *optional*, defaults to `[0.0, 0.75]`):
            Lowest and highest time of guidance of a call that gives none.

    Raises:
        ValueError: If `id2label` does not map class indices to names, or a default is out of range.
    """

    # the guidance transformer takes turns with the transformer, so it is offloaded by hand, after the last step
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["guidance_transformer"]
    _callback_tensor_inputs = ["latents", "velocity"]

    def __init__(
        self,
        vae: AutoencoderMAE,
        # spelled out: `from_pipe` passes on components of the very classes named here
        transformer: SiTTransformer1DModel | LightningDiTTransformer1DModel | USiTTransformer1DModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        guidance_transformer: (
            SiTTransformer1DModel | LightningDiTTransformer1DModel | USiTTransformer1DModel | None
        ) = None,
        default_num_inference_steps: int = 250,
        # by type: a given value of another one makes `from_pretrained` warn
        default_guidance_scale: float | int = DEFAULT_GUIDANCE_SCALE,
        default_guidance_interval: list | tuple = [0.0, 0.75],
    ):
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        _check_positive_integer("default_num_inference_steps", default_num_inference_steps)
        check_guidance_scale(default_guidance_scale, "default_guidance_scale")
        check_guidance_interval(default_guidance_interval, "default_guidance_interval")
        self.register_to_config(
            id2label=check_id2label(id2label),
            default_num_inference_steps=int(default_num_inference_steps),
            default_guidance_scale=float(default_guidance_scale),
            default_guidance_interval=[float(time) for time in default_guidance_interval],
        )
        self._current_timestep = None
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae.config.patch_size if getattr(self, "vae", None) is not None else 16
        )

    def save_pretrained(self, *args, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`], which would drop a guidance transformer that was assigned to a
        pipeline without one."""
        self.register_modules(guidance_transformer=self.guidance_transformer)
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """As [`DiffusionPipeline.download`], which leaves the Hub's reason for a refusal to the stack trace."""
        try:
            return super().download(pretrained_model_name, **kwargs)
        except OSError as error:
            if type(error) is not OSError or error.__cause__ is None:  # the Hub's own words
                raise
            reason = " ".join(str(error.__cause__).split())
            raise OSError(
                f"the pipeline {pretrained_model_name!r} could not be loaded from the Hub, and is not in the cache: "
                f"{reason}"
            ) from error.__cause__

    def _card_facts(self, repo_id: str) -> dict[str, Any]:
        return card_facts(self, repo_id)

    @property
    def id2label(self) -> dict[int, str] | None:
        """`dict[int, str]`: Names of the classes, from the config."""
        return self.config.id2label

    @property
    def labels(self) -> dict[str, list[int]]:
        """`dict[str, list[int]]`: Every class name and synonym with the classes that bear it; empty without
        `id2label`."""
        return classes_by_name(self.config.id2label)

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
        classes = self.labels
        return [find_class(name, classes) for name in ([label] if isinstance(label, str) else label)]

    def _get_class_indices(self, class_labels: Any) -> list[int]:
        """Indices of any accepted form of labels, in order."""
        flat = flatten_labels(class_labels)
        named = iter(self.get_label_ids([label for label in flat if isinstance(label, str)]))
        return [next(named) if isinstance(label, str) else label for label in flat]

    def _check_components(self) -> None:
        """The components must be there and have been trained for each other."""
        missing = [name for name in ("vae", "transformer", "scheduler") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"the pipeline was built without its {' and '.join(missing)}: set `pipe.{missing[0]}` before sampling."
            )
        check_transformer(self.transformer, self.vae, self.config.id2label)
        if self.guidance_transformer is not None:
            check_guidance_transformer(self.guidance_transformer, self.transformer)
        check_scheduler(self.scheduler, self.transformer.config.path)

    def check_inputs(
        self,
        labels: list[int],
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
            _check_positive_integer(name, value)
        check_guidance_interval(guidance_interval)
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

    def _evaluate(
        self,
        model: ModelMixin,
        cache_context: str,
        latents: torch.Tensor,
        time: float,
        labels: torch.Tensor,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """One pass of a model: its velocity at `latents` in float32 or better."""
        timestep = torch.full((latents.shape[0],), time, dtype=torch.float32, device=latents.device)
        kwargs = {"guidance_temperature": torch.full_like(timestep, temperature)} if has_temperature(model) else {}
        with model.cache_context(cache_context):
            velocity = model(latents.to(model.dtype), timestep, labels, return_dict=False, **kwargs)[0]
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def _predict_velocity(
        self, latents: torch.Tensor, time: float, labels: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Velocity at `latents` in float32 or better, guided by the run's method at a scale; 1 is no guidance."""
        if self.guidance_method == "gft":
            return self._evaluate(self.transformer, "cond", latents, time, labels, 1 / scale)
        velocity = self._evaluate(self.transformer, "cond", latents, time, labels)
        if scale == 1:
            return velocity
        if self.guidance_method == "autoguidance":
            # the caches of the two models are apart, so that a pass may have the same name in both
            base = self._evaluate(self.guidance_transformer, "cond", latents, time, labels)
        else:
            null_labels = torch.full_like(labels, self.transformer.config.num_classes)
            base = self._evaluate(self.transformer, "uncond", latents, time, null_labels)
        return combine_velocities(base.to(velocity), velocity, scale)

    def _offload_guidance_transformer(self) -> None:
        """Make room for the decoder, where `enable_model_cpu_offload` is on."""
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is self.guidance_transformer:
                hook.offload()

    @property
    def guidance_scale(self) -> float:
        """`float`: Scale of the current run; a callback may change `_guidance_scale` between steps. For guidance-free
        training it is the inverse of the temperature."""
        return self._guidance_scale

    @property
    def guidance_method(self) -> str:
        """`str`: How the current run is guided: `"cfg"`, `"autoguidance"` or `"gft"`."""
        return self._guidance_method

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
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        sigmas: list[float] | None = None,
        guidance_method: str | None = None,
        guidance_temperature: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images of classes. Steps and guidance that are not given are those of the pipeline's config.

        Args:
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                Class indices or names, one or (nested) lists of them; images come in their order. `None` samples
                unconditionally, from the null class: then both passes of autoguidance take the null class, and the
                other two methods, which strengthen a class, have nothing to do and refuse a scale or temperature.
            guidance_scale (`float`, *optional*):
                Scale s of guidance; the config's `default_guidance_scale` if neither it nor `guidance_temperature` is
                given. 1 is no guidance, and runs one pass a step. Models trained without guidance (`"gft"`) need at
                least 1.
            guidance_interval (`tuple[float, float]`, *optional*):
                Times `(low, high)` in [0, 1], both inclusive, between which guidance applies; outside, only the
                conditional pass of `transformer` runs ([arXiv
                2404.07724](https://huggingface.co/papers/2404.07724)), at temperature 1 if it has one. The config's
                `default_guidance_interval` if it is not given.
            num_inference_steps (`int`, *optional*):
                Number of solver steps; the config's `default_num_inference_steps` if it is not given.
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
                Called as `callback(pipe, step, timestep, tensors)` after each step; may return changed `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors that the callback gets: `latents` after the step, and `velocity`, the guided one
                in float32 or better that the step took.
            sigmas (`list[float]`, *optional*): Custom start times of the steps in (0, 1], instead of the scheduler's
                grid.
            guidance_method (`str`, *optional*):
                - `"cfg"`, classifier-free guidance: `null + s * (conditional - null)`, two passes a step inside the
                  interval, of `transformer` at temperature 1 if it has one;
                - `"autoguidance"` ([arXiv 2406.02507](https://huggingface.co/papers/2406.02507)): `weak + s * (strong
                  - weak)`, both conditional, a pass of `transformer` and one of `guidance_transformer`;
                - `"gft"`, guidance-free training ([arXiv 2501.15420](https://huggingface.co/papers/2501.15420)): the
                  transformer's own velocity at temperature `1 / s`, always one pass. The transformer must have been
                  trained for it, with `temperature_embedding=True` in its config.

                `None` is `"gft"` for such a transformer, else `"autoguidance"` if the pipeline has a
                `guidance_transformer`, else `"cfg"`. The name of a method chooses or declines the others.
            guidance_temperature (`float`, *optional*):
                Temperature of `"gft"` in (0, 1], instead of `guidance_scale`: `1 / s`; 1 is no guidance.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or a 1-tuple of them if `return_dict` is `False`.

        Raises:
            ValueError: If an argument is out of range or unknown, the guidance needs a component that is not there,
                or the components do not fit each other; raised before any computation.

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
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_interval is None:
            guidance_interval = self.config.default_guidance_interval
        labels = [] if class_labels is None else self._get_class_indices(class_labels)
        if class_labels is not None and not labels:
            raise ValueError("`class_labels` is empty: give at least one class, or None to sample unconditionally.")
        self.check_inputs(
            labels,
            guidance_interval,
            len(sigmas) if sigmas is not None else num_inference_steps,
            num_images_per_label,
            generator,
            latents,
            output_type,
            sigmas,
            callback_on_step_end_tensor_inputs,
        )
        if not labels and self.transformer.config.class_dropout_prob == 0:
            raise ValueError(
                "`class_labels=None` samples from the null class, but the `transformer` was trained without dropping "
                "classes (`class_dropout_prob` is 0 in its config): name a class."
            )
        self._guidance_method, self._guidance_scale = resolve_guidance(
            guidance_method,
            guidance_scale,
            guidance_temperature,
            self.transformer,
            self.guidance_transformer,
            default_scale=self.config.default_guidance_scale,
        )
        can_guide = bool(labels) or self.guidance_method == "autoguidance"
        asked = guidance_scale is not None or guidance_temperature is not None
        if asked and self.guidance_scale != 1 and not can_guide:
            name, value = "guidance_scale", guidance_scale
            if guidance_temperature is not None:
                name, value = "guidance_temperature", guidance_temperature
            raise ValueError(
                f"`{name}` is {value}, but `class_labels=None` samples from the null class, and "
                f"{self.guidance_method!r} strengthens a class: name a class, or leave `{name}` out."
            )
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 2. Prepare labels, noise and the time grid
        null_class = self.transformer.config.num_classes
        label_ids = torch.tensor(labels or [null_class], device=device).repeat_interleave(num_images_per_label)
        latents = self.prepare_latents(len(label_ids), device, generator, latents)
        times = self._set_timesteps(num_inference_steps, sigmas, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        step_kwargs = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        # 3. Integrate from noise to data
        models = [model for model in (self.transformer, self.guidance_transformer) if model is not None]
        compiled = _is_compiled(*models)
        with _evaluation_mode(*models), self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                if compiled:
                    # CUDA graphs may reuse the memory of a pass from here on, and not before the step's second pass
                    torch.compiler.cudagraph_mark_step_begin()
                # Heun's corrector belongs to the step that its predictor began
                corrector = self.scheduler.order == 2 and not self.scheduler.state_in_first_order
                inside = is_inside(times[i - 1 if corrector else i], guidance_interval)
                scale = self.guidance_scale if inside and can_guide else 1.0
                velocity = self._predict_velocity(latents, times[i], label_ids, scale)
                latents = self.scheduler.step(velocity, t, latents, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    latents = (callback_on_step_end(self, i, t, callback_kwargs) or {}).pop("latents", latents)
                progress_bar.update()

        self._current_timestep = None
        self._offload_guidance_transformer()

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
