"""The tab that shows what a tokenizer makes of an image."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch

from .abilities import LoadedPipeline
from .pictures import latent_picture
from .reconstruction import (
    format_psnr,
    open_upload,
    reconstruct,
    seen_by_generator,
    token_effects,
    token_maps,
)
from .widgets import EXPECTED, QUEUED, as_files, gallery, image_field, picture, warn, with_messages


HELP = """
Drop an image, or paste one. Its centre square, in the size of the model, is encoded to tokens and decoded again. It
stays on this server and is deleted when the server ends.
"""
NO_IMAGE = "No image yet."
TOKENS_HELP = """
Each picture shows one token: how much the reconstruction changes when this token is replaced by the mean token.
Light is much, on the same scale in all; the number is the mean change in levels of 255.
"""


def reconstruct_tab(pipelines: Sequence[LoadedPipeline], chosen: gr.Dropdown) -> None:
    """
    Lay out the tab.

    Args:
        pipelines (`Sequence[LoadedPipeline]`): What can be chosen.
        chosen (`gr.Dropdown`): Which one is, by its index.
    """
    # the pipeline's index and the raw tokens of the image that is shown
    shown = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            upload = image_field("Your image")
            gr.Markdown(HELP)
        with gr.Column(scale=2, min_width=300):
            status = gr.Markdown(NO_IMAGE, elem_id="reconstruct-status")
            with gr.Row():
                original = picture("What the model sees", height=220, elem_id="original")
                decoded = picture("Reconstruction", height=220, elem_id="reconstruction")
                difference = picture("Difference", height=220, elem_id="difference")
            latent = picture("Token latent: a column is a token, a row is a channel", elem_id="latent")
            explain = gr.Button("Show which token is what", interactive=False, elem_id="explain")
            with gr.Column(visible=False) as token_panel:
                tokens = gallery("Tokens", 8, elem_id="tokens")
                gr.Markdown(TOKENS_HELP)

    hidden = [None, gr.update(visible=False)]

    def nothing(text: str) -> tuple:
        return None, text, None, None, None, None, gr.update(interactive=False), *hidden

    def show(index: int, path: str | None) -> tuple:
        if path is None:
            return nothing(NO_IMAGE)
        pipe = pipelines[index].pipe
        try:
            result = reconstruct(pipe, open_upload(path))
        except EXPECTED as error:
            return nothing(f"**{warn(error)}**")
        text = [f"### {format_psnr(result.psnr)}", *result.notes]
        text.append(f"The largest difference is {result.largest_difference} of 255 levels.")
        return (
            (index, result.latent),
            f"{text[0]}\n{' '.join(text[1:])}",
            *as_files(
                {
                    "original": result.original,
                    "reconstruction": result.reconstruction,
                    "difference": result.difference,
                    "latent": latent_picture(seen_by_generator(pipe, result.latent)),
                }
            ),
            gr.update(interactive=True),
            *hidden,
        )

    @with_messages
    def explain_tokens(shown: tuple[int, torch.Tensor] | None) -> Iterator[tuple[Any, Any]]:
        if shown is None:
            raise ValueError("There is no image: drop one first.")
        index, raw = shown
        effects = []
        for part in token_effects(pipelines[index].pipe, raw):
            effects.append(part)
            images, captions = zip(*token_maps(np.concatenate(effects)), strict=True)
            files = as_files({f"token-{number}": image for number, image in enumerate(images)})
            yield list(zip(files, captions, strict=True)), gr.update(visible=True)

    outputs = [shown, status, original, decoded, difference, latent, explain, tokens, token_panel]
    for trigger in (upload.change, chosen.change):
        trigger(show, [chosen, upload], outputs, show_progress="minimal", **QUEUED)
    explain.click(explain_tokens, shown, [tokens, token_panel], show_progress="minimal", **QUEUED)
