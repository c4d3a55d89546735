"""Images of a class on the page, with what the denoising looks like on the way.

What is shown on the way is the predicted clean image: the data that the velocity of a step points at. The noisy
latents themselves decode to nothing that a person could read until the last few steps.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..models.latents import denormalize_latents
from ..pipelines import MAETokDiffusionPipeline
from ..pipelines.guidance import check_guidance_interval
from ..schedulers.paths import path_coefficients
from .abilities import (
    NO_CLASS,
    NO_GUIDANCE,
    OWN_SOLVER,
    SCHEMES,
    LoadedPipeline,
    classes_of,
    schemes_of,
    solver_for,
    solvers_of,
)


# a CPU generator of torch takes the low 32 bits of a seed
MAX_SEED = 2**32 - 1
MAX_IMAGES = 16
MAX_STEPS = 1000
MAX_SCALE = 20.0


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """
    What is asked for. The image of number i has the seed `seed + i`.

    Args:
        class_index (`int`): A class, or `NO_CLASS`.
        seed (`int`, *optional*, defaults to 0): Seed of the first image.
        num_images (`int`, *optional*, defaults to 1): Images of the class.
        num_inference_steps (`int`, *optional*, defaults to 50): Steps of the solver.
        scheme (`str`, *optional*, defaults to `"none"`): How the class is strengthened, one of `SCHEMES`.
        scale (`float`, *optional*, defaults to 1.0): Scale of guidance; has no effect without guidance.
        interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): Lowest and highest time of guidance,
            noise at 1.
        solver (`str`, *optional*, defaults to `"own"`): A name of [`~maetok_hf.page.abilities.solvers_of`].

    Raises:
        ValueError: If a value is out of range; the message is for the person in front of the page.
    """

    class_index: int
    seed: int = 0
    num_images: int = 1
    num_inference_steps: int = 50
    scheme: str = NO_GUIDANCE
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    solver: str = OWN_SOLVER

    def __post_init__(self):
        # a page may be asked by a program, too, so that its sliders are no guard
        for name, value, low, high in (
            ("The number of images", self.num_images, 1, MAX_IMAGES),
            ("The number of steps", self.num_inference_steps, 1, MAX_STEPS),
            ("The seed", self.seed, 0, MAX_SEED),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"The seed of the last image would be above {MAX_SEED}: choose a smaller seed.")
        if not isinstance(self.scale, int | float) or not (math.isfinite(self.scale) and 0 <= self.scale <= MAX_SCALE):
            raise ValueError(f"The scale must be a number from 0 to {MAX_SCALE:g}, got {self.scale!r}.")
        if self.scheme not in SCHEMES:
            raise ValueError(f"The guidance must be one of {', '.join(SCHEMES)}, got {self.scheme!r}.")
        if self.is_guided:
            if self.interval[0] > self.interval[1]:
                raise ValueError(
                    f"Guidance cannot last from time {self.interval[0]:g} to {self.interval[1]:g}: move the lower end "
                    "below the upper one."
                )
            check_guidance_interval(tuple(self.interval))
            if self.class_index == NO_CLASS and self.scheme != "autoguidance":
                raise ValueError(
                    f"{SCHEMES[self.scheme]} strengthens a class, and there is none: choose a class, or no guidance."
                )

    @property
    def is_guided(self) -> bool:
        """`bool`: Whether guidance changes anything."""
        return self.scheme != NO_GUIDANCE and self.scale != 1

    @property
    def seeds(self) -> range:
        """`range`: The seed of every image."""
        return range(self.seed, self.seed + self.num_images)

    def check(self, pipe: MAETokDiffusionPipeline) -> None:
        """
        Args:
            pipe ([`MAETokDiffusionPipeline`]): The pipeline that is asked.

        Raises:
            ValueError: If it has not this class, scheme or solver.
        """
        for name, value, known in (
            ("class", self.class_index, classes_of(pipe)),
            ("guidance", self.scheme, schemes_of(pipe)),
            ("solver", self.solver, solvers_of(pipe)),
        ):
            if value not in known:
                raise ValueError(f"This pipeline has no {name} {value!r}: choose one of the list.")

    def call_arguments(self) -> dict[str, Any]:
        """
        The arguments of a call of the pipeline, but for its generators.

        Returns:
            `dict[str, Any]`: Plain values by name.
        """
        if self.class_index == NO_CLASS:
            arguments = {"class_labels": None, "num_images_per_label": self.num_images}
        else:
            arguments = {"class_labels": [self.class_index] * self.num_images}
        arguments["num_inference_steps"] = self.num_inference_steps
        if not self.is_guided:
            return arguments | {"guidance_scale": 1.0}
        guidance = {"guidance_method": self.scheme, "guidance_scale": float(self.scale)}
        return arguments | guidance | {"guidance_interval": tuple(map(float, self.interval))}

    def generators(self) -> list[torch.Generator]:
        """
        Returns:
            `list[torch.Generator]`: One for each image, on the CPU, so that every device gives the same images.
        """
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    A moment of a run.

    Args:
        step (`int`): Model evaluations that are done.
        num_steps (`int`): Model evaluations of the run.
        time (`float`): Time of the last evaluation, noise at 1; 0 at the end.
        images (`list[PIL.Image.Image]`): The predicted clean images, and at the end the images themselves.
        is_final (`bool`): Whether this is the end.
    """

    step: int
    num_steps: int
    time: float
    images: list[Image.Image]
    is_final: bool


