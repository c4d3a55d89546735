"""The tab that generates images of a class and shows their denoising."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from .abilities import LoadedPipeline
from .generation import python_code, watch
from .widgets import QUEUED, UNQUEUED, RunControls, abilities_of, as_files, gallery, with_messages


DEFAULT_IMAGES = 4


def generate_tab(pipelines: Sequence[LoadedPipeline], chosen: gr.Dropdown) -> RunControls:
    """
    Lay out the tab.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): What can be chosen.
        chosen (`gr.Dropdown`): Which one is, by its index.

    Returns:
        [`RunControls`]: Its controls, which follow the choice.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            controls = RunControls(abilities_of(pipelines[0].pipe), num_images=DEFAULT_IMAGES)
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            status = gr.Markdown("Choose a class and press **Generate**.", elem_id="generate-status")
            images = gallery("Images", 4, elem_id="generated")
            strip = gallery("Denoising of the first image: the predicted clean image", 6, elem_id="denoising")
            with gr.Accordion("The same in Python", open=False):
                code = gr.Code(language="python", interactive=False, show_label=False, elem_id="code")

    @with_messages
    def run(index: int, *values: Any) -> Iterator[tuple]:
        settings, loaded = controls.settings(*values), pipelines[index]
        program, begin, frames = python_code(loaded, settings), time.monotonic(), []
        for moment in watch(loaded.pipe, settings):
            captions = [f"seed {seed}" for seed in settings.seeds]
            files = as_files({f"seed-{s}": image for s, image in zip(settings.seeds, moment.images, strict=True)})
            frames.append((files[0], "end" if moment.is_final else f"time {moment.time:.2f}"))
            text = (
                f"Done: {moment.num_steps} steps in {time.monotonic() - begin:.1f} s."
                if moment.is_final
                else f"Step {moment.step} of {moment.num_steps}: predicted clean images at time {moment.time:.2f}."
            )
            yield list(zip(files, captions, strict=True)), frames, text, program

    outputs = [images, strip, status, code]
    event = start.click(run, [chosen, *controls.inputs], outputs, show_progress="minimal", **QUEUED)
    stop.click(lambda: "Stopped.", None, status, cancels=[event], **UNQUEUED)
    return controls
