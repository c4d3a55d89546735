"""The page: one tab for each thing that can be tried."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from .abilities import LoadedPipeline, describe
from .compare_tab import compare_tab
from .generate_tab import generate_tab
from .interpolate_tab import interpolate_tab, second_class_options
from .reconstruct_tab import reconstruct_tab
from .widgets import UNQUEUED, Visitors, abilities_of, code


TITLE = "maetok_hf"
MAX_QUEUE = 64
# images of at most this size are shown with their pixels, not blurred
PIXEL_ART_SIZE = 128
PIXELATED_CSS = ".picture:not(#latent) img, .grid-wrap img { image-rendering: pixelated; }\n"
CSS = """
.gradio-container > main { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
#header h1 { margin: 0; }
#header p { margin: 0.2em 0 0; opacity: 0.75; }
/* small pictures fill their place, too */
.picture img { width: 100% !important; height: 100% !important; object-fit: contain; }
/* galleries are as high as their pictures, and as many stand in a row as fit */
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important; }
#generated .grid-container { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) !important; }
#denoising .grid-container, #tokens .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(86px, 1fr)) !important;
}
@media (max-width: 640px) {
  .grid-container, #generated .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important;
  }
  button[role="tab"] { padding-left: 9px !important; padding-right: 9px !important; }
}
.caption-label { font-size: 0.7rem !important; padding: 1px 5px !important; }
"""
# seconds between two looks for old files, and the age at which they go: those of a page that is open for a day
DELETE_CACHE = (3600, 86400)


def page_css(pipelines: Sequence[LoadedPipeline]) -> str:
    """
    Style sheet of the page.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): All pipelines of the page.

    Returns:
        `str`: Rules.
    """
    small = all(loaded.pipe.vae.config.sample_size <= PIXEL_ART_SIZE for loaded in pipelines)
    return CSS + (PIXELATED_CSS if small else "")


def _header(loaded: LoadedPipeline) -> str:
    return f"# {TITLE}\n{code(loaded.label)} · {describe(loaded.pipe)}"


def build_page(pipelines: Sequence[LoadedPipeline], other: LoadedPipeline | None = None) -> gr.Blocks:
    """
    Lay out the page. What a person does is kept in that person's session and nowhere else.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): What can be tried; the first one is chosen at first.
        other ([`LoadedPipeline`], *optional*): What the first one is compared with.

    Returns:
        `gr.Blocks`: The page, which [`~maetok_hf.page.server.serve`] serves.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=DELETE_CACHE, fill_width=True) as page:
        visitors = Visitors(page)
        header = gr.Markdown(_header(pipelines[0]), elem_id="header")
        chosen = gr.Dropdown(
            label="Pipeline",
            choices=[(loaded.label, index) for index, loaded in enumerate(pipelines)],
            value=0,
            visible=len(pipelines) > 1,
            elem_id="pipeline",
        )
        with gr.Tabs():
            with gr.Tab("Generate"):
                controls = generate_tab(pipelines, chosen)
            with gr.Tab("Reconstruct"):
                reconstruct_tab(pipelines, chosen)
            with gr.Tab("Interpolate"):
                between_controls, second_class = interpolate_tab(pipelines, chosen, visitors)
            if other is not None:
                with gr.Tab("Compare"):
                    compare_tab(pipelines[0], other, visitors)

        def choose(index: int) -> list[Any]:
            loaded = pipelines[index]
            abilities = abilities_of(loaded.pipe)
            return [
                _header(loaded),
                *controls.updates(abilities),
                *between_controls.updates(abilities),
                gr.update(**second_class_options(loaded)),
            ]

        if len(pipelines) > 1:
            outputs = [header, *controls.inputs, *between_controls.inputs, second_class]
            chosen.change(choose, chosen, outputs, **UNQUEUED)
    return page.queue(max_size=MAX_QUEUE, api_open=False)
