"""Images that tests upload."""

import numpy as np
import PIL.Image


def drawing(width=40, height=30):
    """An image whose left and right, top and bottom differ."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 128 + 0 * x], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(pixels)
