"""What the tabs of the page have in common: controls of a run, a field for an image, and messages."""

import functools
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image

from ..pipelines import MAETokDiffusionPipeline
from .abilities import NO_GUIDANCE, OWN_SOLVER, SCHEMES, classes_of, default_scheme, schemes_of, solvers_of
from .generation import MAX_IMAGES, MAX_STEPS, GenerationSettings, is_exiting


# all events that compute share one queue: one of them runs, and the others see their place in it
QUEUED: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
# for what only changes the page
UNQUEUED: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
MAX_SCALE_ON_SLIDER = 5.0


def image_field(label: str) -> gr.Image:
    """
    A field to drop an image into, whose value is the path of the file in the server's folder of uploads.

    Args:
        label (`str`): What it is called.

    Returns:
        `gr.Image`: The field.
    """
    field = gr.Image(label=label, sources=["upload", "clipboard"], height=260)
    # Gradio would decode the file itself, with less care. (It writes a .pyi file next to every subclass.)
    field.preprocess = lambda payload: None if payload is None else uploaded(payload.path)
    return field


def uploaded(path: str | None) -> str | None:
    """
    Make sure that a file is a person's own: what a browser says may be any path.

    Args:
        path (`str`, *optional*): Path of a file that is said to be uploaded.

    Returns:
        `str`, *optional*: The same.

    Raises:
        gr.Error: If it is not in the folder of uploads.
    """
    if path is None or (Path(path).is_file() and is_in_or_equal(path, get_upload_folder())):
        return path
    raise gr.Error("This image is no longer here: drop it again.", print_exception=False)


def picture(label: str, **options: Any) -> gr.Image:
    """
    A place for a picture under a heading.

    Args:
        label (`str`): What it is called.
        options: Further arguments of `gr.Image`.

    Returns:
        `gr.Image`: The place; what is downloaded from it is a PNG file.
    """
    with gr.Column(min_width=140):
        gr.Markdown(f"**{label}**")
        return gr.Image(
            label=label,
            show_label=False,  # Gradio puts it over the picture
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_classes="picture",
            **options,
        )


def gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    """
    A place for several pictures under a heading.

    Args:
        label (`str`): What it is called.
        columns (`int`): Pictures in a row of a wide window.
        options: Further arguments of `gr.Gallery`.

    Returns:
        `gr.Gallery`: The place; what is downloaded from it are PNG files.
    """
    gr.Markdown(f"**{label}**")
    return gr.Gallery(
        label=label,
        show_label=False,  # Gradio puts it over the first picture
        columns=columns,
        interactive=False,
        format="png",
        object_fit="contain",
        **({"height": "auto"} | options),
    )


def as_files(images: Mapping[str, Image.Image]) -> list[str]:
    """
    Write pictures for the browser. Gradio would name them by their contents, and write an equal one again while a
    browser reads it.

    Args:
        images (`Mapping[str, PIL.Image.Image]`): Pictures by name.

    Returns:
        `list[str]`: Paths of PNG files of these names in a new folder, which go with Gradio's own files.
    """
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return [str(folder / f"{name}.png") for name in images]


def literal(text: str) -> str:
    """
    Words of others for Markdown: names of classes and folders may hold anything.

    Args:
        text (`str`): The words.

    Returns:
        `str`: Markdown that shows them as they are.
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """
    As [`literal`], in the letters of code.

    Args:
        text (`str`): The words.

    Returns:
        `str`: Markdown.
    """
    return f"<code>{literal(text)}</code>"


class Visitors:
    """
    Knows whose page was closed, so that nothing computes for them in front of others who wait.

    Args:
        page (`gr.Blocks`): The page.
    """

    def __init__(self, page: gr.Blocks):
        # a page that is opened again has another session
        self._gone: set[str] = set()
        page.unload(self._leave)

    def _leave(self, request: gr.Request) -> None:
        self._gone.add(request.session_hash)

    def check(self, request: gr.Request) -> None:
        """
        Args:
            request (`gr.Request`): Of an event.

        Raises:
            ValueError: If the page that it came from was closed, or the server has ended.
        """
        if request.session_hash in self._gone or is_exiting():
            raise ValueError("The page was closed.")


# what a person can do something about
EXPECTED = (ValueError, FloatingPointError, torch.OutOfMemoryError)


def warn(error: Exception) -> str:
    """
    Tell the person in front of the page what is wrong. An error of Gradio would put a badge over every picture.

    Args:
        error (`Exception`): One of `EXPECTED`.

    Returns:
        `str`: What was told.
    """
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        message = "The device has not enough memory for this: ask for fewer images."
    gr.Warning(message, duration=20, title="That does not work")
    return message


def with_messages(function: Callable) -> Callable:
    """
    Make what is wrong a message on the page instead of a traceback, and leave all else as it is.

    Args:
        function (`Callable`): What an event calls, a generator too.

    Returns:
        `Callable`: The same with messages.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except EXPECTED as error:
                warn(error)
                yield gr.skip()

        return generate

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except EXPECTED as error:
            warn(error)
            return gr.skip()

    return call