def predicted_data(latents: torch.Tensor, velocity: torch.Tensor, time: float, path: str) -> torch.Tensor:
    """
    Where the data is if a velocity is right.

    Args:
        latents (`torch.Tensor`): Noisy latents at `time`.
        velocity (`torch.Tensor` of the shape of `latents`): Velocity at these.
        time (`float`): Time in [0, 1], noise at 1.
        path (`str`): Path of the transformer.

    Returns:
        `torch.Tensor` of the shape of `latents`: The `data` of `latents = alpha data + sigma noise` and
        `velocity = alpha' data + sigma' noise`.
    """
    alpha, sigma, alpha_slope, sigma_slope = path_coefficients(torch.tensor(time, dtype=torch.float64), path)
    weight = alpha * sigma_slope - sigma * alpha_slope
    return (sigma_slope / weight).item() * latents - (sigma / weight).item() * velocity


@torch.no_grad()
def decode_latents(pipe: MAETokDiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """
    Images of normalised latents, as a call of the pipeline makes them.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        latents (`torch.Tensor` of shape `(n, num_tokens, channels)`): Normalised latents.

    Returns:
        `list[PIL.Image.Image]`: The images.
    """
    raw = denormalize_latents(latents, pipe.vae.config).to(pipe.vae.dtype)
    return pipe.image_processor.postprocess(pipe.vae.decode(raw, return_dict=False)[0], output_type="pil")


def copy_for_run(pipe: MAETokDiffusionPipeline, solver: str) -> MAETokDiffusionPipeline:
    """
    The same models with a solver of their own, so that runs do not share a pipeline's state.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline; nothing of it is changed.
        solver (`str`): A name of [`~maetok_hf.page.abilities.solvers_of`].

    Returns:
        [`MAETokDiffusionPipeline`]: Without a progress bar.
    """
    copy = MAETokDiffusionPipeline(
        pipe.vae, pipe.transformer, solver_for(pipe, solver), pipe.id2label, pipe.guidance_transformer
    )
    copy.set_progress_bar_config(disable=True)
    return copy


def sample(
    pipe: MAETokDiffusionPipeline,
    settings: GenerationSettings,
    on_step: Callable[[int, int], None] | None = None,
    output_type: str = "pil",
) -> list[Image.Image] | torch.Tensor:
    """
    Images of a class.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        settings ([`GenerationSettings`]): What is asked for.
        on_step (`Callable[[int, int], None]`, *optional*): Called with the evaluations that are done, and all.
        output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, or `"latent"` for normalised latents.

    Returns:
        `list[PIL.Image.Image]` or `torch.Tensor` of shape `(num_images, num_tokens, channels)`: What a call of the
        pipeline with these seeds gives.

    Raises:
        ValueError: If the pipeline cannot do what is asked for.
    """
    settings.check(pipe)
    run = copy_for_run(pipe, settings.solver)

    def report(run: MAETokDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if on_step is not None:
            on_step(step + 1, run.num_timesteps)
        return {}

    return run(
        **settings.call_arguments(),
        generator=settings.generators(),
        output_type=output_type,
        callback_on_step_end=report,
        callback_on_step_end_tensor_inputs=[],
    ).images


def is_exiting() -> bool:
    """
    Whether Python has come to its end, at which it waits for threads: runs must end, too.

    Returns:
        `bool`: That.
    """
    return not threading.main_thread().is_alive()


class _Run(threading.Thread):
    """A call of a pipeline that puts a [`Progress`] or an error into a queue, and stops when it is told to."""

    def __init__(
        self,
        pipe: MAETokDiffusionPipeline,
        settings: GenerationSettings,
        num_previews: int,
        stop: threading.Event | None,
    ):
        super().__init__(name="page run")
        self.pipe, self.settings, self.num_previews = copy_for_run(pipe, settings.solver), settings, num_previews
        # `None` is the end of a run that was stopped
        self.moments: queue.SimpleQueue[Progress | BaseException | None] = queue.SimpleQueue()
        self.stop, self.abandoned = stop or threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            self._sample()
        except BaseException as error:  # the thread that waits for the queue raises it
            self.moments.put(error)

    def _sample(self) -> None:
        pipe, generators = self.pipe, self.settings.generators()
        # drawn here as the call would draw it, because no callback sees it
        latents = pipe.prepare_latents(self.settings.num_images, pipe.device, generators)

        def observe(pipe: MAETokDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            nonlocal latents
            pipe._interrupt = self.stop.is_set() or self.abandoned.is_set() or is_exiting()
            done, total = step + 1, pipe.num_timesteps
            # evenly over the run, and not at the end, which is shown anyhow
            if done < total and done * (self.num_previews + 1) // total > step * (self.num_previews + 1) // total:
                time = pipe.scheduler.sigmas[step].item()
                clean = predicted_data(latents, tensors["velocity"], time, pipe.transformer.config.path)
                self._put(done, total, time, decode_latents(pipe, clean))
            latents = tensors["latents"]
            return {}

        images = pipe(
            **self.settings.call_arguments(),
            generator=generators,
            latents=latents,
            callback_on_step_end=observe,
            callback_on_step_end_tensor_inputs=["latents", "velocity"],
        ).images
        if pipe.interrupt:
            self.moments.put(None)
        else:
            self._put(pipe.num_timesteps, pipe.num_timesteps, 0.0, images, is_final=True)

    def _put(self, step: int, total: int, time: float, images: list[Image.Image], is_final: bool = False) -> None:
        self.moments.put(Progress(step=step, num_steps=total, time=time, images=images, is_final=is_final))


def watch(
    pipe: MAETokDiffusionPipeline,
    settings: GenerationSettings,
    num_previews: int = 10,
    stop: threading.Event | None = None,
) -> Iterator[Progress]:
    """
    As [`sample`], and shows the way. Closing the iterator ends the run after its current step.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        settings ([`GenerationSettings`]): What is asked for.
        num_previews (`int`, *optional*, defaults to 10): How often the predicted clean images are shown, at most.
        stop (`threading.Event`, *optional*): When it is set, the run ends after its current step, without the images.

    Yields:
        [`Progress`]: The last one has the images that a call of the pipeline with these seeds gives.

    Raises:
        ValueError: If the pipeline cannot do what is asked for.
    """
    settings.check(pipe)
    run = _Run(pipe, settings, num_previews, stop)
    run.start()
    try:
        while True:
            moment = run.moments.get()
            if moment is None:
                return
            if isinstance(moment, BaseException):
                raise moment
            yield moment
            if moment.is_final:
                return
    finally:
        run.abandoned.set()


def python_code(loaded: LoadedPipeline, settings: GenerationSettings) -> str:
    """
    The program that makes the same images.

    Args:
        loaded ([`LoadedPipeline`]): The pipeline.
        settings ([`GenerationSettings`]): What was asked for.

    Returns:
        `str`: Lines of Python; `images` holds the images.
    """
    dtype, device = str(loaded.pipe.transformer.dtype), loaded.pipe.transformer.device.type
    options = f", revision={loaded.revision!r}" if loaded.revision is not None else ""
    options += f", dtype={dtype}" if dtype != "torch.float32" else ""
    load = f"pipe = MAETokDiffusionPipeline.from_pretrained({loaded.name!r}{options})"
    lines = ["import torch", "from maetok_hf import MAETokDiffusionPipeline"]
    lines += ["from maetok_hf.sampling import make_scheduler"] if settings.solver != OWN_SOLVER else []
    lines += ["", load + (f'.to("{device}")' if device != "cpu" else "")]
    lines += [f"pipe.scheduler = make_scheduler({settings.solver!r}, pipe)"] if settings.solver != OWN_SOLVER else []
    arguments = {argument: repr(value) for argument, value in settings.call_arguments().items()}
    if settings.class_index != NO_CLASS:
        arguments["class_labels"] = f"[{settings.class_index}] * {settings.num_images}"
    seeds = f"range({settings.seed}, {settings.seed + settings.num_images})"
    arguments["generator"] = f"[torch.Generator().manual_seed(seed) for seed in {seeds}]"
    lines += ["images = pipe(", *(f"    {argument}={text}," for argument, text in arguments.items()), ").images"]
    return "\n".join(lines)
