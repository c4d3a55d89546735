"""The tab with pictures between two images or two classes."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from .abilities import LoadedPipeline, classes_of
from .interpolation import MAX_PICTURES, MIN_PICTURES, interpolate_classes, interpolate_images, weights
from .reconstruction import open_upload
from .widgets import (
    QUEUED,
    RunControls,
    Visitors,
    abilities_of,
    as_files,
    choices,
    gallery,
    image_field,
    with_messages,
)


# Gradio puts the progress of a call in the place of this default
PROGRESS = gr.Progress()
IMAGES_HELP = """
Both images are encoded; the pictures are decoded from points on the straight line between their latents. The ends are
their reconstructions.
"""
CLASSES_HELP = """
One image of each class is made from the same noise; the pictures are decoded from points on the straight line between
the two latents. (A class is an index for the generator, so that there is nothing between two classes to ask it for.)
The ends are the images that **Generate** gives for this seed.
"""


def _with_weights(pictures: list[Image.Image]) -> list[tuple[str, str]]:
    captions = [f"{weight:.0%} second" for weight in weights(len(pictures))]
    files = as_files({f"picture-{number}": image for number, image in enumerate(pictures)})
    return list(zip(files, captions, strict=True))


def interpolate_tab(
    pipelines: Sequence[LoadedPipeline], chosen: gr.Dropdown, visitors: Visitors
) -> tuple[RunControls, gr.Dropdown]:
    """
    Lay out the tab.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): What can be chosen.
        chosen (`gr.Dropdown`): Which one is, by its index.
        visitors ([`Visitors`]): Those of the page.

    Returns:
        `tuple[RunControls, gr.Dropdown]`: Its controls and the second class, which follow the choice.
    """
    with gr.Tabs():
        with gr.Tab("Two images"):
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=280):
                    first = image_field("First image")
                    second = image_field("Second image")
                    count = gr.Slider(MIN_PICTURES, MAX_PICTURES, 8, step=1, label="Pictures")
                with gr.Column(scale=2, min_width=300):
                    gr.Markdown(IMAGES_HELP)
                    start = gr.Button("Interpolate images", variant="primary", elem_id="interpolate-images")
                    pictures = gallery("From the first to the second", 4, elem_id="between-images")
        with gr.Tab("Two classes"):
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=280):
                    second_class = gr.Dropdown(
                        label="Second class",
                        render=False,
                        elem_id="second-class",
                        **second_class_options(pipelines[0]),
                    )
                    controls = RunControls(abilities_of(pipelines[0].pipe), below_class=second_class)
                    class_count = gr.Slider(MIN_PICTURES, MAX_PICTURES, 8, step=1, label="Pictures")
                with gr.Column(scale=2, min_width=300):
                    gr.Markdown(CLASSES_HELP)
                    class_start = gr.Button("Interpolate classes", variant="primary", elem_id="interpolate-classes")
                    class_pictures = gallery("From the first to the second", 4, elem_id="between-classes")

    @with_messages
    def images_between(index: int, first: str | None, second: str | None, count: int) -> list:
        if first is None or second is None:
            raise ValueError("Two images are needed: drop one into each field.")
        ends = [open_upload(path) for path in (first, second)]
        return _with_weights(interpolate_images(pipelines[index].pipe, *ends, count))

    @with_messages
    def classes_between(
        index: int, second: int, count: int, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any
    ) -> list:
        def report(done: int, total: int) -> None:
            visitors.check(request)
            progress((done, total), unit="steps")

        if second is None:
            raise ValueError("The field 'Second class' is empty: fill it in.")
        settings = controls.settings(*values)
        return _with_weights(interpolate_classes(pipelines[index].pipe, settings, second, count, report))

    start.click(images_between, [chosen, first, second, count], pictures, **QUEUED)
    class_start.click(classes_between, [chosen, second_class, class_count, *controls.inputs], class_pictures, **QUEUED)
    return controls, second_class


def second_class_options(loaded: LoadedPipeline) -> dict[str, Any]:
    """
    What the field for the second class offers.

    Args:
        loaded ([`LoadedPipeline`]): The pipeline.

    Returns:
        `dict[str, Any]`: Arguments of `gr.Dropdown`.
    """
    classes = classes_of(loaded.pipe)
    return {"choices": choices(classes), "value": list(classes)[min(1, len(classes) - 1)]}
