"""Pictures of numbers: a token latent as a matrix, and maps of how much pixels differ."""

import numpy as np
import torch
from PIL import Image


# of normalised latents, beyond which a color says no more
LATENT_RANGE = 3.0


def latent_picture(latent: torch.Tensor, is_normalized: bool) -> Image.Image:
    """
    A token latent as a picture: tokens from left to right, channels from top to bottom.

    Args:
        latent (`torch.Tensor` of shape `(num_tokens, channels)`): The latent.
        is_normalized (`bool`): Whether it is the one that a generator sees, whose colors then range over three
            standard deviations; else over its own largest value.

    Returns:
        `PIL.Image.Image`: With axes and a scale of colors.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = latent.float().cpu().numpy().T
    limit = LATENT_RANGE if is_normalized else float(np.abs(values).max()) or 1.0
    # no pyplot: its state is shared by all threads
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xlabel(f"token (0 to {values.shape[1] - 1})")
    axes.set_ylabel(f"channel (0 to {values.shape[0] - 1})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="normalised value" if is_normalized else "value", pad=0.01)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def heat_map(values: np.ndarray, largest: float) -> Image.Image:
    """
    Numbers as colors from black (0) to light yellow.

    Args:
        values (`np.ndarray` of shape `(height, width)`): Numbers of at least 0.
        largest (`float`): What the lightest color stands for.

    Returns:
        `PIL.Image.Image`: Of the size of `values`, mode `RGB`.
    """
    from matplotlib import colormaps

    colors = colormaps["inferno"](np.clip(values / (largest or 1.0), 0, 1), bytes=True)
    return Image.fromarray(colors[..., :3])