def choices(names: Mapping[Any, str]) -> list[tuple[str, Any]]:
    """
    What `gr.Dropdown` takes.

    Args:
        names (`Mapping[Any, str]`): Words by value.

    Returns:
        `list[tuple[str, Any]]`: Words and values.
    """
    return [(words, value) for value, words in names.items()]


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """
    What the controls of a run offer.

    Args:
        classes (`dict[int, str]`): Names by class index.
        schemes (`Sequence[str]`): Some of `SCHEMES`.
        solvers (`dict[str, str]`): Words by name of solver.
        scheme (`str`): The scheme that is chosen at first.
        defaults (`MAETokDiffusionPipeline`): Whose steps, scale and interval are there at first.
    """

    classes: dict[int, str]
    schemes: Sequence[str]
    solvers: dict[str, str]
    scheme: str
    defaults: MAETokDiffusionPipeline

    def values(self) -> dict[str, dict[str, Any]]:
        """
        Returns:
            `dict[str, dict[str, Any]]`: By name of a control, its arguments that depend on the pipeline.
        """
        config, guided = self.defaults.config, self.scheme != NO_GUIDANCE
        low, high = config.default_guidance_interval
        return {
            "class_index": {"choices": choices(self.classes), "value": next(iter(self.classes))},
            "num_inference_steps": {"value": min(config.default_num_inference_steps, MAX_STEPS)},
            "solver": {"choices": choices(self.solvers), "value": OWN_SOLVER},
            "scheme": {
                "choices": choices({scheme: SCHEMES[scheme] for scheme in self.schemes}),
                "value": self.scheme,
            },
            "scale": {
                "value": config.default_guidance_scale,
                "maximum": max(MAX_SCALE_ON_SLIDER, config.default_guidance_scale),
                "visible": guided,
            },
            "low": {"value": low, "visible": guided},
            "high": {"value": high, "visible": guided},
        }


class RunControls:
    """
    The controls of a run: class, seed, steps, guidance, solver.

    Args:
        abilities ([`Abilities`]): What they offer.
        num_images (`int`, *optional*): The number of images at first; without it there is no control for it, and runs
            have one image.
        below_class (`gr.Dropdown`, *optional*): Another field, not rendered yet, to stand below the class.
    """

    def __init__(self, abilities: Abilities, num_images: int | None = None, below_class: gr.Dropdown | None = None):
        values = abilities.values()
        self.components: dict[str, Any] = {}
        add = self.components.__setitem__
        add("class_index", gr.Dropdown(label="Class", filterable=True, **values["class_index"]))
        if below_class is not None:
            below_class.render()
        with gr.Row():
            # no limits, as Gradio would round a number, and tell of one out of range by badges over every picture
            add("seed", gr.Number(label="Seed", value=0, step=1, min_width=100))
            if num_images is not None:
                slider = gr.Slider(1, MAX_IMAGES, num_images, step=1, label="Images", min_width=100)
                add("num_images", slider)
        steps = gr.Slider(1, MAX_STEPS, step=1, label="Steps", **values["num_inference_steps"])
        add("num_inference_steps", steps)
        add("solver", gr.Dropdown(label="Solver", **values["solver"]))
        add("scheme", gr.Dropdown(label="Guidance", **values["scheme"]))
        add("scale", gr.Slider(0.0, step=0.05, label="Scale (1 is no guidance)", **values["scale"]))
        add("low", gr.Slider(0, 1, step=0.01, label="Guided from time (0 is the image)", **values["low"]))
        add("high", gr.Slider(0, 1, step=0.01, label="to time (1 is noise)", **values["high"]))
        guided = [self.components[name] for name in ("scale", "low", "high")]
        self.components["scheme"].change(
            lambda scheme: [gr.update(visible=scheme != NO_GUIDANCE)] * 3,
            self.components["scheme"],
            guided,
            **UNQUEUED,
        )

    @property
    def inputs(self) -> list[Any]:
        """`list`: The components, in the order in which [`~RunControls.settings`] takes their values."""
        return list(self.components.values())

    def settings(self, *values: Any) -> GenerationSettings:
        """
        What the controls ask for.

        Args:
            values: Values of `inputs`.

        Returns:
            [`GenerationSettings`]: Checked.

        Raises:
            ValueError: If a value is missing or out of range.
        """
        given = dict(zip(self.components, values, strict=True))
        for name, value in given.items():
            if value is None or value == []:
                raise ValueError(f"The field '{self.components[name].label}' is empty: fill it in.")
        interval = (given.pop("low"), given.pop("high"))
        return GenerationSettings(**given, interval=interval)

    def updates(self, abilities: Abilities) -> list[Any]:
        """
        What the controls become when another pipeline is chosen.

        Args:
            abilities ([`Abilities`]): What they offer then.

        Returns:
            `list`: An update of each of `inputs`.
        """
        values = abilities.values()
        return [gr.update(**values.get(name, {})) for name in self.components]


def abilities_of(pipe: MAETokDiffusionPipeline) -> Abilities:
    """
    What one pipeline can be asked for.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        [`Abilities`]: That.
    """
    return Abilities(
        classes=classes_of(pipe),
        schemes=schemes_of(pipe),
        solvers=solvers_of(pipe),
        scheme=default_scheme(pipe),
        defaults=pipe,
    )
