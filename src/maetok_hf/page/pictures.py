"""Pictures of numbers: a token latent as a matrix, and maps of how much pixels differ."""

import numpy as np
import torch
from PIL import Image


# of normalised latents, beyond which a color says no more
LATENT_RANGE = 3.0


def latent_picture(latent: torch.Tensor) -> Image.Image:
    """
    A token latent as a picture: tokens from left to right, channels from top to bottom.

    Args:
        latent (`torch.Tensor` of shape `(num_tokens, channels)`): The latent as a generator sees it.

    Returns:
        `PIL.Image.Image`: With axes and a scale of colors, over three standard deviations to both sides.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = latent.float().cpu().numpy().T
    # no pyplot: its state is shared by all threads
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    limits = {"vmin": -LATENT_RANGE, "vmax": LATENT_RANGE}
    image = axes.imshow(values, cmap="RdBu_r", aspect="auto", interpolation="nearest", **limits)
    axes.set_xlabel(f"token (0 to {values.shape[1] - 1})")
    axes.set_ylabel(f"channel (0 to {values.shape[0] - 1})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="normalised value", pad=0.01)
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
