"""The tab that generates images of a class and shows their denoising."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from .abilities import LoadedPipeline
from .generation import python_code, watch
from .widgets import QUEUED, UNQUEUED, RunControls, abilities_of, as_files, gallery, with_messages


DEFAULT_IMAGES = 4


class StopSignal:
    """What the stop button of one person sets: every session gets a copy of the page's state, and so its own."""

    def __init__(self):
        self.event = threading.Event()

    def __deepcopy__(self, memo: dict) -> "StopSignal":
        return StopSignal()


def generate_tab(pipelines: Sequence[LoadedPipeline], chosen: gr.Dropdown) -> RunControls:
    """
    Lay out the tab.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): What can be chosen.
        chosen (`gr.Dropdown`): Which one is, by its index.

    Returns:
        [`RunControls`]: Its controls, which follow the choice.
    """
    signal = gr.State(StopSignal())
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
    def run(signal: StopSignal, index: int, *values: Any) -> Iterator[tuple]:
        settings, loaded = controls.settings(*values), pipelines[index]
        program, begin, frames = python_code(loaded, settings), time.monotonic(), []
        moment = None
        for moment in watch(loaded.pipe, settings, stop=signal.event):
            captions = [f"seed {seed}" for seed in settings.seeds]
            files = as_files({f"seed-{s}": image for s, image in zip(settings.seeds, moment.images, strict=True)})
            frames.append((files[0], "end" if moment.is_final else f"time {moment.time:.2f}"))
            num_steps = moment.num_steps
            text = (
                f"Done: {num_steps} step{'s' if num_steps > 1 else ''} in {time.monotonic() - begin:.1f} s."
                if moment.is_final
                else f"Step {moment.step} of {num_steps}: predicted clean images at time {moment.time:.2f}."
            )
            yield list(zip(files, captions, strict=True)), frames, text, program
        if moment is None:
            yield gr.skip(), gr.skip(), "Stopped before the first picture.", program
        elif not moment.is_final:
            text = f"Stopped. The pictures are those of step {moment.step} of {moment.num_steps}."
            yield gr.skip(), gr.skip(), text, program

    outputs = [images, strip, status, code]
    # at the click, so that a run that still waits in the queue can be stopped
    clicked = start.click(lambda signal: signal.event.clear(), signal, None, **UNQUEUED)
    clicked.then(run, [signal, chosen, *controls.inputs], outputs, show_progress="minimal", **QUEUED)
    # the run tells that it has stopped: what Gradio cancels gets badges of an error
    stop.click(lambda signal: signal.event.set(), signal, None, **UNQUEUED)
    return controls
